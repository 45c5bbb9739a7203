"""Several gloo processes against one with the whole batch: values, gradients, disagreements, mutants."""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal import dense_ntxent, literal_ntxent
from processes import RANKS, Here
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import ser_reg
from ser_reg import SERError, patch_ntxent
from ser_reg.distributed import all_gather, all_reduce, rank_and_world_size
from ser_reg.losses.ntxent import contrast

# One process against several ------------------------------------------------------------------------------------


class Case(NamedTuple):
    counts: list[tuple[int, int]]  # (images, tokens of each) of every rank
    temperature: float = 0.3
    chunk_size: int | None = None
    seed: int = 0
    width: int = 5

    def shards(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        shards = []
        for images, tokens in self.counts:
            z1, other = torch.randn(2, images, tokens, self.width, generator=generator, dtype=torch.float64)
            shards.append((z1.requires_grad_(), (z1 + other).detach().requires_grad_()))
        return shards


def loss_of_shard(
    here: Here, case: Case, module: str = "ser_reg.losses.ntxent", folder: str = ""
) -> tuple[Tensor, ...]:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    z1, z2 = case.shards()[here.rank]
    tested = importlib.import_module(module).patch_ntxent
    loss = tested(z1, z2, case.temperature, None, case.chunk_size, here.group)
    (7 * loss).backward()
    return loss.detach(), z1.grad / 7, z2.grad / 7


def loss_of_all(case: Case, oracle: Callable[..., Tensor] = dense_ntxent) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    shards = case.shards()
    z1, z2 = ([image for shard in shards for image in shard[view]] for view in (0, 1))
    loss = oracle(z1, z2, case.temperature)
    loss.backward()
    zero = torch.zeros_like
    grads = [tuple(zero(z) if z.grad is None else z.grad for z in shard) for shard in shards]
    return loss.detach(), grads


def agrees(answers: list[tuple[Tensor, ...]], case: Case) -> bool:
    """Whether the mean over ranks, of values and of gradients, is that of one process with everything."""
    loss, grads = loss_of_all(case)
    world = len(answers)
    pairs = [(sum(answer[0] for answer in answers) / world, loss)]
    for answer, wanted in zip(answers, grads, strict=True):
        pairs += [(grad / world, w) for grad, w in zip(answer[1:], wanted, strict=True)]
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


def cases(size: int) -> st.SearchStrategy[Case]:
    counts = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=size, max_size=size)
    return st.builds(
        Case,
        counts.filter(lambda counts: sum(images for images, _ in counts) > 1),
        temperature=st.sampled_from([0.001, 0.07, 0.3, 1.0]),
        chunk_size=st.none() | st.integers(1, 20),
        seed=st.integers(0, 999),
        width=st.integers(1, 20),
    )


@pytest.mark.parametrize("size", RANKS)
def test_any_split_equals_one_process(size, run):
    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases(size))
    def compare(case):
        assert agrees(run(size, loss_of_shard, case), case)

    compare()


def test_uneven_split_equals_the_formula_read_literally(run):
    case = Case([(1, 3), (0, 2), (2, 1), (1, 4)])
    loss, grads = loss_of_all(case, literal_ntxent)
    answers = run(4, loss_of_shard, case)
    torch.testing.assert_close(sum(answer[0] for answer in answers) / 4, loss, rtol=0, atol=1e-10)
    for answer, wanted in zip(answers, grads, strict=True):
        torch.testing.assert_close([g / 4 for g in answer[1:]], list(wanted), rtol=0, atol=1e-10)


def test_one_image_per_rank_has_the_other_ranks_for_negatives(run):
    case = Case([(1, 3), (1, 2), (1, 3), (1, 1)])
    answers = run(4, loss_of_shard, case)
    assert agrees(answers, case)
    assert all(loss > 0 for loss, *_ in answers)


def test_a_rank_without_images_returns_a_connected_zero(run):
    loss, g1, _ = run(2, loss_of_shard, Case([(3, 2), (0, 2)]))[1]
    assert loss == 0
    assert g1.shape == (0, 2, 5)


# Valid places ---------------------------------------------------------------------------------------------------


