"""Laws of every family, and errors for models of none."""

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.models import VisionTransformer
from timm_zoo import (
    DYNAMIC,
    assert_same,
    direct,
    gradients,
    is_zero,
    model,
    named,
    photos,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ser_reg.backbones import FAMILIES, TokenTap, backbone, late_cls, patch_tokens
from ser_reg.errors import SERError


class Case(NamedTuple):
    """A small model of a family, and images that it takes."""

    build: Callable[[], Any]
    images: tuple[int, ...] = (2, 3, 64, 96)


SWIN = {
    "drop_path_rate": 0.0,
    "embed_dim": 12,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "img_size": 64,
    "window_size": 4,
}
THIN = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
FAMILY = {  # a new family is a line here
    "vit": Case(named("vit_tiny_patch16_224", **DYNAMIC)),
    "eva": Case(named("vit_small_patch16_dinov3", **DYNAMIC)),
    "swin": Case(functools.partial(timm.create_model, "swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN)),
    "swin-static": Case(functools.partial(timm.create_model, "swin_s3_tiny_224", **SWIN), (2, 3, 64, 64)),
    "convnext": Case(functools.partial(timm.create_model, "convnextv2_atto", **CONVNEXT)),
    "resnet": Case(functools.partial(timm.create_model, "resnet10t", channels=(8, 8, 16, 16))),
    "resnet-bottleneck": Case(functools.partial(timm.create_model, "resnet26d", **THIN)),
}
family = pytest.mark.parametrize("name", FAMILY)


@functools.cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    made = FAMILY[name].build().eval()
    with torch.no_grad():  # weights as if trained: layer scales start near 0, which would hide mistakes
        for parameter in made.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def small(name: str) -> Any:
    return copy.deepcopy(_built(name))


def given(name: str) -> Tensor:
    return torch.randn(FAMILY[name].images, generator=torch.Generator().manual_seed(1))


def test_every_family_is_held_to_the_laws() -> None:
    assert {type(backbone(_built(name))) for name in FAMILY} == set(FAMILIES)


@family
class TestEveryFamily:
    def test_maps_are_as_told(self, name: str) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        maps = known.maps(images, range(known.depth + 1))
        assert list(maps) == list(range(known.depth + 1))
        for layer, z in maps.items():
            grid = known.grid(images.shape[-2:], layer)
            assert z.shape == (2, known.width(layer), *grid)
            assert tuple(side * known.stride(layer) for side in grid) == images.shape[-2:]
            assert torch.equal(known.maps(images, [layer])[layer], z)
            assert torch.equal(patch_tokens(net, images, layer), z)
        assert known.width() == known.width(known.depth)
        assert known.stride() == known.stride(known.depth)
        assert known.grid(images.shape[-2:]) == maps[known.depth].shape[-2:]
        assert known.patch_size == known.stride(0)

    def test_layers_as_asked(self, name: str) -> None:
        net, images = small(name), given(name)
        assert list(patch_tokens(net, images, iter([3, 1, 3]))) == [3, 1]
        assert patch_tokens(net, images, []) == {}

    def test_the_tap_hears_the_same(self, name: str) -> None:
        net, images = small(name), given(name)
        for layer in range(backbone(net).depth + 1):
            z = patch_tokens(net, images, layer)
            with TokenTap(net, layer) as tap:
                net(images)
                assert torch.equal(tap.tokens, z)
                tapped = tap.tokens.square().sum()
            names = [n for n, g in gradients(net, tapped).items() if not is_zero(g)]
            assert names == [n for n, g in gradients(net, z.square().sum()).items() if not is_zero(g)]
        assert not any(module._forward_pre_hooks for module in net.modules())

    def test_modules(self, name: str) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        calls: list[tuple[str, Any]] = []
        known.embedding.register_forward_pre_hook(lambda module, args: calls.append(("embedding", args[0])))
        for index, entry in enumerate(known.entries):
            entry.register_forward_pre_hook(lambda module, args, index=index: calls.append((index, args[0])))
        net(images)
        assert [call for call, _ in calls] == ["embedding", *range(known.depth + 1)]
        assert calls[0][1] is images
        assert len(known.layers) == known.depth
        assert any(part is known.projection for part in known.embedding.modules())
        assert known.projection.weight.shape[1] == known.channels == 3
        if known.positions is not None:
            rows, columns = known.grid(known.size)
            assert known.positions.shape[1] in (rows * columns, rows * columns + known.prefix)

    def test_stops_early_and_gradient_reaches_the_layers_run_only(self, name: str) -> None:
        net, images = small(name).train(), given(name)
        known = backbone(net)
        for layer in range(known.depth + 1):
            calls: list[int] = []
            handles = [
                part.register_forward_hook(lambda module, args, out, index=index, calls=calls: calls.append(index))
                for index, part in enumerate(known.layers)
            ]
            found = gradients(net, patch_tokens(net, images, layer).square().sum())
            assert calls == list(range(layer))
            for handle in handles:
                handle.remove()
            reached = {id(p): n for n, p in net.named_parameters() if found[n] is not None}
            assert {id(p) for part in [known.embedding, *known.layers[:layer]] for p in part.parameters()} <= {*reached}
            assert not {id(p) for part in known.layers[layer:] for p in part.parameters()} & {*reached}

    def test_no_image_gives_gradients_of_zero(self, name: str) -> None:
        net, images = small(name).train(), given(name)
        before = copy.deepcopy(dict(net.named_buffers()))
        for layer, z in patch_tokens(net, images[:0], [3, 0]).items():
            assert z.shape == (0, *patch_tokens(small(name), images, layer).shape[1:])
        found = gradients(net, patch_tokens(net, images[:0], 3).sum())
        twin = small(name).train()
        some_image = gradients(twin, patch_tokens(twin, images, 3).sum())
        assert all(is_zero(gradient) for gradient in found.values())
        run = backbone(net).layers[:3]
        used = {id(p) for part in [backbone(net).embedding, *run] for p in part.parameters()}
        for n, p in net.named_parameters():
            assert (found[n] is not None) == (some_image[n] is not None) or id(p) not in used, n
        assert all(torch.equal(value, before[key]) for key, value in net.named_buffers())

    def test_checkpointing_changes_nothing(self, name: str) -> None:
        net, images = small(name).double().train(), given(name).double()
        expected = gradients(net, net(images).sum() + patch_tokens(net, images, 2).square().sum())
        net.set_grad_checkpointing(True)
        assert_same(gradients(net, net(images).sum() + patch_tokens(net, images, 2).square().sum()), expected)
        with TokenTap(net, 2) as tap:
            out = net(images).sum()
            assert_same(gradients(net, out + tap.tokens.square().sum()), expected)

    def test_copies(self, name: str) -> None:
        net, images = small(name), given(name)
        for twin in (copy.deepcopy(backbone(net)), pickle.loads(pickle.dumps(backbone(net)))):
            assert twin.model is not net
            assert torch.equal(twin.maps(images, [2])[2], patch_tokens(net, images, 2))

    def test_what_it_was_built_for(self, name: str) -> None:
        net = small(name)
        known = backbone(net)
        for values, key in ((known.mean, "mean"), (known.std, "std")):
            assert values == tuple(net.pretrained_cfg[key])
        assert known.check_images("f(images)", torch.rand(1, known.channels, *known.size)) == known.grid(known.size)

    def test_without_positions(self, name: str) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        bare = backbone(known.without_positions())
        assert type(bare) is type(known)
        assert bare.model is not net
        same = torch.equal(bare.maps(images, [2])[2], known.maps(images, [2])[2])
        assert same == (not known.position_coding())
        assert all(torch.equal(value, _built(name).state_dict()[key]) for key, value in net.state_dict().items())

    def test_class_tokens(self, name: str) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        if known.has_class_tokens:
            pooled, tokens = known.class_tokens(images, 2)
            assert pooled.shape == (2, known.width())
            assert tokens.shape == (2, 2 * known.width())
            for last in (0, known.depth + 1):
                with pytest.raises(SERError, match=f"1 to {known.depth} blocks"):
                    known.class_tokens(images, last)
        else:
            with pytest.raises(SERError, match="no normalised"):
                known.class_tokens(images, 2)

    def test_classifier(self, name: str) -> None:
        net, images = small(name), given(name)
        head = backbone(net).classifier(5)
        assert head.weight.shape[0] == 5
        assert net(images).shape == (2, 5)

    def test_late_cls(self, name: str) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        assert known.cls_layer == 0
        if known.sequence:
            assert late_cls(net, 2) is net
            assert known.cls_layer == (2 if known.has_prefix else 0)
        else:
            before = net(images)
            with pytest.raises(SERError) as error:
                late_cls(net, 2)
            assert (error.value.call, error.value.given) == ("late_cls(model, 2)", type(net).__name__)
            assert "VisionTransformer (ViT, DeiT, DINOv2, CLIP) or Eva" in error.value.expected
            assert "ResNet" not in error.value.expected
            assert not known.has_prefix
            assert torch.equal(net(images), before)

    @pytest.mark.parametrize("layer", [-1, 9, True, 2.0, "3", None])
    def test_wrong_layers(self, name: str, layer: Any) -> None:
        net, images = small(name), given(name)
        known = backbone(net)
        expected = f"a whole number of {known.unit} from 0 to {known.depth}"
        for call, text in (
            (lambda: patch_tokens(net, images, layer), f"patch_tokens(model, images, layer={layer!r})"),
            (lambda: patch_tokens(net, images, [1, layer]), f"patch_tokens(model, images, layer={[1, layer]!r})"),
            (lambda: TokenTap(net, layer), f"TokenTap(model, {layer!r})"),
            (lambda: known.maps(images, [layer]), f"backbone(model).maps(images, {[layer]!r})"),
            (lambda: known.maps(images, [layer], "score(images)"), "score(images)"),
        ):
            with pytest.raises(SERError) as error:
                call()
            assert error.value.args[:3] == (text, f"layer={layer!r}", expected)
        for ask in (known.width, known.stride):
            if layer is not None:
                with pytest.raises(SERError, match=expected):
                    ask(layer)

    def test_wrong_sizes(self, name: str) -> None:
        net = small(name)
        known = backbone(net)
        height, width = FAMILY[name].images[-2:]
        images = torch.rand(1, 3, height + known.stride(2) // 2, width)
        for call in (
            lambda: patch_tokens(net, images, 2),
            lambda: known.grid(images.shape[-2:], 2),
            lambda: known.check_images("f(images)", images, 2),
        ):
            with pytest.raises(SERError, match=f"given:    images of {images.shape[-2]} x {width} pixels"):
                call()
        with TokenTap(net, 2), pytest.raises(SERError, match=r"TokenTap\(model, 2\)"):
            net(images)

    @pytest.mark.parametrize(
        ("change", "given_", "remedy"),
        [
            (list, "a list of Tensor", "torch.stack(list(images))"),
            (lambda x: (x, [1, 2]), "a tuple of Tensor", "images[0]  # of (images, labels)"),
            (lambda x: x.numpy(), "a ndarray", "torch.from_numpy(images)"),
            (lambda x: x.permute(0, 2, 3, 1).numpy(), "a ndarray", "torch.from_numpy(images).permute(0, 3, 1, 2)"),
            (
                lambda x: Image.new("RGB", (96, 64)),
                "a Image",
                "torchvision.transforms.functional.to_tensor(images)[None]",
            ),
            (
                lambda x: [Image.new("RGB", x.shape[:1:-1])],
                "a list of Image",
                "torch.stack([torchvision.transforms.functional.to_tensor(image) for image in images])",
            ),
            (
                lambda x: list(x.numpy()),
                "a list of ndarray",
                "torch.stack([torch.as_tensor(image) for image in images])",
            ),
        ],
    )
    def test_other_things_than_tensors(self, name: str, change: Callable[[Any], Any], given_: str, remedy: str) -> None:
        net, images = small(name), change(given(name))
        with pytest.raises(SERError) as error:
            backbone(net).check_images("score(model, images)", images)
        assert error.value.args == ("score(model, images)", given_, "a tensor (B, C, H, W)", remedy)
        if "Image" not in given_ or isinstance(images, list):
            assert (
                patch_tokens(net, eval(remedy, {"torch": torch, "torchvision": torchvision, "images": images}), 2)
                .isfinite()
                .all()
            )


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])  # of the ViT: test_tokens.py
def test_compiles(name: str) -> None:
    net, images = small(name), given(name)
    torch.compiler.reset()
    compiled = torch.compile(patch_tokens, backend="eager", fullgraph=True)
    assert torch.equal(compiled(net, images, 2), patch_tokens(net, images, 2))


class Masked(VisionTransformer):
    """As MAE does it: another sequence in the same class."""

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward_features(x)[:, ::2]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("cait_xxs24_224", "Cait"),
            ("beit_base_patch16_224", "Beit"),
            ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
            ("mobilenetv3_small_050", "MobileNetV3"),
        ],
    )
    def test_other_families(self, name: str, kind: str) -> None:
        vit = timm.create_model(name, pretrained=False, **({} if "mobile" in name else {"depth": 2}))
        images = torch.rand(1, 3, 224, 224)
        for call in (
            lambda: late_cls(vit, 1),
            lambda: patch_tokens(vit, images, 1),
            lambda: patch_tokens(vit, images, [1]),
            lambda: TokenTap(vit, 1),
            lambda: backbone(vit),
        ):
            with pytest.raises(SERError) as error:
                call()
            assert error.value.given == kind
            assert "VisionTransformer (ViT, DeiT, DINOv2, CLIP) or Eva" in error.value.expected
            assert error.value.remedy.startswith('timm.create_model("vit_small_patch16_224"')

    def test_a_subclass_with_another_sequence(self) -> None:
        with pytest.raises(SERError, match="given:    Masked with its own forward_features"):
            late_cls(direct(Masked)(), 1)

    def test_not_a_module(self) -> None:
        with pytest.raises(SERError, match="given:    str"):
            late_cls("vit_tiny_patch16_224", 1)  # type: ignore[type-var]

    @pytest.mark.parametrize(
        ("wrap", "path"),
        [
            (nn.DataParallel, "model.module"),
            (torch.compile, "model._orig_mod"),
            (lambda vit: torch.compile(nn.DataParallel(vit)), "model._orig_mod.module"),
        ],
    )
    def test_wrappers(self, wrap: Callable[[nn.Module], nn.Module], path: str) -> None:
        vit = wrap(model())
        with pytest.raises(SERError, match="a wrapper around the model") as error:
            late_cls(vit, 3)
        assert error.value.remedy == f"late_cls({path}, 3)"
        eval(error.value.remedy, {"late_cls": late_cls, "model": vit})  # the remedy works as typed
        with pytest.raises(SERError) as error:
            patch_tokens(vit, photos(), 3)
        assert error.value.remedy == f"patch_tokens({path}, images, layer=3)"
        with pytest.raises(SERError) as error:
            TokenTap(vit, 3)
        assert error.value.remedy == f"TokenTap({path}, 3)"
        with pytest.raises(SERError) as error:
            backbone(vit)
        assert error.value.remedy == f"backbone({path})"
        with pytest.raises(SERError) as error:
            backbone(vit, "check(model, images)")
        assert (error.value.call, error.value.remedy) == ("check(model, images)", f"check({path}, images)")


