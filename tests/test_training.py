"""However people train, the gradients are those of one eager process."""

import copy

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal import dense_ntxent
from processes import Here
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ser_reg import (
    EquivariantViews,
    GroupElement,
    SERError,
    SERLoss,
    TokenTap,
    View,
    act,
    check,
    late_cls,
    patch_ntxent,
    patch_tokens,
    relation,
)

LAYER, DEPTH, DIM, PATCH = 2, 3, 32, 4
LAMBDA = 0.5
IMAGES = 8


class Model(nn.Module):
    """Encoder and term in one module, as a wrapper likes it; the SSL loss is a stand-in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = late_cls(
            timm.models.VisionTransformer(
                img_size=24, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=2, num_classes=0,
                dynamic_img_size=True,
            ),
            LAYER,
        )  # fmt: skip
        self.ser = SERLoss(DIM, projection_dim=48)

    def forward(self, view1: View, view2: View, group=None) -> Tensor:
        maps, embeddings = [], []
        with TokenTap(self.vit, LAYER) as tap:
            for view in (view1, view2):
                embeddings.append(self.vit(view.images))
                maps.append(tap.tokens)
        return ssl(*embeddings) + LAMBDA * self.ser(maps, (view1, view2), group).loss


def ssl(e1: Tensor, e2: Tensor) -> Tensor:
    """A mean over images, so that DDP's mean over equal shards is that of the batch."""
    return (e1 - e2.roll(1, 1)).square().sum(1).mean()


def batch(start: int = 0, stop: int = IMAGES) -> tuple[View, View]:
    """Views of images start to stop of one fixed batch, about which no other rank has to be asked."""
    images = torch.rand(IMAGES, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    make_views = EquivariantViews(PATCH)
    plan = make_views.draw(IMAGES, (24, 24), torch.Generator().manual_seed(2))
    return tuple(view[start:stop] for view in make_views.render(images, plan))


def tokens(vit: nn.Module, views: tuple[View, View]) -> list[Tensor]:
    return [patch_tokens(vit, view.images, LAYER) for view in views]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }


@pytest.fixture(scope="module")
def eager() -> dict[str, Tensor]:
    model = Model()
    model(*batch()).backward()
    return gradients(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: off by {error:.1e} of its norm"


# One process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(eager, reentrant):
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        model = Model()
        model.vit.set_grad_checkpointing(True)
        model(*batch()).backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)
    assert_same(gradients(model), eager)


def test_two_extra_forwards_instead_of_the_tap(eager):
    model, views = Model(), batch()
    base = ssl(*(model.vit(view.images) for view in views))
    (base + LAMBDA * model.ser(tokens(model.vit, views), views).loss).backward()
    assert_same(gradients(model), eager)


def test_ema_teacher_on_one_side():
    """Tokens of a teacher serve as targets: its weights get no gradient, the online side that of fixed targets."""
    model, views = Model(), batch()
    teacher = copy.deepcopy(model.vit).requires_grad_(False)
    online, target = patch_tokens(model.vit, views[0].images, LAYER), patch_tokens(teacher, views[1].images, LAYER)
    assert not target.requires_grad
    model.ser([online, target], views).loss.backward()
    found = gradients(model)
    model.zero_grad()
    online, target = tokens(model.vit, views)
    model.ser([online, target.detach()], views).loss.backward()
    assert_same(found, gradients(model))
    assert found["vit.blocks.0.attn.qkv.weight"].abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_gradient_accumulation_averages_micro_batches():
    """Not a bigger batch: the negatives of a micro-batch are its own."""
    model, halves = Model(), [batch(0, 4), batch(4, 8)]
    for half in halves:
        (model(*half) / len(halves)).backward()
    accumulated = gradients(model)
    model.zero_grad()
    (sum(model(*half) for half in halves) / len(halves)).backward()
    assert_same(accumulated, gradients(model))


# Compiled -------------------------------------------------------------------------------------------------------