class Masked(NamedTuple):
    """A case of which each rank has valid places, or (None) does not say."""

    case: Case
    valid: list[list[list[bool]] | None]

    def shards(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        shards = []
        for (z1, z2), mask in zip(self.case.shards(), self.valid, strict=True):
            valid = None if mask is None else torch.tensor(mask, dtype=torch.bool).view(z1.shape[:2])
            if valid is not None:  # what is not valid is no number
                z1, z2 = (z.detach().masked_fill(~valid[..., None], float("nan")).requires_grad_() for z in (z1, z2))
            shards.append((z1, z2, valid))
        return shards

    def whole(self) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], list[list[Tensor]]]:
        """The shards, and of both views all images that are left, each of them its valid tokens alone."""
        shards = self.shards()
        masks = [torch.ones(z1.shape[:2], dtype=torch.bool) if valid is None else valid for z1, _, valid in shards]
        lists = [
            [
                z[mask]
                for shard, valid in zip(shards, masks, strict=True)
                for z, mask in zip(shard[view], valid, strict=True)
            ]
            for view in (0, 1)
        ]
        return shards, [[z for z in images if len(z)] for images in lists]


def loss_of_masked_shard(here: Here, masked: Masked) -> tuple[Tensor, ...]:
    z1, z2, valid = masked.shards()[here.rank]
    loss, chance, accuracy = contrast(z1, z2, masked.case.temperature, here.group, valid)
    (7 * loss).backward()
    again = patch_ntxent(z1.detach(), z2.detach().requires_grad_(), masked.case.temperature, valid, 3, here.group)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    return loss.detach(), z1.grad / 7, z2.grad / 7, chance, accuracy


def agrees_masked(answers: list[tuple[Tensor, ...]], masked: Masked) -> None:
    """The mean over ranks, of values and of gradients, is that of one process with everything; chance is too."""
    shards, images = masked.whole()
    chance, world = torch.tensor(0.0, dtype=torch.float64), len(answers)
    loss = torch.tensor(0.0, dtype=torch.float64)
    if len(images[0]) > 1:
        loss = dense_ntxent(*images, masked.case.temperature)
        loss.backward()
        counts = torch.tensor([len(z) for z in images[0]], dtype=torch.float64)
        chance = (counts * (1 + 2 * (counts.sum() - counts)).log()).sum() / counts.sum()
    torch.testing.assert_close(sum(a[0] for a in answers) / world, loss.detach(), rtol=1e-10, atol=1e-10)
    for (_, g1, g2, level, _), (z1, z2, valid) in zip(answers, shards, strict=True):
        for grad, z in ((g1, z1), (g2, z2)):
            wanted = torch.zeros_like(z) if z.grad is None else z.grad
            torch.testing.assert_close(grad / world, wanted, rtol=1e-10, atol=1e-10)
            assert valid is None or not grad[~valid].any()
        assert level.item() == pytest.approx(chance.item())


@st.composite
def masked_cases(draw: st.DrawFn, size: int) -> Masked:
    counts = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=size, max_size=size))
    density = draw(st.sampled_from([0, 1, 3, 4]))
    valid = [
        None
        if density and draw(st.booleans())
        else [[draw(st.integers(0, 4)) < density for _ in range(tokens)] for _ in range(images)]
        for images, tokens in counts
    ]
    if all(mask is None for mask in valid):
        valid[-1] = [[True] * counts[-1][1]] * counts[-1][0]
    case = Case(
        counts, draw(st.sampled_from([0.001, 0.3])), seed=draw(st.integers(0, 999)), width=draw(st.integers(1, 8))
    )
    return Masked(case, valid)


@pytest.mark.parametrize("size", RANKS)
def test_any_split_of_valid_places_equals_one_process(size, run):
    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(masked=masked_cases(size))
    def compare(masked):
        agrees_masked(run(size, loss_of_masked_shard, masked), masked)

    compare()


@pytest.mark.parametrize(
    "valid",
    [
        [[[False] * 3] * 2, [[False] * 2], None, []],  # nobody has a place
        [[[False] * 3, [False, True, True]], [[False] * 2], None, []],  # an image alone
        [[[False] * 3] * 2, [[True, False]], None, []],  # on a rank of its own
    ],
)
def test_fewer_than_two_images_with_a_valid_place_give_zero_on_all_ranks(valid, run):
    masked = Masked(Case([(2, 3), (1, 2), (0, 3), (0, 2)]), valid)
    answers = run(4, loss_of_masked_shard, masked)
    agrees_masked(answers, masked)
    for loss, g1, g2, chance, accuracy in answers:
        assert loss == 0
        assert not g1.any()
        assert not g2.any()
        assert chance == 0
        assert accuracy.isnan()


