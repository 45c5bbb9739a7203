"""Reconstruction against its formula, with convolutions written out."""

import pytest
import torch
import torch.nn.functional as F
from term_cases import CASES, DIM, GRID, build, cropped, paths
from twins import assert_twins, batch_norm

from ser_reg import GroupElement, SERError, View
from ser_reg.geometry import Affine
from ser_reg.objectives import Reconstruction
from ser_reg.views import PathViews


def up(x, weight):
    """Transposed convolution, 4 x 4, stride 2, padding 1: every place paints 4 x 4 pixels around it."""
    n, _, h, w = x.shape
    canvas = x.new_zeros(n, weight.shape[1], 2 * h + 2, 2 * w + 2)
    for i in range(h):
        for j in range(w):
            patch = torch.einsum("ni,iokl->nokl", x[:, :, i, j], weight)
            canvas = canvas + F.pad(patch, (2 * j, 2 * (w - 1 - j), 2 * i, 2 * (h - 1 - i)))
    return canvas[:, :, 1:-1, 1:-1]


def on_maps(x, weight, bias):
    """Batch norm of maps: every place is a row."""
    rows = batch_norm(x.permute(0, 2, 3, 1).flatten(0, 2), weight, bias)
    return rows.unflatten(0, (len(x), x.shape[2], x.shape[3])).permute(0, 3, 1, 2)


def literal(p, features, views):
    tokens = torch.cat(
        [torch.einsum("bdhw,ed->behw", z, p["linear.weight"]) + p["linear.bias"][:, None, None] for z in features], 1
    )
    losses = []
    for k, view in enumerate(views[2:]):
        name = f"decoders.{k}"
        x = torch.einsum("bdhw,ed->behw", tokens, p[f"{name}.linear.weight"][:, :, 0, 0])
        x = x + p[f"{name}.linear.bias"][:, None, None]
        ups = sum(key.startswith(f"{name}.ups") for key in p)
        for i in range(ups):
            x = on_maps(up(x, p[f"{name}.ups.{i}.weight"]), p[f"{name}.norms.{i}.weight"], p[f"{name}.norms.{i}.bias"])
            x = x.relu() if i < ups - 1 else 1 / (1 + torch.exp(-x))
        losses.append(((x - view.images) ** 2).mean())
    return torch.stack(losses).mean()


def test_against_the_formula():
    features, views = CASES["reconstruction"].batch("reconstruction", 3)
    assert_twins(build("reconstruction"), literal, features, views)


def test_sizes_are_those_of_the_source():
    term = Reconstruction(384)
    assert term.linear.weight.shape == (256, 384)
    assert len(term.decoders) == 2
    shapes = [tuple(up.weight.shape) for up in term.decoders[0].ups]
    assert shapes == [(256, 128, 4, 4), (128, 64, 4, 4), (64, 32, 4, 4), (32, 3, 4, 4)]
    assert term.decoders[0].linear.weight.shape == (256, 512, 1, 1)
    assert Reconstruction(192).width == 128
    assert "width=256, patch_size=16, targets=2" in repr(term)
    assert Reconstruction(8, maker=PathViews(targets=3, final=True)).extra_repr().endswith("targets=4")


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 6, 7, 8, 14, 16])
def test_any_patch_size(patch):
    z = torch.randn(2, 2, DIM, 2, 3, requires_grad=True)
    images = torch.rand(2, 2, 3, 2 * patch, 3 * patch)
    views = [View(torch.empty(2, 0), Affine.identity(2), {})] * 2
    views += [View(target, Affine.identity(2), {}) for target in images]
    term = Reconstruction(DIM, width=4, patch_size=patch)
    out = term(z.unbind(), views)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in term.parameters())
    targets, painted = term.pictures(z.unbind(), views)
    assert [x.shape for x in painted] == [x.shape for x in images]
    assert all(x.min() >= 0 and x.max() <= 1 for x in painted)
    assert all(torch.equal(a, b) for a, b in zip(targets, images, strict=True))
    assert term.training


