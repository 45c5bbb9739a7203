"""The term as a whole: it trains what it should, nothing else, and says what it sees."""

import copy
import math
from itertools import pairwise

import pytest
import timm
import torch
from elements import DIHEDRAL, dihedral, element
from literal import literal_ntxent
from processes import Here

from ser_reg import (
    Affine,
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


# Crops ----------------------------------------------------------------------------------------------------------


def cropped(*boxes, turns=0, flip=False):
    """Crops by (top, left, height, width), of one image each, turned and flipped afterwards."""
    return element(turns, flip) @ Affine.crop(torch.tensor(boxes, dtype=torch.float64))


def random_crops(n, seed, smallest=0.3):
    generator = torch.Generator().manual_seed(seed)
    sides = smallest + (1 - smallest) * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    corner = (1 - sides) * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    turns = torch.randint(4, (n,), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    g = GroupElement(turns, flip, torch.ones(n, 2, dtype=torch.float64))
    return g @ Affine.crop(torch.cat([corner, sides], 1))


def views_of(*relations):
    return [View(torch.empty(0), relation, {}) for relation in relations]


def frame(size):
    """(2, h·w): row and column of the centres of places, in half sides."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in size)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij")])


def seen(relation1, relation2, size):
    """(B, N) bool by brute force: each place of view 2 is carried to the whole image, and on to view 1."""
    found = torch.zeros(len(relation1), size[0] * size[1], dtype=torch.bool)
    for i in range(len(relation1)):
        for j, place in enumerate(frame(size).T):
            in_whole = torch.linalg.solve(relation2.matrix[i], torch.cat([place, torch.ones(1, dtype=torch.float64)]))
            in_first = relation1.matrix[i] @ in_whole
            found[i, j] = bool(in_first[:2].abs().max() <= 1 + 1e-9)
    return found


def smooth_images(n, dim, seed=0):
    """A function of (row, column) of the whole image for each of n images: (n, dim) of places (n, 2, N), slow waves."""
    generator = torch.Generator().manual_seed(seed)
    wave, phase = (
        torch.randn(n, dim, 2, generator=generator).double(),
        6 * torch.rand(n, dim, 1, generator=generator).double(),
    )
    return lambda places: torch.sin(1.5 * wave @ places + phase)


def equivariant_map(image, relation, size):
    """What an exactly equivariant network sees of an image through a view: its values at the centres of patches."""
    places = torch.cat([frame(size), torch.ones(1, size[0] * size[1], dtype=torch.float64)])
    in_whole = torch.linalg.inv(relation.matrix) @ places
    return image(in_whole[:, :2]).unflatten(-1, size)


@pytest.mark.parametrize("seed", range(6))
def test_an_equivariant_network_has_the_loss_of_the_true_correspondence(seed):
    """Whatever the crops, turns and flips: up to resampling between places, which slow waves hardly feel."""
    ser = SERLoss(24, projection_dim=32).double().eval()
    image, size = smooth_images(5, 24, seed), (9, 11)
    relation1, relation2 = random_crops(5, seed), random_crops(5, seed + 100)
    z1, z2 = (equivariant_map(image, relation, size) for relation in (relation1, relation2))
    valid = seen(relation1, relation2, size)
    out = ser([z1, z2], views_of(relation1, relation2))
    tokens = ser.projector(z2.flatten(2).mT)
    true = patch_ntxent(tokens, tokens, 0.3, valid)
    assert out.logs["valid"].item() == pytest.approx(valid.double().mean().item())
    assert 0 < out.logs["valid"] < 1
    assert out.loss.item() == pytest.approx(true.item(), abs=0.03)
    assert out.loss < out.logs["chance"] - 0.5
    other = views_of(relation1, random_crops(5, seed + 200))
    assert ser([z1, z2], other).loss > out.loss + 0.3


@pytest.mark.parametrize("channels", ["trivial", "regular"])
def test_equals_the_formula_read_literally(channels):
    """Values and gradients, of maps and of the projector; places that were not seen have none."""
    ser = SERLoss(8, projection_dim=6, temperature=0.2, channels=channels).double()
    relation1, relation2 = random_crops(3, 1), random_crops(3, 2)
    z1, z2 = torch.randn(3, 8, 4, 3, dtype=torch.float64), torch.randn(3, 8, 3, 4, dtype=torch.float64)
    z1.requires_grad_(), z2.requires_grad_()
    valid = seen(relation1, relation2, (3, 4))
    g = relation2 @ ~relation1
    acted, _ = g.warp(z1, (3, 4))
    if channels == "regular":
        acted = torch.stack([turned_channels(z, g.turns[i].item(), bool(g.flip[i])) for i, z in enumerate(acted)])
    norm, first, _, second = ser.projector
    tokens = []
    for z in (acted, z2):
        x = z.flatten(2).mT
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        tokens.append(torch.nn.functional.gelu((x * norm.weight + norm.bias) @ first.weight.mT) @ second.weight.mT)
    wanted = literal_ntxent(*tokens, 0.2, valid=valid)
    out = ser([z1, z2], views_of(relation1, relation2))
    assert 0 < out.logs["valid"] < 1
    given = [z1, z2, *ser.parameters()]
    torch.testing.assert_close(out.loss, wanted, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(out.loss, given)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, given), rtol=1e-9, atol=1e-9)
    assert not grads[1].flatten(2).mT[~valid].any()


@pytest.mark.parametrize(
    ("second", "count"),
    [
        ([(0.0, 0.0, 0.5, 1.0)] * 2, 24),  # one and the same crop: all places
        ([(0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.25, 1.0)], 24),  # inside the first crop
        ([(0.25, 0.0, 0.5, 1.0)] * 2, 16),  # two rows of three: the second is on the edge, which counts
        ([(0.3, 0.7, 0.7, 0.5)] * 2, 4),  # a corner
        ([(0.4, 0.85, 0.4, 0.8)] * 2, 2),  # one place each
        ([(0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 0.5, 1.0)], 0),  # an image alone has no negatives
        ([(0.5, 0.0, 0.5, 1.0)] * 2, 0),  # none
    ],
)
def test_places_that_both_crops_have_seen(ser, second, count):
    first = [(0.0, 0.0, 0.5, 1.0)] * 2
    z1, z2 = torch.randn(2, 2, DIM, 3, 4, requires_grad=True)
    views = views_of(cropped(*first), cropped(*second))
    rows = []
    ser.projector.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape))
    out = ser([z1, z2], views)
    valid = seen(views[0].relation, views[1].relation, (3, 4))
    assert count in (valid.sum(), 0)
    assert rows == [(int(valid.sum()), DIM)] * 2  # nothing else is projected
    assert out.logs["valid"].item() == pytest.approx(count / 24)
    assert out.loss.isfinite()
    assert (out.loss > 0) == (count > 0)
    assert (out.logs["chance"] > 0) == (count > 0)


@pytest.mark.parametrize("alone", [False, True])
def test_no_overlap_in_a_batch_gives_zero_and_gradients_of_zeros(vit, ser, alone):
    """DDP waits for a gradient of every parameter, and must not wait for ever."""
    upper, lower = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)
    views = views_of(cropped(upper, upper, upper), cropped(upper if alone else lower, lower, lower))
    z = [patch_tokens(vit, torch.rand(3, 3, 24, 24), LAYER) for _ in range(2)]
    out = ser(z, views)
    out.loss.backward()
    assert out.loss.item() == 0
    assert {name: out.logs[name].item() for name in ("chance", "valid")} == {"chance": 0, "valid": 0}
    assert out.logs["accuracy"].isnan()
    assert alone or out.logs["matching"].isnan()
    early = [p for name, p in vit.named_parameters() if name.startswith(("patch_embed", "blocks.0", "blocks.1"))]
    for parameter in [*early, *ser.parameters()]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_affine_relations_that_cut_nothing_off_are_elements():
    """The same number in every bit, be the whole image called a crop or not, on one side or on both."""
    ser, g, h = SERLoss(DIM, projection_dim=48).eval(), dihedral(4), dihedral(4)
    z1, z2 = torch.randn(2, 4, DIM, 5, 5)
    expected = ser([z1, z2], views_of(g, h))
    whole = Affine.identity(4)
    for relations in ((whole @ g, whole @ h), (g, whole @ h), (whole @ g, h)):
        out = ser([z1, z2], views_of(*relations))
        assert torch.equal(out.loss, expected.loss)
        assert out.logs == expected.logs
    assert expected.logs["valid"] == 1


def test_one_relation_for_all_images(ser):
    z1, z2 = torch.randn(2, 3, DIM, 4, 5)
    box1, box2 = (0.0, 0.1, 0.8, 0.7), (0.2, 0.0, 0.8, 0.9)
    every = ser.eval()([z1, z2], views_of(cropped(*[box1] * 3), cropped(*[box2] * 3)))
    one = ser([z1, z2], views_of(cropped(box1), cropped(box2)))
    assert torch.equal(one.loss, every.loss)
    assert torch.equal(one.logs["valid"], every.logs["valid"])


def test_matching_looks_at_valid_places_of_some_images():
    """Twenty images, of which ten have valid places; against the loops over those that are looked at."""
    ser = SERLoss(8, projection_dim=6).eval()
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 20, 8, 4, 4, generator=generator)
    z2 = z1 + 0.8 * z2
    lower, rest = (0.5, 0.0, 0.5, 1.0), (0.2, 0.1, 0.7, 0.8)
    relation1, relation2 = cropped(*[(0.0, 0.0, 0.5, 1.0)] * 20), cropped(*[lower, rest] * 10)
    valid = seen(relation1, relation2, (4, 4))
    chosen = [1 + 2 * (i * 10 // 8) for i in range(8)]
    acted, _ = (relation2 @ ~relation1).warp(z1, (4, 4))
    tokens1, tokens2 = (ser.projector(z.flatten(2).mT) for z in (acted, z2))
    hits = []
    for i in chosen:
        places = valid[i].nonzero().flatten().tolist()
        for j in places:
            cosines = {k: torch.cosine_similarity(tokens1[i, j], tokens2[i, k], dim=0).item() for k in places}
            hits.append(max(cosines, key=cosines.get) == j)
    out = ser([z1, z2], views_of(relation1, relation2))
    assert 0 < sum(hits) < len(hits)
    assert out.logs["matching"].item() == pytest.approx(sum(hits) / len(hits))


# Channels -------------------------------------------------------------------------------------------------------


def turned_channels(z, turns, flip):
    """What g = R^turns F^flip does to eight blocks of channels, one a turn and flip: block k comes from block g⁻¹k."""
    blocks = z.chunk(8)
    undone = [None] * 8
    for k_turns, k_flip in DIHEDRAL:  # g k = R^(turns ± k_turns) F^(flip xor k_flip)
        product = (turns + (-1) ** flip * k_turns) % 4 + 4 * (flip ^ k_flip)
        undone[product] = blocks[k_turns + 4 * k_flip]
    return torch.cat(undone)


def orbit_stack(x, weight):
    """Block k is k φ(k⁻¹ x), of a φ that is not equivariant at all: it turns by the regular representation."""
    ks = [element(turns, flip) for turns, flip in DIHEDRAL]
    return torch.cat([act(k, torch.nn.functional.conv2d(act(~k, x), weight, stride=PATCH)) for k in ks], 1)


@pytest.mark.parametrize("affine", [False, True])
def test_a_map_that_turns_its_channels_is_fixed_by_the_regular_action_alone(affine):
    images, weight = torch.randn(8, 3, 24, 24), torch.randn(5, 3, PATCH, PATCH)
    g = dihedral(8)
    z1, z2 = orbit_stack(images, weight), orbit_stack(act(g, images), weight)
    relation = Affine.of(g) if affine else g
    for channels, fixed in (("regular", True), ("trivial", False)):
        ser = SERLoss(40, projection_dim=24, channels=channels).eval()
        out = ser([z1, z2], views_of(GroupElement.identity(8), relation))
        tokens = ser.projector(z2.flatten(2).mT)
        true = patch_ntxent(tokens, tokens, 0.3)
        assert (abs(out.loss - true) < 1e-5) == fixed
        assert (out.logs["matching"] == 1) == fixed
    assert "channels='trivial'" in repr(ser)


def test_channels_move_with_the_relation():
    """Not with either view, and as eight blocks in the order of turns + 4 · flip."""
    ser = SERLoss(16, channels="regular").eval()
    z1, z2, g, h = torch.randn(5, 16, 3, 3), torch.randn(5, 16, 3, 3), dihedral(5), dihedral(5)
    there = h @ ~g
    acted = act(there, z1)
    moved = torch.stack([turned_channels(z, there.turns[i].item(), bool(there.flip[i])) for i, z in enumerate(acted)])
    plain = SERLoss(16)
    plain.load_state_dict(ser.state_dict())  # channels have no weights
    expected = plain.eval()([moved, z2], views_of(*2 * [GroupElement.identity(5)])).loss
    assert torch.equal(ser([z1, z2], views_of(g, h)).loss, expected)


def test_regular_channels_compile():
    views = EquivariantViews(PATCH)(torch.rand(4, 3, 24, 24), torch.Generator().manual_seed(0))
    ser = SERLoss(16, projection_dim=8, channels="regular")
    z = [torch.randn(4, 16, *(side // PATCH for side in view.images.shape[-2:]), requires_grad=True) for view in views]
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: ser([a, b], views).loss, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(*z), ser(z, views).loss)


# Ranks ----------------------------------------------------------------------------------------------------------


def crop_batch(n, channels="trivial"):
    relation1, relation2 = random_crops(n, 3), random_crops(n, 4)
    generator = torch.Generator().manual_seed(5)
    z1, z2 = (torch.randn(2, n, 8, 3, 4, generator=generator, dtype=torch.float64)).unbind()
    torch.manual_seed(0)
    return z1, z2, relation1, relation2, SERLoss(8, projection_dim=6, channels=channels).double()


def term_of_shard(here, bounds, channels, boxes=None):
    z1, z2, relation1, relation2, ser = crop_batch(bounds[-1], channels)
    if boxes is not None:
        relation1, relation2 = (cropped(*each) for each in boxes)
    mine = slice(bounds[here.rank], bounds[here.rank + 1])
    z1, z2 = (z[mine].clone().requires_grad_() for z in (z1, z2))
    out = ser([z1, z2], views_of(relation1[mine], relation2[mine]), here.group)
    out.loss.backward()
    return out.loss.detach(), out.logs, z1.grad, z2.grad, [p.grad for p in ser.parameters()]


@pytest.mark.parametrize("channels", ["trivial", "regular"])
@pytest.mark.parametrize("bounds", [[0, 2, 6], [0, 0, 6], [0, 1, 1, 4, 6], [0, 6, 6, 6, 6]])
def test_crops_on_any_number_of_ranks_equal_one_process(bounds, channels, run):
    world = len(bounds) - 1
    answers = run(world, term_of_shard, bounds, channels)
    agree_with_one_process(answers, bounds, channels)


def agree_with_one_process(answers, bounds, channels="trivial", boxes=None):
    world = len(answers)
    loss, logs, g1, g2, of_heads = term_of_shard(Here(0, None), [0, bounds[-1]], channels, boxes)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(sum(answer[0] for answer in answers) / world, loss, **close)
    torch.testing.assert_close(torch.cat([answer[2] for answer in answers]) / world, g1, **close)
    torch.testing.assert_close(torch.cat([answer[3] for answer in answers]) / world, g2, **close)
    for i, grad in enumerate(of_heads):
        torch.testing.assert_close(sum(answer[4][i] for answer in answers) / world, grad, **close)
    shares = [(answer[1]["valid"], b - a) for answer, (a, b) in zip(answers, pairwise(bounds), strict=True)]
    assert sum(share * n for share, n in shares if n).item() / bounds[-1] == pytest.approx(logs["valid"].item())
    assert all(share.isnan() for share, n in shares if not n)
    for answer in answers:
        torch.testing.assert_close(answer[1]["chance"], logs["chance"])


@pytest.mark.parametrize("overlaps", [[], [1], [1, 2], [0, 1]])
def test_ranks_without_any_overlap(overlaps, run):
    """None anywhere, on one rank alone, on both."""
    upper, lower = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)
    boxes = [upper] * 4, [upper if i in overlaps else lower for i in range(4)]
    answers = run(2, term_of_shard, [0, 2, 4], "trivial", boxes)
    agree_with_one_process(answers, [0, 2, 4], boxes=boxes)
    if len(overlaps) < 2:
        assert all(answer[0] == 0 and answer[1]["valid"] == 0 for answer in answers)
        assert not any(grad.any() for answer in answers for grad in answer[4])


def test_whole_images_on_one_rank_and_crops_on_another(run):
    answers = run(2, mixed_shard)
    z1, z2, _, relation2, ser = crop_batch(4)
    relation1 = Affine.identity(4)
    relation2 = Affine(torch.cat([Affine.identity(2).matrix, relation2[2:].matrix]))
    loss = ser([z1.requires_grad_(), z2], views_of(relation1, relation2)).loss
    assert sum(answer.item() for answer in answers) / 2 == pytest.approx(loss.item(), rel=1e-9)


def mixed_shard(here):
    z1, z2, _, relation2, ser = crop_batch(4)
    mine = slice(2 * here.rank, 2 * here.rank + 2)
    views = views_of(GroupElement.identity(2), relation2[mine] if here.rank else GroupElement.identity(2))
    return ser([z1[mine].requires_grad_(), z2[mine]], views, here.group).loss.detach()


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


def test_channels_cannot_follow_another_angle():
    views = [View(torch.empty(2, 0), relation, {}) for relation in (Affine.identity(2), Affine.rotation(torch.ones(2)))]
    with pytest.raises(SERError) as caught:
        SERLoss(8, channels="regular").eval()(torch.randn(2, 2, 8, 3, 3).unbind(), views)
    assert caught.value.call == "SERLoss(..., channels='regular')(features, views)"
    assert SERLoss(8).eval()(torch.randn(2, 2, 8, 3, 3).unbind(), views).loss.isfinite()  # the remedy


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SERLoss(0), "dim=0"),
        (lambda: SERLoss(8, projection_dim=2.5), "projection_dim=2.5"),
        (lambda: SERLoss(8, temperature=0), "temperature=0"),
        (lambda: SERLoss(8, temperature=math.nan), "temperature=nan"),
        (lambda: SERLoss(8, temperature=None), "temperature=None"),
        (lambda: SERLoss(8, channels="odd"), "SERLoss(8, channels='odd')"),
        (lambda: SERLoss(12, channels="regular"), "12 channels\n  expected: a multiple of 8"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(SERError) as caught:
        make()
    assert text in str(caught.value)