class TestFarPixels:
    """Values that no normalisation gives are warned of."""

    def warned(self, recorder: Any) -> list[str]:
        return [str(one.message) for one in recorder if "far outside the model's normalisation" in str(one.message)]

    @pytest.mark.parametrize("scale", [255.0, -255.0])
    def test_pixels_of_bytes(self, scale: float) -> None:
        net, images = small("vit"), scale * torch.rand(2, 3, 64, 96)
        with pytest.warns(UserWarning, match=r"images with values from .* far outside") as found:
            patch_tokens(net, images, 2)
        known = backbone(net)
        assert found[0].filename == __file__  # shown at the user's own line, whoever looked
        remedy = self.warned(found)[0].partition("Type: ")[2]
        assert remedy == f"torchvision.transforms.functional.normalize(images / 255, {known.mean}, {known.std})"
        if scale > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                patch_tokens(net, eval(remedy, {"images": images, "torchvision": torchvision}), 2)

    def test_of_a_tap(self) -> None:
        net = small("vit")
        with TokenTap(net, 2) as tap, pytest.warns(UserWarning, match="far outside") as found:
            net(255 * torch.rand(2, 3, 64, 96))
        assert found[0].filename == __file__
        assert tap is not None

    def test_once_a_line(self) -> None:
        net, images = small("vit"), 255 * torch.rand(2, 3, 64, 96)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for _ in range(3):
                patch_tokens(net, images, 2)
            patch_tokens(net, images, 2)
        assert len(self.warned(found)) == 2

    @pytest.mark.parametrize(
        "images",
        [
            5 * torch.randn(2, 3, 64, 96).clamp(-3.9, 3.9),
            torch.rand(2, 3, 64, 96),
            255 * torch.rand(0, 3, 64, 96),
            255 * torch.rand(2, 3, 64, 96, device="meta"),
        ],
        ids=["normalised", "fractions", "none", "not there"],
    )
    def test_what_is_passed_by(self, images: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch_tokens(small("vit").to(images.device), images, 2)

    def test_no_value_is_read_where_there_is_none(self) -> None:
        net, images = small("vit"), 255 * torch.rand(2, 3, 64, 96)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            warnings.filterwarnings("error", "images with values")
            torch.func.vmap(lambda x: patch_tokens(net, x[None], 2))(images)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                patch_tokens(net, mode.from_tensor(images), 2)
            torch.compiler.reset()
            torch.compile(patch_tokens, backend="eager", fullgraph=True)(net, images, 2)


@pytest.mark.parametrize("name", FAMILY)
def test_repr(name: str) -> None:
    known = backbone(small(name))
    assert repr(known).startswith(f"{type(known.model).__name__}: {known.depth} {known.unit}, {known.width()} channels")
    assert ("any other size" in repr(known)) == known.any_size
    assert "[CLS]" not in repr(known)


def test_layers() -> None:
    known = backbone(small("vit"))
    assert known.check_layers("f(layers)", (3, 1, 3)) == [1, 3]
    with pytest.raises(SERError) as error:
        known.check_layers("f(layers=3)", 3)
    assert error.value.args == ("f(layers=3)", "layers=3", "several numbers of layers", "layers=[3]")