def test_an_image_that_is_no_whole_number_of_patches():
    z = torch.randn(2, 2, DIM, 3, 3, requires_grad=True)
    views = [View(torch.empty(2, 0), Affine.identity(2), {})] * 2 + [View(torch.rand(2, 3, 14, 15), None, {})] * 2
    views = [view._replace(relation=Affine.identity(2)) for view in views]
    assert Reconstruction(DIM, width=4, patch_size=4)(z.unbind(), views).loss.isfinite()


def test_logs():
    features, views = CASES["reconstruction"].batch("reconstruction", 6)
    term = build("reconstruction")
    out = term(features, views)
    targets = [view.images for view in views[2:]]
    chance = torch.stack([(t - t.mean(0)).square().mean() for t in targets]).mean()
    assert out.logs["chance"].item() == pytest.approx(chance.item())
    painted = [d(term._tokens(features), t.shape[-2:], None) for d, t in zip(term.decoders, targets, strict=True)]
    errors = [(a - b).square().mean() for a, b in zip(painted, targets, strict=True)]
    assert out.logs["psnr"].item() == pytest.approx(sum(-10 * e.log10().item() for e in errors) / 2)
    r2 = [1 - e / (t - t.mean(0)).square().mean() for e, t in zip(errors, targets, strict=True)]
    assert out.logs["r2"].item() == pytest.approx(sum(r2).item() / 2)


def test_matching_moves_the_tokens_of_view_1():
    """Features of places, seen in two crops: every token lies where the relation says."""
    term = Reconstruction(DIM, width=DIM, patch_size=4)
    with torch.no_grad():
        term.linear.weight.copy_(torch.eye(DIM))
        term.linear.bias.zero_()
    z = torch.randn(6, DIM, GRID, GRID, requires_grad=True)
    g = Affine.of(GroupElement.turn(1, 6))
    turned, _ = g.warp(z)
    first = View(torch.empty(6, 0), Affine.identity(6), {})
    targets = [View(torch.rand(6, 3, 12, 12), Affine.identity(6), {})] * 2
    for relation, expected in ((g, 1.0), (Affine.identity(6), 1 / 9)):
        views = [first, View(torch.empty(6, 0), relation, {}), *targets]
        assert term([z, turned], views).logs["matching"].item() == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    ("change", "text", "remedy"),
    [
        (lambda v: v[:2], "0 views behind", "PathViews("),
        (lambda v: v[:3], "1 views behind", "Reconstruction(dim, targets=1)"),
        (lambda v: [*v[:2], v[2]._replace(drawn={})], "1 views behind", "PathViews("),  # a third crop
        (lambda v: [*v[:3], v[3]._replace(images=2 * v[3].images)], "target 2 from", "normalize=IMAGENET"),
        (
            lambda v: [*v[:2], *(t._replace(images=t.images[:, :1]) for t in v[2:])],
            "target 1 (4, 1, 12, 12)",
            "PathViews",
        ),
        (
            lambda v: [*v[:2], *(t._replace(images=F.interpolate(t.images, (24, 24))) for t in v[2:])],
            "target 1 (4, 3, 24, 24) for features",
            "Reconstruction(dim, patch_size=8)",
        ),
        (lambda v: [*v[:2], *(t._replace(images=t.images[:3]) for t in v[2:])], "target 1 (3, 3", "PathViews"),
    ],
)
def test_targets_that_no_decoder_fits(change, text, remedy):
    views = change([v._replace(images=v.images.clamp(0, 1)) for v in paths(4)])
    z = torch.randn(2, 4, DIM, GRID, GRID).unbind()
    with pytest.raises(SERError) as caught:
        Reconstruction(DIM, width=4, patch_size=4).eval()(z, views)
    assert text in caught.value.given
    assert remedy in caught.value.remedy


def test_maps_of_two_sizes():
    z = [torch.randn(4, DIM, GRID, GRID), torch.randn(4, DIM, GRID, 4)]
    with pytest.raises(SERError, match="views of one size"):
        Reconstruction(DIM, patch_size=4).eval()(z, [*cropped(4), *paths(4)[2:]])


@pytest.mark.parametrize("name", ["width", "patch_size", "channels", "targets"])
def test_bad_settings(name):
    with pytest.raises(SERError, match=f"{name}=0"):
        Reconstruction(DIM, **{name: 0})
