"""The term as a whole: it trains what it should, nothing else, and says what it sees."""

import copy
import math

import pytest
import timm
import torch
from elements import dihedral, element

from ser_reg import (
    EquivariantViews,
    GroupElement,
    SERError,
    SERLoss,
    TokenTap,
    View,
    act,
    late_cls,
    patch_ntxent,
    patch_tokens,
)

LAYER, DEPTH, DIM, PATCH = 2, 4, 32, 4


@pytest.fixture
def vit():
    return late_cls(
        timm.models.VisionTransformer(
            img_size=24, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0, dynamic_img_size=True
        ),
        LAYER,
    )


@pytest.fixture
def ser():
    return SERLoss(DIM, projection_dim=48)


def term(vit, ser, images, seed=0):
    views = EquivariantViews(PATCH)(images, torch.Generator().manual_seed(seed))
    return ser([patch_tokens(vit, view.images, LAYER) for view in views], views)


def related(g):
    """Two views of which g takes the first to the second; the term never looks at their images."""
    identity = GroupElement.identity(len(g))
    return View(torch.empty(0), identity, {}), View(torch.empty(0), g, {})


def test_trains_projector_and_early_blocks_and_nothing_else(vit, ser):
    """What the paper's release gets wrong: there, no parameter receives a gradient."""
    term(vit, ser, torch.rand(4, 3, 24, 24)).loss.backward()
    for name, parameter in [*vit.named_parameters(), *(("ser." + n, p) for n, p in ser.named_parameters())]:
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        late = block > LAYER or name in ("cls_token", "norm.weight", "norm.bias")
        if late:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} should have no gradient"
        else:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.abs().max() > 1e-9, f"{name} has a zero gradient"


def test_lambda_changes_the_gradient(vit, ser):
    images = torch.rand(4, 3, 24, 24)

    def gradient(weight):
        vit.zero_grad()
        loss = vit(images).square().mean() + weight * term(vit, ser, images).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    without, with_ser = gradient(0.0), gradient(1.0)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert (with_ser[name] - without[name]).abs().max() > 1e-6
    assert torch.equal(with_ser["blocks.3.mlp.fc1.weight"], without["blocks.3.mlp.fc1.weight"])


def test_a_tap_on_the_normal_forward_gives_the_same(vit, ser):
    images = torch.rand(4, 3, 24, 24)
    views = EquivariantViews(PATCH)(images, torch.Generator().manual_seed(0))
    maps = []
    with TokenTap(vit, LAYER) as tap:
        for view in views:
            vit(view.images)
            maps.append(tap.tokens)
    tapped = ser(maps, views).loss
    torch.testing.assert_close(tapped, term(vit, ser, images).loss)
    tapped.backward()
    assert vit.blocks[0].attn.qkv.weight.grad.abs().max() > 1e-9


def test_acts_then_projects(ser):
    """The two orders differ under resampling; the paper's is to act first (Section 3.3)."""
    z1, z2 = torch.randn(4, DIM, 6, 6), torch.randn(4, DIM, 5, 7)
    ser.eval()
    g = element(0, True, (5 / 6, 7 / 6), n=4)
    tokens = [ser.projector(z.flatten(2).transpose(1, 2)) for z in (act(g, z1), z2)]
    torch.testing.assert_close(ser([z1, z2], related(g)).loss, patch_ntxent(*tokens, temperature=0.3))


def test_true_relation_has_the_lower_loss(ser):
    """Features that are equivariant: equal up to the action."""
    z, g = torch.randn(8, DIM, 6, 6), dihedral(8)
    ser.eval()
    aligned = ser([z, act(g, z)], related(g))
    wrong = ser([z, act(g, z)], related(element(1, False) @ g))
    assert aligned.logs["accuracy"] == 1
    assert aligned.loss < wrong.loss - 1
    assert aligned.loss < aligned.logs["chance"]


