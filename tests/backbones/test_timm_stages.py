"""Maps of timm models with stages, against timm's own."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ser_reg.backbones import TokenTap, backbone, patch_tokens
from ser_reg.errors import SERError

SWIN = {
    "drop_path_rate": 0.0,
    "embed_dim": 12,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "img_size": 64,
    "window_size": 4,
}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
THIN = {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 16)}


def named(name: str, **kwargs: Any) -> Callable[[], Any]:
    return functools.partial(timm.create_model, name, pretrained=False, **kwargs)


ZOO = {  # model, strides and widths by layer
    "swin": (named("swin_tiny_patch4_window7_224", **SWIN), (4, 4, 8, 16, 32), (12, 12, 24, 48, 96)),
    "swin-any": (
        named("swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN),
        (4, 4, 8, 16, 32),
        (12, 12, 24, 48, 96),
    ),
    "swin-patch-2": (
        named("swin_tiny_patch4_window7_224", **SWIN | {"patch_size": 2}),
        (2, 2, 4, 8, 16),
        (12, 12, 24, 48, 96),
    ),
    "convnext": (named("convnext_atto", **CONVNEXT), (4, 4, 8, 16, 32), (8, 8, 16, 24, 32)),
    "convnext-overlap": (named("convnext_atto_ols", **CONVNEXT), (4, 4, 8, 16, 32), (8, 8, 16, 24, 32)),
    "convnext-patch-2": (named("convnext_atto", patch_size=2, **CONVNEXT), (2, 4, 8, 16, 32), (8, 8, 16, 24, 32)),
    "convnext-dilated": (named("convnext_atto", output_stride=16, **CONVNEXT), (4, 4, 8, 16, 16), (8, 8, 16, 24, 32)),
    "resnet": (named("resnet18", channels=(8, 8, 16, 16)), (4, 4, 8, 16, 32), (64, 8, 8, 16, 16)),
    "resnet-deep-stem": (named("resnet26t", **THIN), (4, 4, 8, 16, 32), (64, 16, 32, 32, 64)),
    "resnet-dilated": (named("resnet10t", output_stride=8), (4, 4, 8, 8, 8), (64, 64, 128, 256, 512)),
    "resnet-blurred": (named("resnetblur18"), (4, 4, 8, 16, 32), (64, 64, 128, 256, 512)),
    "resnet-convolved-pool": (named("resnetrs50", **THIN), (4, 4, 8, 16, 32), (64, 16, 32, 32, 64)),
}
zoo = pytest.mark.parametrize("name", ZOO)


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return ZOO[name][0]().eval()


def photos(name: str) -> Tensor:
    size = (64, 96) if backbone(model(name)).any_size else (64, 64)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@zoo
def test_strides_widths_and_grids_are_those_of_the_maps(name: str) -> None:
    net, images = model(name), photos(name)
    known, (_, strides, widths) = backbone(net), ZOO[name]
    assert [known.stride(layer) for layer in range(5)] == list(strides)
    assert [known.width(layer) for layer in range(5)] == list(widths)
    for layer, z in patch_tokens(net, images, range(5)).items():
        assert z.shape[1] == widths[layer]
        assert z.shape[-2:] == tuple(side // strides[layer] for side in images.shape[-2:])
        assert known.grid(images.shape[-2:], layer) == z.shape[-2:]


@zoo
def test_maps_are_timms(name: str) -> None:
    net, images = model(name), photos(name)
    last = list(range(len(net.feature_info)))[-4:]
    expected = net.forward_intermediates(images, indices=last, intermediates_only=True)
    found = patch_tokens(net, images, [1, 2, 3, 4])
    assert all(torch.equal(z, timms) for z, timms in zip(found.values(), expected, strict=True))


@zoo
def test_the_first_map_enters_the_first_stage(name: str) -> None:
    net, images = model(name), photos(name)
    layout = (0, 3, 1, 2) if name.startswith("swin") else (0, 1, 2, 3)
    seen: list[Tensor] = []
    first = backbone(net).layers[0]
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].permute(layout)))
    net(images)
    handle.remove()
    assert torch.equal(patch_tokens(net, images, 0), seen[0])


@pytest.mark.parametrize("name", ["resnet", "resnet-convolved-pool"])
def test_batch_statistics_are_taken_once(name: str) -> None:
    nets = [ZOO[name][0]().train() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].forward_features(photos(name))
    patch_tokens(nets[1], photos(name), [0, 4])
    first, second = (dict(net.named_buffers()) for net in nets)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("reentrant", [False, True], indirect=True)
@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])
def test_recomputation_is_not_a_forward(name: str, layer: int, reentrant: bool) -> None:
    net, images = copy.deepcopy(model(name)), photos(name)
    stages, calls = backbone(net).layers, []
    expected = patch_tokens(net, images, layer)
    (expected.square().sum() + net(images).sum()).backward()
    before = [p.grad for p in net.parameters()]
    net.zero_grad()
    net.train()
    for module in net.modules():  # without batch statistics, which the second forward would take again
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    net.set_grad_checkpointing(True)
    with TokenTap(net, layer) as tap:
        out = net(images)
        z = tap.tokens
        assert torch.equal(z, expected)
        assert z.requires_grad
        last = [part for part in stages[-1].modules() if isinstance(part, nn.Conv2d | nn.Linear)][-1]
        last.register_forward_pre_hook(lambda module, args: calls.append(1))
        (z.square().sum() + out.sum()).backward()
        assert calls  # it did recompute
        assert tap.tokens is z
    for gradient, p in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)


def test_a_static_swin_takes_its_own_size_only() -> None:
    net = model("swin")
    known = backbone(net)
    assert (known.any_size, known.size) == (False, (64, 64))
    with pytest.raises(SERError) as error:
        patch_tokens(net, torch.rand(1, 3, 64, 96), 1)
    assert error.value.args == (
        "patch_tokens(model, images, layer=1)",
        "images of 64 x 96 pixels",
        "64 x 64, the size that the model was built for",
        "timm.create_model(..., strict_img_size=False)",
    )
    assert backbone(model("swin-any")).any_size


@pytest.mark.parametrize("name", ["swin-any", "convnext", "resnet"])
def test_sides_that_the_grid_of_the_map_does_not_fill(name: str) -> None:
    net, images = model(name), torch.rand(1, 3, 40, 64)
    assert patch_tokens(net, images, 2).shape[-2:] == (5, 8)
    with pytest.raises(SERError) as error:
        patch_tokens(net, images, [1, 3])
    assert error.value.args == (
        "patch_tokens(model, images, layer=[1, 3])",
        "images of 40 x 64 pixels",
        "sides that tokens of 16 x 16 fill",
        "torch.nn.functional.interpolate(images, (32, 64), mode='bicubic')",
    )
    assert patch_tokens(net, eval(error.value.remedy), [1, 3])[3].shape[-2:] == (2, 4)


def test_without_positions_swin_has_no_bias() -> None:
    known = backbone(model("swin"))
    assert known.position_coding() == ["relative (a bias in the attention of every window)"]
    bare = known.without_positions()
    tables = [p for n, p in bare.named_parameters() if n.endswith("relative_position_bias_table")]
    assert len(tables) == 5
    images = photos("swin")
    expected = patch_tokens(bare, images, 4)
    with torch.no_grad():
        for table in tables:
            table.zero_()
    torch.testing.assert_close(patch_tokens(bare, images, 4), expected)


def test_convolutions_have_no_coding() -> None:
    for name in ("convnext", "resnet"):
        assert backbone(model(name)).position_coding() == []
        assert backbone(model(name)).positions is None


def test_a_forward_of_features_alone_reaches_all_stages_but_the_last() -> None:
    net, images = model("resnet"), photos("resnet")
    for layer in range(4):
        with TokenTap(net, layer) as tap:
            net.forward_features(images)
            assert torch.equal(tap.tokens, patch_tokens(net, images, layer))
    with TokenTap(net, 4) as tap:
        net.forward_features(images)
        with pytest.raises(SERError, match="no forward, or one that stopped before"):
            _ = tap.tokens


def test_a_subclass_with_a_forward_of_its_own() -> None:
    class Dense(timm.models.ResNet):
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x)[..., ::2]

    with pytest.raises(SERError, match="given:    Dense with its own forward_features"):
        backbone(Dense(timm.models.resnet.BasicBlock, (1, 1, 1, 1)))


def test_ddp_wrapper() -> None:
    with pytest.raises(SERError) as error:
        patch_tokens(nn.DataParallel(model("resnet")), photos("resnet"), 1)
    assert error.value.remedy == "patch_tokens(model.module, images, layer=1)"