def test_without_an_image_anywhere_none_drops_out(run):
    """A batch of no images is a mistake, unless somebody says which of its places are valid."""
    for answer in run(2, loss_of_masked_shard, Masked(Case([(0, 3), (0, 2)]), [None, None])):
        assert "0 images in 2 processes" in str(answer)
    assert all(answer[0] == 0 for answer in run(2, loss_of_masked_shard, Masked(Case([(0, 3), (0, 2)]), [None, []])))


def crops_with_ddp(here: Here, masked: Masked) -> tuple[Tensor, list[Tensor]]:
    parallel = DistributedDataParallel(model(), process_group=here.group)
    z1, z2, valid = masked.shards()[here.rank]
    tokens = [parallel(z.detach()[valid]) for z in (z1, z2)]
    loss = patch_ntxent(*tokens, valid=valid, group=here.group)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in parallel.parameters()]


@pytest.mark.parametrize(
    "valid",
    [
        [[[False] * 3, [True, False, True]], [[True, True]]],
        [[[False] * 3] * 2, [[True] * 2]],
        [[[True] * 3] * 2, [[False] * 2]],
    ],
)
def test_ddp_of_valid_places_equals_one_process(valid, run):
    masked = Masked(Case([(2, 3), (1, 2)]), valid)
    whole = model()
    _, images = masked.whole()
    tokens = [[whole(z.detach()) for z in view] for view in images]
    loss = dense_ntxent(*tokens) if len(tokens[0]) > 1 else 0 * torch.cat(tokens[0]).sum()
    loss.backward()
    answers = run(2, crops_with_ddp, masked)
    assert sum(answer[0] for answer in answers).item() / 2 == pytest.approx(loss.item(), rel=1e-10)
    for _, grads in answers:
        torch.testing.assert_close(grads, [p.grad for p in whole.parameters()], rtol=1e-10, atol=1e-10)


# As in training -------------------------------------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.Linear(6, 4, bias=False)]
    return torch.nn.Sequential(*layers).double()


def train_with_ddp(here: Here, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Parameter gradients under DDP as it is used, beside another loss and under a gradient scaler's factor."""
    parallel = DistributedDataParallel(model(), process_group=here.group)
    z1, z2 = (parallel(z.detach()) for z in case.shards()[here.rank])
    loss = patch_ntxent(z1, z2, group=here.group)
    (loss * 0.5 * 1024 + 0.1 * z1.sum()).backward()
    return loss.detach(), [parameter.grad for parameter in parallel.parameters()]


@pytest.mark.parametrize("counts", [[(2, 3), (3, 2)], [(4, 2), (0, 3), (1, 2)], [(1, 3), (0, 1), (5, 2), (2, 4)]])
def test_ddp_equals_one_process(counts, run):
    case = Case(counts)
    world = len(counts)
    whole = model()
    tokens = [[whole(image.detach()) for shard in case.shards() for image in shard[view]] for view in (0, 1)]
    loss = dense_ntxent(*tokens)
    (loss * 0.5 * 1024 + 0.1 * torch.cat(tokens[0]).sum() / world).backward()
    answers = run(world, train_with_ddp, case)
    assert sum(answer[0] for answer in answers).item() / world == pytest.approx(loss.item(), rel=1e-10)
    for _, grads in answers:
        torch.testing.assert_close(grads, [p.grad for p in whole.parameters()], rtol=1e-10, atol=1e-10)


def precisions(here: Here, dtype: torch.dtype) -> tuple[Tensor, ...]:
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in Case([(2, 3), (3, 2)]).shards()[here.rank])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = patch_ntxent(z1, z2, group=here.group)
    loss.backward()
    return loss.detach(), z1.grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype, run):
    expected, grads = loss_of_all(Case([(2, 3), (3, 2)]))
    answers = run(2, precisions, dtype)
    assert sum(loss for loss, _ in answers).item() / 2 == pytest.approx(expected.item(), rel=1e-2)
    for (loss, grad), (wanted, _) in zip(answers, grads, strict=True):
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        assert (grad.double() / 2 - wanted).abs().max() < 3e-2 * wanted.abs().max()