def test_diagnostics(ser):
    z1, z2 = torch.randn(2, 3, DIM, 5, 5, requires_grad=True)
    out = ser([z1, z2], related(dihedral(3)))
    assert out.logs["chance"].item() == pytest.approx(math.log(1 + 2 * 2 * 25), rel=1e-6)
    assert all(not diagnostic.requires_grad for diagnostic in out.logs.values())
    assert out.loss.requires_grad
    assert 0 <= out.logs["accuracy"] <= 1
    assert 0.5 < out.logs["feature_std"] <= 1
    assert all(diagnostic.ndim == 0 for diagnostic in out.logs.values())
    same = torch.randn(1, DIM, 1, 1).expand(3, DIM, 5, 5)
    collapsed = ser.eval()([same, same], related(dihedral(3)))
    assert collapsed.logs["feature_std"] < 1e-3
    assert collapsed.loss.item() == pytest.approx(collapsed.logs["chance"].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_float32_island_under_autocast(ser, dtype):
    z1, z2 = torch.randn(2, 4, DIM, 6, 6).to(dtype)
    ser.eval()
    g = element(1, False, (5 / 6, 7 / 6), n=4)
    z2 = act(g, z2)
    expected = ser([z1.float(), z2.float()], related(g)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ser([z1, z2], related(g))
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, expected)


def test_double_stays_double(ser):
    z1, z2 = torch.randn(2, 2, DIM, 3, 3, dtype=torch.float64, requires_grad=True)
    ser = copy.deepcopy(ser).double()
    assert ser([z1, z2], related(dihedral(2))).loss.dtype == torch.float64
    g = dihedral(2)
    assert torch.autograd.gradcheck(lambda a, b: ser([a, b], related(g)).loss, (z1, z2), fast_mode=True)


def test_size_of_the_projector():
    assert sum(p.numel() for p in SERLoss(384).parameters()) == 384 * 512 + 512 * 512 + 2 * 384
    assert "temperature=0.3" in repr(SERLoss(8))


def test_features_without_gradient_raise_in_training(ser):
    z = torch.randn(3, DIM, 5, 5)
    with pytest.raises(SERError, match="trains its own heads alone"):
        ser([z, z], related(GroupElement.identity(3)))
    with torch.no_grad():
        ser([z, z], related(GroupElement.identity(3)))
    ser([z, z.clone().requires_grad_()], related(GroupElement.identity(3)))  # the other side may be a teacher's


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ser, z, v: ser([z[0], z], v), "patch_tokens(vit, view.images, layer=3)"),
        (lambda ser, z, v: ser([z[:, :5], z], v), "SERLoss(5)"),
        (lambda ser, z, v: ser([z.permute(0, 2, 3, 1), z], v), "z.permute(0, 3, 1, 2)"),
        (lambda ser, z, v: ser([z, z[:2]], v), "features of view 2 of 2 images, of which the view has 3"),
        (lambda ser, z, v: ser([z, z[:1]], (v[0], v[1][0])), "views of the same images"),
        (lambda ser, z, v: ser([z, z.long()], v), "z.float()"),
        (lambda ser, z, v: ser([z, z.to("meta")], v), "term.to("),
        (lambda ser, z, v: ser([z, z], (v[0], View(z, GroupElement.turn(1, n=3), {}))), "6 x 5 of the first grid"),
        (lambda ser, z, v: ser([z[:1], z[:1]], (v[0][0], v[1][0])), "negatives are tokens of other images"),
        (lambda ser, z, v: ser([z, z * math.nan], v), "NaN or infinity in the features of view 2"),
        (lambda ser, z, v: ser([z / 0, z / 0], v), "NaN or infinity in the features of view 1 and 2"),
        (lambda ser, z, v: ser([z], v), "1 features, 2 views"),
        (lambda ser, z, v: ser([z, z], v[:1]), "views = EquivariantViews(patch_size=16)(images)"),
        (lambda ser, z, v: ser([z, z], [GroupElement.identity(3)] * 2), "view 1 is a GroupElement"),
        (lambda ser, z, v: ser([z, z.tolist()], v), "features of view 2 list"),
    ],
)
def test_bad_input_says_what_to_type(ser, call, text):
    z = torch.randn(3, DIM, 5, 6)
    with pytest.raises(SERError) as caught:
        call(ser.eval(), z, (View(z, GroupElement.identity(3), {}), View(z, GroupElement.identity(3), {})))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SERLoss(0), "dim=0"),
        (lambda: SERLoss(8, projection_dim=2.5), "projection_dim=2.5"),
        (lambda: SERLoss(8, temperature=0), "temperature=0"),
        (lambda: SERLoss(8, temperature=math.nan), "temperature=nan"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