def compiled(function, backend: str):
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_loss(backend):
    torch._dynamo.reset()
    z1, z2 = torch.randn(2, 3, 20, 16, requires_grad=True)
    loss, expected = compiled(lambda a, b: patch_ntxent(a, b), backend)(z1, z2), patch_ntxent(z1, z2)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, (z1, z2)) for x in (loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_step(eager, backend):
    """Action, term and the late-[CLS] forward, each as one graph."""
    torch._dynamo.reset()
    model = Model()
    views = batch()
    images = [view.images for view in views]
    early = compiled(lambda x: patch_tokens(model.vit, x, LAYER), backend)
    forward, term = compiled(model.vit.forward, backend), compiled(lambda *a: model.ser(*a).loss, backend)
    loss = ssl(*map(forward, images)) + LAMBDA * term([early(x) for x in images], views)
    loss.backward()
    assert_same(gradients(model), eager, 1e-4)


def test_recompilation_ends():
    """One graph a pair of grids and parity of turns, however many batches are drawn."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    acted = torch.compile(act, fullgraph=True, dynamic=False, backend=counter)
    make_views = EquivariantViews(PATCH, scale=(0.9, 1.1), ratio=(1, 1))
    kinds = set()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 64}):
        for seed in range(60):
            view1, view2 = make_views(torch.rand(2, 1, 16, 16), torch.Generator().manual_seed(seed))
            grid1, grid2 = ([side // PATCH for side in view.images.shape[-2:]] for view in (view1, view2))
            g, z = relation(view1, view2), torch.randn(2, 8, *grid1)
            assert list(acted(g, z).shape[-2:]) == grid2
            kinds.add((tuple(z.shape), g.kinds))
    assert counter.frame_count == len(kinds) <= 10


# Several processes ----------------------------------------------------------------------------------------------


def bounds(here: Here, world: int) -> tuple[int, int]:
    return here.rank * IMAGES // world, (here.rank + 1) * IMAGES // world


def with_ddp(here: Here, world: int, outside: bool) -> dict[str, Tensor]:
    """Term inside the wrapped module, or, with its own wrapper, beside the DDP forward as in the README's loop."""
    model = Model()
    views = batch(*bounds(here, world))
    if not outside:
        wrapped = DistributedDataParallel(model, process_group=here.group)
        wrapped(*views, here.group).backward()
        return gradients(wrapped)
    vit = DistributedDataParallel(model.vit, process_group=here.group)
    ser = DistributedDataParallel(model.ser, process_group=here.group)
    embeddings = [vit(view.images) for view in views]
    (ssl(*embeddings) + LAMBDA * ser(tokens(vit.module, views), views, here.group).loss).backward()
    return gradients(model)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ddp(run, eager, world, outside):
    for found in run(world, with_ddp, world, outside):
        assert not isinstance(found, Exception), found
        assert_same(found, eager, 1e-4)


def shard(counts: tuple[int, ...], rank: int, seed: int):
    """A rank's images, with a grid and relations of its own."""
    images = torch.rand(sum(counts), 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    mine = images[sum(counts[:rank]) : sum(counts[: rank + 1])].double()
    make_views = EquivariantViews(PATCH)
    plan = make_views.draw(max(1, len(mine)), (24, 24), torch.Generator().manual_seed(100 * seed + rank))
    if len(mine):
        return make_views.render(mine, plan)
    return tuple(View(mine.new_empty(0, 3, *g.output_size((24, 24))), g[:0], {}) for g in (plan.first, plan.second))


def term_of_rank(here: Here, counts: tuple[int, ...], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    model, views = Model().double(), shard(counts, here.rank, seed)
    loss = model.ser(tokens(model.vit, views), views, here.group).loss
    loss.backward()
    return loss.detach(), gradients(model)


def term_of_all(counts: tuple[int, ...], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One process, and the formula as it reads, over images of different grids."""
    model, projected = Model().double(), ([], [])
    for rank, count in enumerate(counts):
        views = shard(counts, rank, seed)
        if count:
            z1, z2 = tokens(model.vit, views)
            for side, z in zip(projected, (act(relation(*views), z1), z2), strict=True):
                side.extend(model.ser.projector(z.flatten(2).mT))
    loss = dense_ntxent(*projected, temperature=0.3)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_trains_encoder_and_projector_alike(run, world, data):
    counts = data.draw(st.tuples(*[st.integers(0, 5)] * world).filter(lambda counts: sum(counts) > 1))
    seed = data.draw(st.integers(0, 99))
    loss, expected = term_of_all(counts, seed)
    answers = run(world, term_of_rank, counts, seed)
    assert not any(isinstance(answer, Exception) for answer in answers), answers
    torch.testing.assert_close(sum(value for value, _ in answers) / world, loss, rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        found = sum(grads.get(name, torch.zeros_like(gradient)) for _, grads in answers) / world
        torch.testing.assert_close(
            found, gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def with_accumulation(here: Here) -> dict[str, Tensor]:
    """Two micro-batches, the first without synchronisation."""
    wrapped = DistributedDataParallel(Model(), process_group=here.group)
    halves = [batch(4 * micro + 2 * here.rank, 4 * micro + 2 * here.rank + 2) for micro in (0, 1)]
    with wrapped.no_sync():
        (wrapped(*halves[0], here.group) / 2).backward()
    (wrapped(*halves[1], here.group) / 2).backward()
    return gradients(wrapped)


def test_gradient_accumulation_under_ddp(run):
    model = Model()
    ((model(*batch(0, 4)) + model(*batch(4, 8))) / 2).backward()
    for found in run(2, with_accumulation):
        assert not isinstance(found, Exception), found
        assert_same(found, gradients(model), 1e-4)


def with_fsdp(here: Here) -> dict[str, Tensor]:
    """FSDP2: parameters are there only during the forward, where the tap reads the tokens."""
    model = Model()
    mesh = DeviceMesh.from_group(here.group, "cpu")
    for block in model.vit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(*batch(*bounds(here, 2)), here.group).backward()
    return gradients(model)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 runs on CPUs since torch 2.7")
def test_fsdp2(run, eager):
    for found in run(2, with_fsdp):
        assert not isinstance(found, Exception), found
        assert_same(found, eager, 1e-4)


def one_rank_is_wrong(here: Here, wrong: str) -> None:
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 2, DIM, 5, 6, requires_grad=True)
    views = [View(torch.empty(2, 0), GroupElement.identity(2), {}) for _ in range(2)]
    if here.rank == 1:
        z1, z2 = {"nan": (z1, z2 * torch.nan), "grid": (z1, z2.mT), "channels": (z1[:, 1:], z2)}[wrong]
    SERLoss(DIM)([z1, z2], views, here.group)


@pytest.mark.parametrize("wrong", ["nan", "grid", "channels"])
def test_what_is_wrong_on_one_rank_is_raised_on_all(run, wrong):
    for answer in run(2, one_rank_is_wrong, wrong):
        assert isinstance(answer, SERError), answer
        assert "on rank 1" in answer.call


def unwrapped(here: Here, different: bool, calls: int, ahead: int) -> str:
    """A projector that is the same on all ranks for the first `ahead` calls, then another if it is to be different."""
    torch.manual_seed(0)
    ser = SERLoss(DIM, projection_dim=8)
    z = torch.randn(2, 2, DIM, 5, 6, requires_grad=True)
    views = [View(torch.empty(2, 0), GroupElement.identity(2), {}) for _ in range(2)]
    for call in range(calls):
        if call == ahead and different:
            with torch.no_grad():
                next(ser.parameters()).add_(0.01 * here.rank)
        ser(list(z), views, here.group)
    return "no error"


def test_a_term_that_drifts_apart_by_rank_is_found_in_its_first_calls(run):
    assert run(2, unwrapped, False, 5, 0) == ["no error"] * 2
    assert run(2, unwrapped, True, 5, 3) == ["no error"] * 2  # later calls cost nothing
    for ahead in (0, 2):
        for answer in run(2, unwrapped, True, 3, ahead):
            assert isinstance(answer, SERError), answer
            assert "sum of the term's parameters" in answer.given
            assert "DistributedDataParallel(term)" in answer.remedy


def check_on_a_rank(here: Here) -> None:
    check(Model().vit, layer=LAYER)


def test_check_refuses_to_run_on_one_of_several_ranks(run):
    for answer in run(1, check_on_a_rank):
        assert isinstance(answer, SERError), answer
        assert "one of 4 processes" in answer.given


def views_of_rank(here: Here, called: bool) -> list[tuple]:
    """Grids, parities and flips of views that a rank makes, or of those that it draws by itself, from its own
    stream of random numbers."""
    torch.manual_seed(here.rank)
    make_views = EquivariantViews(PATCH)
    made = [make_views(torch.rand(16, 1, 24, 24)) if called else make_views.draw(16, (24, 24)) for _ in range(4)]
    elements = [
        g for first, second, *_ in made for g in ((first.relation, second.relation) if called else (first, second))
    ]
    return [(g.output_size((24, 24)), (g.turns[0] % 2).item(), g.flip.tolist()) for g in elements]


def test_ranks_that_call_share_grids_and_nothing_else(run):
    first, *others = run(4, views_of_rank, True)
    for other in others:
        assert [draw[:2] for draw in other] == [draw[:2] for draw in first]
        assert all(mine[2] != theirs[2] for mine, theirs in zip(other, first, strict=True))
    first, *others = run(4, views_of_rank, False)
    assert all([draw[:2] for draw in other] != [draw[:2] for draw in first] for other in others)