def diagnose(here: Here, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = case.shards()[here.rank]
    with torch.no_grad():
        return tuple(contrast(z1, z2, 0.3, here.group))


def test_diagnostics_count_the_candidates_of_all_ranks(run):
    case = Case([(2, 3), (0, 2), (3, 2), (1, 4)], width=3)
    total = 2 * 3 + 3 * 2 + 1 * 4
    chance = sum(
        images * tokens * torch.tensor(1.0 + 2 * (total - tokens)).log().item() for images, tokens in case.counts
    )
    x1, x2 = ([torch.nn.functional.normalize(z[view], dim=-1) for z in case.shards()] for view in (0, 1))
    images1, images2 = ([image for shard in x for image in shard] for x in (x1, x2))
    first = 0
    for rank, (loss, level, accuracy) in enumerate(run(4, diagnose, case)):
        assert not loss.requires_grad
        assert level.item() == pytest.approx(chance / total)
        hits = []
        for i in range(len(x1[rank])):
            others = torch.cat([z for m, z in enumerate(images1) if m != first + i])
            others = torch.cat([others, *[z for m, z in enumerate(images2) if m != first + i]])
            hits += [(a @ p > (others @ a).max()).double() for a, p in zip(x1[rank][i], x2[rank][i], strict=True)]
        assert accuracy.isnan() if not hits else accuracy.item() == pytest.approx(sum(hits).item() / len(hits))
        first += len(x1[rank])


# Disagreement: an error on every rank, and no rank that waits ---------------------------------------------------


def disagree(here: Here, changes: dict[str, Any]) -> float:
    """All ranks alike but rank 1, whose call is changed."""
    mine = changes if here.rank == 1 else {}
    z1 = torch.ones(mine.get("shape", (2, 3, 4)), dtype=mine.get("dtype", torch.float32))
    z1 = (z1 * mine.get("times", 1)).requires_grad_(mine.get("requires_grad", True))
    options = {"temperature": 0.3, **mine.get("options", {})}
    return patch_ntxent(z1, mine.get("z2", z1), **options, group=here.group).item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2, 3, 5)}, "feature dimension 4 on rank 0, 5 on rank 1\n  expected: the same on every rank"),
        ({"shape": (0, 3, 5)}, "remedy:   SERLoss(dim, projection_dim=512)"),
        ({"dtype": torch.float64}, "bits per number 32 on rank 0, 64 on rank 1"),
        ({"options": {"temperature": 0.5}}, "temperature 0.3 on rank 0, 0.5 on rank 1"),
        ({"requires_grad": False}, "requires_grad 1 on rank 0, 0 on rank 1"),
        ({"options": {"temperature": -1.0}}, "on rank 1\n  given:    temperature=-1.0"),
        ({"shape": (3, 4)}, "on rank 1\n  given:    z1 (3, 4) torch.float32 on cpu"),
        ({"shape": (2, 0, 4)}, "on rank 1\n  given:    z1 (2, 0, 4)"),
        ({"z2": torch.ones(2, 4, 4)}, "on rank 1\n  given:    z1 (2, 3, 4) torch.float32 on cpu, z2 (2, 4, 4)"),
        ({"options": {"valid": torch.ones(2, 2).bool()}}, "on rank 1\n  given:    valid (2, 2), z1 (2, 3, 4)"),
        ({"times": float("nan")}, "on rank 1\n  given:    z1 with 6 of 6 tokens not finite"),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_disagree_all_raise_within_seconds(size, changes, message, run):
    start = time.monotonic()
    answers = run(size, disagree, changes)
    assert time.monotonic() - start < 5
    for answer in answers:
        assert isinstance(answer, SERError)
        assert message in str(answer)
    assert all(isinstance(answer, float) for answer in run(size, disagree, {}))  # and the group goes on


@pytest.mark.parametrize("counts", [[(1, 3), (0, 3)], [(0, 3), (0, 3)]])
def test_fewer_than_two_images_over_all_ranks(counts, run):
    for answer in run(2, loss_of_shard, Case(counts)):
        assert isinstance(answer, SERError)
        assert f"{counts[0][0]} images in 2 processes" in str(answer)


def outsider(here: Here) -> float:
    group = dist.new_group([0])
    return disagree(Here(here.rank, group), {})


def test_a_process_outside_the_group(run):
    inside, *outside = run(4, outsider)
    assert isinstance(inside, float)
    assert all("expected: a group that this process belongs to" in str(error) for error in outside)


def test_without_processes_there_is_one():
    assert rank_and_world_size() == (0, 1)


# The gather -----------------------------------------------------------------------------------------------------


def gather_uneven(here: Here, lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    x = torch.full((lengths[here.rank], 2), float(here.rank), dtype=torch.float64, requires_grad=True)
    shards = all_gather(x, lengths, here.group)
    sum(((here.rank + 1) * 10.0**owner * shard).sum() for owner, shard in enumerate(shards)).backward()
    return [shard.detach() for shard in shards], x.grad


@pytest.mark.parametrize("lengths", [[3, 1], [0, 2], [1, 0, 2], [2, 0, 5, 1], [1, 1, 1, 1], [0, 0]])
def test_gather_keeps_the_order_and_sums_gradients_over_ranks(lengths, run):
    world = len(lengths)
    for rank, (shards, grad) in enumerate(run(world, gather_uneven, lengths)):
        for owner, shard in enumerate(shards):
            assert torch.equal(shard, torch.full((lengths[owner], 2), float(owner), dtype=torch.float64))
        assert torch.equal(grad, torch.full_like(shards[rank], world * (world + 1) / 2 * 10.0**rank))


def reduce(here: Here, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.full(shape, here.rank + 1.0, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    total = all_reduce(x.mT if x.ndim > 1 else x, here.group)
    ((here.rank + 1) * 10.0 * total).sum().backward()
    assert torch.equal(x.detach(), before)
    return total.detach(), x.grad


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("world", RANKS)
def test_reduce_sums_values_and_gradients_over_ranks(world, shape, run):
    ranks = world * (world + 1) / 2
    for total, grad in run(world, reduce, shape):
        assert torch.equal(total, torch.full(shape[::-1], ranks, dtype=torch.float64))
        assert torch.equal(grad, torch.full(shape, 10 * ranks, dtype=torch.float64))


def differentiate_a_sum(here: Here) -> Tensor:
    """Each rank's loss is a function of the sum of all ranks' squares."""
    x = torch.arange(3.0, dtype=torch.float64).add(here.rank).requires_grad_()
    loss = all_reduce(x.square(), here.group).sin().sum() * (here.rank + 1)
    return torch.autograd.grad(loss, x)[0]


def test_reduce_differentiates_the_sum_of_the_losses_of_all_ranks(run):
    x = [torch.arange(3.0, dtype=torch.float64).add(rank).requires_grad_() for rank in range(4)]
    total = sum(z.square() for z in x)
    wanted = torch.autograd.grad(sum(total.sin().sum() * (rank + 1) for rank in range(4)), x)
    torch.testing.assert_close(run(4, differentiate_a_sum), list(wanted), rtol=1e-12, atol=1e-12)


# Could these tests fail? ----------------------------------------------------------------------------------------

MUTANTS = {
    "no_grad on the gather": (
        "distributed.py",
        "    shards: tuple[",
        "    with torch.no_grad():\n        shards: tuple[",
    ),
    "rank weight dropped": (
        "losses/ntxent.py",
        "weight = world_size * anchors[rank] / max(1, sum(anchors))",
        "weight = 1.0",
    ),
    "identities shifted by one": ("losses/ntxent.py", "owner != rank", "owner != (rank + 1) % world_size"),
    "one kind of negative forgotten": (
        "losses/ntxent.py",
        "torch.cat([shard for",
        "torch.cat([shard[: len(shard) // 2] for",
    ),
    "gradients not summed": ("distributed.py", "mine[: ctx.lengths", "grads[dist.get_rank(ctx.group)][: ctx.lengths"),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_the_comparison_with_one_process_finds_mutants(mutant, run, tmp_path):
    name = f"ser_reg_mutant_{abs(hash(mutant))}"
    (tmp_path / name / "losses").mkdir(parents=True)
    for package in (tmp_path / name, tmp_path / name / "losses"):
        (package / "__init__.py").write_text("")
    changed, old, new = MUTANTS[mutant] if mutant else ("", "", "")
    for file in ("errors.py", "distributed.py", "losses/ntxent.py", "losses/streaming.py", "losses/tokens.py"):
        source = (Path(ser_reg.__file__).parent / file).read_text()
        if file == changed:
            assert source.count(old) == 1
            source = source.replace(old, new)
        (tmp_path / name / file).write_text(source)
    case = Case([(2, 3), (1, 2), (3, 2), (1, 4)])
    answers = run(4, loss_of_shard, case, f"{name}.losses.ntxent", str(tmp_path))
    assert agrees(answers, case) == (mutant is None)
