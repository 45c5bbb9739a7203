"""The reference trainings inside one process: losses, schedules, initialisation, SER beside them, wrong settings."""

import json
import math
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

pytest.importorskip("accelerate")
pytest.importorskip("braceexpand")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tyro")

import barlow_twins
import dino
import moco_v3
import timm
from accelerate.state import AcceleratorState
from PIL import Image
from pretraining import checkpoints, loop, monitor
from pretraining.dataset import ViewDataset, collate
from pretraining.encoder import build_encoder, trainable
from pretraining.geometry import Geometry
from pretraining.loop import build_objective, synchronise
from pretraining.monitor import Collapse
from pretraining.optimizer import build_optimizer, clip, set_rates
from pretraining.partition import PartitionSampler, whole_images
from pretraining.policies import policies
from pretraining.schedules import Moment, cosine, ramp, warm_cosine
from pretraining.sources import open_source
from pretraining_jobs import GRADIENTS, METHODS, parsed, train_job

from ser_reg import SERError, cls_layer, late_cls, load_encoder, patch_tokens

SCRIPTS = {"moco_v3": moco_v3, "dino": dino, "barlow_twins": barlow_twins}
CPU = torch.device("cpu")
TIMES = {"images_per_second", "data_wait"}
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    """A training takes the GPU if there is one, and SIGTERM for itself."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def lines(folder, without=TIMES):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in found]


def loader(settings, base):
    """Views of one batch after another, as the loop has them in one process without workers."""
    whole = whole_images(settings.batch_size, settings.partition_ratio, 1)
    source = open_source(settings.data, "train", settings.seed)
    area = (settings.crop_min, 1.0)
    views = policies(base, settings.image_size, area, settings.local_size, settings.local_views, blur=settings.blur)
    data = ViewDataset(source, *views)
    geometry = Geometry(settings, settings.patch_size, whole, 0, 1, CPU)
    sampler = PartitionSampler(len(source), settings.batch_size, whole, seed=settings.seed, last=settings.steps)
    for number, requests in enumerate(sampler):
        yield geometry(collate([data[request] for request in requests]), number)


# The losses, against loops over their formulas


def literal_contrast(queries, keys, tau, first=0):
    """Algorithm 1 of MoCo-v3: `keys` are those of all processes, that of query i is number first + i."""
    total = 0.0
    for i, q in enumerate(queries.double()):
        similarities = [float(q @ k / q.norm() / k.norm() / tau) for k in keys.double()]
        total -= similarities[first + i] - math.log(sum(math.exp(s) for s in similarities))
    return 2 * tau * total / len(queries)


def test_contrastive_loss_is_its_formula():
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 12, 7, generator=draw)
    keys.requires_grad_()
    loss = moco_v3.contrastive_loss(queries.requires_grad_(), keys, 0.2)
    assert loss.item() == pytest.approx(literal_contrast(queries.detach(), keys.detach(), 0.2), rel=1e-5)
    loss.backward()
    assert queries.grad is not None
    assert keys.grad is None


@pytest.mark.parametrize("rank", range(4))
def test_each_rank_finds_its_keys_among_those_of_all(monkeypatch, rank):
    queries, keys = torch.randn(3, 7), torch.randn(12, 7)
    monkeypatch.setattr(moco_v3, "place", lambda: (rank, 4))
    monkeypatch.setattr(moco_v3, "everyone", lambda mine: F.normalize(keys, dim=1))
    loss = moco_v3.contrastive_loss(queries, keys[3 * rank : 3 * rank + 3], 0.2)
    assert loss.item() == pytest.approx(literal_contrast(queries, keys, 0.2, first=3 * rank), rel=1e-5)


def test_moco_is_the_sum_of_both_directions_without_gradient_for_the_momentum_branch():
    encoder = nn.Linear(3, 6)
    method = moco_v3.MoCoV3(encoder, dim=6, hidden=8, out=5, temperature=0.3)
    x1, x2 = torch.randn(2, 7, 3)
    with torch.no_grad():
        q1, q2 = (method.predictor(method.projector(encoder(x))) for x in (x1, x2))
        k1, k2 = (method.target_projector(method.target(x)) for x in (x1, x2))
    loss = method([encoder(x1), encoder(x2)], [method.target(x1), method.target(x2)])
    assert loss.item() == pytest.approx(literal_contrast(q1, k2, 0.3) + literal_contrast(q2, k1, 0.3), rel=1e-5)
    loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target"), name


def test_local_views_of_moco_find_both_global_views_with_the_same_total_weight():
    method = moco_v3.MoCoV3(nn.Identity(), dim=6, hidden=8, out=5)
    embeddings = [torch.randn(7, 6) for _ in range(4)]
    q = [method.predictor(method.projector(e)).detach() for e in embeddings]
    k = [method.target_projector(e).detach() for e in embeddings[:2]]
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    expected = 2 * sum(literal_contrast(q[i], k[j], 0.2) for i, j in pairs) / 6
    assert method(embeddings, embeddings[:2]).item() == pytest.approx(expected, rel=1e-5)


def literal_distillation(students, teachers, center, student_temperature, teacher_temperature):
    """Equation 3 of DINO: mean over pairs of a teacher's view and another view of the student."""
    losses = []
    for v, teacher in enumerate(teachers):
        target = [torch.softmax((t - center) / teacher_temperature, 0) for t in teacher.double()]
        for w, student in enumerate(students):
            if v != w:
                logs = [torch.log_softmax(s / student_temperature, 0) for s in student.double()]
                losses += [-float((p * q).sum()) for p, q in zip(target, logs, strict=True)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("views", [2, 5])
def test_dino_is_its_formula_and_its_center_moves_after_use(views):
    settings = replace(dino.PRESETS["small"], prototypes=12, teacher_temperature=0.06, student_temperature=0.2)
    method = dino.DINO(nn.Linear(3, 6), dino.DINOHead(6, 8, 5, 12, norm_last_layer=True), settings)
    method.before_step(Moment(0, 10, 10))
    with torch.no_grad():  # else teacher and student say the same
        method.target_head.mlp[4].bias.add_(torch.randn(5))
    center = torch.zeros(12, dtype=torch.float64)
    for _ in range(3):
        embeddings = [torch.randn(7, 6) for _ in range(views)]
        students = [method.head(e).detach() for e in embeddings]
        teachers = [method.target_head(e) for e in embeddings[:2]]
        expected = literal_distillation(students, teachers, center, 0.2, 0.06)
        assert method(embeddings, embeddings[:2]).item() == pytest.approx(expected, rel=1e-4)
        batch = sum(row for teacher in teachers for row in teacher.double()) / 14
        center = 0.9 * center + 0.1 * batch
        close(method.center[0].double(), center, rtol=1e-4, atol=1e-7)
        assert center.abs().max() > 1e-3


def test_prototypes_are_unit_vectors_that_stay_so_unless_told_otherwise():
    for fixed in (True, False):
        head = dino.DINOHead(6, 8, 5, 12, norm_last_layer=fixed)
        close(head.last.weight.norm(dim=1), torch.ones(12))
        length = head.last.parametrizations.weight.original0
        assert length.requires_grad is not fixed
        assert all((layer.bias == 0).all() for layer in head.mlp[::2])
        assert head.last.bias is None
        assert (head(torch.randn(4, 6)).abs() <= 1 + 1e-6).all()  # cosines: unit vectors on both sides


def literal_redundancy(z1, z2, weight):
    """Equations 1 and 2 of Barlow Twins on projections that are normalised over the batch."""
    n, dim = z1.shape
    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            correlation = sum(float(z1[b, i] * z2[b, j]) for b in range(n)) / n
            loss += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return loss


def test_redundancy_loss_is_its_formula():
    """Over several processes test_pretraining_runs.py compares the loss and its gradient with those of one."""
    z1, z2 = torch.randn(2, 8, 5)
    expected = literal_redundancy(z1.double(), z2.double(), 0.1)
    assert barlow_twins.redundancy_loss(z1, z2, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_barlow_twins_compares_pairs_with_a_global_view_after_one_batch_norm():
    method = barlow_twins.BarlowTwins(nn.Identity(), dim=6, hidden=8, off_diagonal=0.1)
    embeddings = [torch.randn(7, 6) for _ in range(4)]
    z = []
    for e in embeddings:
        projected = method.projector(e).detach().double()
        deviation = (projected.var(0, correction=0) + 1e-5).sqrt()
        z.append((projected - projected.mean(0)) / deviation)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = sum(literal_redundancy(z[i], z[j], 0.1) for i, j in pairs) / 5
    assert method(embeddings, []).item() == pytest.approx(expected, rel=1e-4)


# Schedules


def test_cosine_and_warm_up_at_their_ends():
    assert cosine(0, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine(0.5, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine(1, 0.04, 0.4) == 0.4
    moments = [Moment(step, 100, 100) for step in range(101)]
    rates = [warm_cosine(moment, 10, 2.0, 0.5) for moment in moments]
    assert (rates[0], rates[5], rates[10]) == (0, 1, 2)
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert warm_cosine(Moment(0, 100, 100), 0, 2.0, 0.5) == 2


def test_teacher_temperature_grows_by_epochs_as_in_the_official_release():
    # numpy.linspace(0.04, 0.07, 4), held within an epoch
    found = [ramp(epoch, 4, 0.04, 0.07) for epoch in (0, 0.99, 1, 2.5, 3, 4, 9)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert ramp(0, 0, 0.04, 0.07) == 0.07
    assert ramp(0, 1, 0.04, 0.07) == 0.04
    settings = replace(dino.PRESETS["small"], teacher_warmup_epochs=4, teacher_temperature=0.07)
    method = dino.DINO(nn.Identity(), dino.DINOHead(6, 8, 5, settings.prototypes, True), settings)
    method.before_step(Moment(step=25, steps=100, epochs=10))
    assert method.teacher_temperature == pytest.approx(0.06)


@pytest.mark.parametrize("method", METHODS)
def test_recipe_of_the_paper(method):
    """Section 4.1 and the official releases, at batch 2048: rate and decay at the start, the peak, and the end."""
    settings = SCRIPTS[method].PRESETS["paper"]
    peak, end, decay, last_decay = {
        "moco_v3": (1.2e-3, 0, 0.1, 0.1),
        "dino": (4e-3, 1e-6, 0.04, 0.4),
        "barlow_twins": (8e-4, 8e-7, 0.1, 0.1),
    }[method]
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(module, settings)
    matrices, vectors = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    assert matrices["betas"] == (0.9, 0.999)
    for epoch, rate, part in ((0, 0, 0), (10, peak, 0.1), (100, end, 1)):
        assert set_rates(optimizer, settings, Moment(epoch * 625, 62500, 100)) == pytest.approx(rate)
        assert matrices["lr"] == vectors["lr"] == pytest.approx(rate)
        expected = last_decay + 0.5 * (1 + math.cos(math.pi * part)) * (decay - last_decay)
        assert matrices["weight_decay"] == pytest.approx(expected)
        assert vectors["weight_decay"] == (0 if method == "dino" else pytest.approx(expected))
    assert settings.clip == {"moco_v3": None, "dino": 3.0, "barlow_twins": 0.3}[method]
    assert (settings.batch_size, settings.epochs, settings.warmup_epochs) == (2048, 100, 10)
    assert settings.ser_temperature == (0.5 if method == "dino" else 0.3)
    assert (settings.ser_lambda, settings.partition_ratio, settings.layer) == (0.5, 0.01, 3)


@pytest.mark.parametrize(("method", "start"), [("moco_v3", 0.99), ("dino", 0.996)])
def test_momentum_branch_follows_along_a_cosine_to_one(method, start):
    settings = replace(SCRIPTS[method].PRESETS["paper"], hidden=8)
    if method == "moco_v3":
        made = moco_v3.MoCoV3(nn.Linear(3, 4), 4, 8, 5, momentum=settings.momentum)
        follow = made.before_step  # ahead of the keys
    else:
        made = dino.DINO(nn.Linear(3, 4), dino.DINOHead(4, 8, 5, 6, True), replace(settings, prototypes=6))
        follow = made.after_update  # after the optimiser
    for step, momentum in ((0, start), (50, (1 + start) / 2), (100, 1.0)):
        slow = [p.clone() for p in made.target.parameters()]
        with torch.no_grad():
            for p in made.encoder.parameters():
                p.add_(1)
        fast = [p.clone() for p in made.encoder.parameters()]
        follow(Moment(step, 100, 100))
        for was, source, now in zip(slow, fast, made.target.parameters(), strict=True):
            close(now, momentum * was + (1 - momentum) * source)
    assert not any(p.requires_grad for p in made.target.parameters())


# Optimisation


def test_gradients_are_shortened_parameter_by_parameter():
    long, short, none = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    long.grad, short.grad = torch.full((4,), 3.0), torch.full((4,), 0.1)
    clip([long, short, none], 3.0)
    close(long.grad, torch.full((4,), 1.5))
    close(short.grad, torch.full((4,), 0.1))


def test_last_layer_learns_after_its_epochs():
    settings = replace(dino.PRESETS["small"], prototypes=12)
    method = dino.DINO(nn.Identity(), dino.DINOHead(6, 8, 5, 12, norm_last_layer=False), settings)
    for epoch, frozen in ((0, True), (0.99, True), (1, False)):
        embeddings = list(torch.randn(2, 4, 6))
        method.zero_grad()
        method(embeddings, embeddings).backward()
        method.before_update(Moment(int(epoch * 100), 1000, 10))
        assert all((p.grad is None) == frozen for p in method.head.last.parameters())
        assert all(p.grad is not None for p in method.head.mlp.parameters())


def test_lars_is_the_official_recipe_of_barlow_twins():
    settings = replace(barlow_twins.PRESETS["official"], warmup_epochs=0, weight_decay=1e-3)
    assert settings.learning_rate * settings.batch_size / 256 == pytest.approx(1.6)
    assert settings.final_learning_rate == pytest.approx(1.6e-3)
    module = nn.Linear(5, 4).double()
    optimizer = build_optimizer(module, settings)
    twins = [p.detach().clone() for p in module.parameters()]
    speeds = [torch.zeros_like(p) for p in twins]
    for step in range(4):
        rate = set_rates(optimizer, settings, Moment(step, 4, 1000))
        for i, p in enumerate(module.parameters()):
            p.grad = torch.randn_like(p)
            update = p.grad.clone()
            if p.ndim > 1:
                update += 1e-3 * twins[i]
                update *= 0.001 * twins[i].norm() / update.norm()
            speeds[i] = 0.9 * speeds[i] + update
            twins[i] = twins[i] - (rate if p.ndim > 1 else 0.0048 / 0.2 * rate) * speeds[i]
        optimizer.step()
    for p, twin in zip(module.parameters(), twins, strict=True):
        close(p.detach(), twin, rtol=1e-4, atol=1e-6)  # timm adds norms where official LARS takes that of the sum


def test_every_trained_parameter_is_in_one_group_and_moves():
    for method in METHODS:
        objective = build_objective(parsed(method), SCRIPTS[method].build)
        optimizer = build_optimizer(objective, parsed(method))
        counts = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
        assert counts == {id(p): 1 for p in objective.parameters() if p.requires_grad}
        objective(next(loader(parsed(method), method)))["loss"].backward()
        for name, p in objective.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name


# MoCo-v3 as its official release builds it


@pytest.fixture(scope="module")
def paper_moco():
    torch.manual_seed(0)
    return build_objective(moco_v3.PRESETS["paper"], moco_v3.build)


def test_official_initialisation_of_moco(paper_moco):
    method = paper_moco.method
    for vit in (method.encoder, method.target):
        assert {block.attn.num_heads for block in vit.blocks} == {12}
        assert vit.pos_embed.shape == (1, 197, 384)
        assert not vit.pos_embed.requires_grad
        assert (vit.pos_embed[0, 0] == 0).all()
        projection = vit.patch_embed.proj
        assert not projection.weight.requires_grad
        assert not projection.bias.requires_grad
        assert (projection.bias == 0).all()
        assert projection.weight.std().item() == pytest.approx(0.0417, abs=1e-4)
        assert projection.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (3 * 16 * 16 + 384)), rel=1e-3)
        assert cls_layer(vit) == 3
        assert vit.cls_token.std().item() < 3e-6
        assert {norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
        for block in vit.blocks:
            assert block.attn.qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (384 + 384)), rel=1e-2)
            assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (384 + 1536)), rel=1e-2)
            assert all((layer.bias == 0).all() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1))
    for name, parameter in method.target.named_parameters():
        assert torch.equal(parameter, method.encoder.get_parameter(name))


def test_positions_of_moco_are_sines_and_cosines_of_rows_and_columns(paper_moco):
    waves = 10000 ** -(torch.arange(96).double() / 96)
    row, column = torch.meshgrid(torch.arange(14).double(), torch.arange(14).double(), indexing="ij")
    columns = [f(axis.flatten()[:, None] * waves) for axis in (row, column) for f in (torch.sin, torch.cos)]
    expected = torch.cat(columns, dim=1)  # (196, 384), in the order of the release; timm has another one of channels
    found = paper_moco.method.encoder.pos_embed[0, 1:].double()
    distance = torch.cdist(expected.T, found.T)
    nearest = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-4
    assert len(set(nearest.tolist())) == 384


def test_heads_of_moco_have_no_bias_and_end_without_scale(paper_moco):
    method = paper_moco.method

    def described(head):
        return [
            (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else type(layer).__name__
            for layer in head
        ]

    inner = ["BatchNorm1d", "ReLU"]
    projector = [(384, 4096), *inner, (4096, 4096), *inner, (4096, 256), "BatchNorm1d"]
    assert described(method.projector) == described(method.target_projector) == projector
    assert described(method.predictor) == [(256, 4096), *inner, (4096, 256), "BatchNorm1d"]
    for head in (method.projector, method.predictor, method.target_projector):
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        assert [norm.affine for norm in norms] == [True] * (len(norms) - 1) + [False]
    assert not [name for name, _ in method.named_children() if "target" in name and "predictor" in name]


def test_parameters_of_the_paper(paper_moco):
    """Table 1: 42.9 M, with SER 43.4 M. They count positions, which the paper's code learns and the official release of
    MoCo-v3 fixes; the 0.46 M of SER are the projector and its layer norm."""
    fixed = paper_moco.method.encoder.pos_embed.numel()
    assert fixed == 197 * 384
    assert f"{(trainable(paper_moco.method) + fixed) / 1e6:.1f}" == "42.9"
    assert f"{(trainable(paper_moco) + fixed) / 1e6:.1f}" == "43.4"
    assert trainable(paper_moco) - trainable(paper_moco.method) == 384 * 512 + 512 * 512 + 2 * 384
    released = moco_v3.PRESETS["released"]
    assert trainable(build_encoder(released)) == trainable(paper_moco.method.encoder) + fixed


def test_released_preset_keeps_pytorchs_patch_projection_frozen():
    projection = build_encoder(moco_v3.PRESETS["released"]).patch_embed.proj
    assert projection.weight.std().item() == pytest.approx(0.0208, abs=1e-4)
    assert not projection.weight.requires_grad
    assert projection.bias.abs().max() > 0


def test_dropped_paths_are_the_students_alone():
    method = dino.build(parsed("dino", ["--drop-path", 0.5]))
    vits = (method.encoder, method.target)
    rates = [[part.drop_prob for part in vit.modules() if hasattr(part, "drop_prob")] for vit in vits]
    assert max(rates[0]) == 0.5
    assert max(rates[1]) == 0


def test_batch_statistics_are_those_of_all_processes_on_gpus():
    """`nn.SyncBatchNorm` needs a GPU to run; that it is put in place can be seen without."""
    for method in ("moco_v3", "barlow_twins"):
        kinds = {}
        for device in ("cpu", "cuda"):
            objective = build_objective(parsed(method), SCRIPTS[method].build)
            done = synchronise(objective, 2, torch.device(device))
            kinds[device] = Counter(
                type(part).__name__ for part in done.modules() if "BatchNorm" in type(part).__name__
            )
        assert set(kinds["cpu"]) == {"BatchNorm1d"}
        assert set(kinds["cuda"]) == {"SyncBatchNorm"}
        assert kinds["cpu"].total() == kinds["cuda"].total()
        alone = synchronise(build_objective(parsed(method), SCRIPTS[method].build), 1, torch.device("cuda"))
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in alone.modules())


# Lambda, and what stands beside it


def plain_moco(settings, vit):
    """MoCo-v3 as if SER had never been written: losses of its steps."""
    torch.manual_seed(settings.seed)
    vit = vit()
    method = moco_v3.MoCoV3(vit, settings.width, settings.hidden, settings.out)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=settings.weight_decay)
    losses = []
    for step, views in enumerate(loader(settings, "moco_v3")):
        progress = step / settings.steps
        for group in optimizer.param_groups:  # no warm-up
            group["lr"] = settings.learning_rate * settings.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * progress))
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - settings.momentum)
        with torch.no_grad():
            for slow, fast in ((method.target, vit), (method.target_projector, method.projector)):
                for k, q in zip(slow.parameters(), fast.parameters(), strict=True):
                    k.lerp_(q, 1 - momentum)
        crops = torch.cat(views.crops)
        halves = vit(crops).chunk(2)
        with torch.no_grad():
            slow_halves = method.target(crops).chunk(2)
        if views.whole:
            pair = views.whole[0]
            halves = [torch.cat([vit(x), half]) for x, half in zip((pair.x1, pair.x2), halves, strict=True)]
            with torch.no_grad():
                slow_halves = [
                    torch.cat([method.target(x), half]) for x, half in zip((pair.x1, pair.x2), slow_halves, strict=True)
                ]
        q1, q2 = (method.predictor(method.projector(half)) for half in halves)
        with torch.no_grad():
            k1, k2 = (method.target_projector(half) for half in slow_halves)
        loss = moco_v3.contrastive_loss(q1, k2, 0.2) + moco_v3.contrastive_loss(q2, k1, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, method


def tiny_vit(settings):
    """The encoder written down without the project's own builder; [CLS] joins early."""
    vit = timm.create_model(
        settings.architecture,
        num_classes=0,
        img_size=32,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        dynamic_img_size=True,
        weight_init="moco",
    )
    with torch.no_grad():
        vit.pos_embed.zero_()[0, 1:] = timm.layers.build_sincos2d_pos_embed((8, 8), 24)
        bound = math.sqrt(6 / (3 * 4 * 4 + 24))
        vit.patch_embed.proj.weight.uniform_(-bound, bound)
        vit.patch_embed.proj.bias.zero_()
    for p in (vit.pos_embed, *vit.patch_embed.proj.parameters()):
        p.requires_grad_(False)
    return vit


@pytest.mark.parametrize(("flag", "layer"), [("--ser-lambda", 2), ("--partition-ratio", 0)])
def test_without_ser_a_training_is_the_base_method_bit_for_bit(tmp_path, monkeypatch, flag, layer):
    """λ = 0 keeps b2 and late [CLS]; r = 0 is the plain base method around plain timm."""

    def built(*args, **kwargs):
        raise AssertionError("SER was built though it is not wanted")

    monkeypatch.setattr(loop, "SoftEquivariance", built)
    flags = [flag, 0, "--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags)
    settings = parsed("moco_v3", flags)
    losses, method = plain_moco(settings, lambda: late_cls(tiny_vit(settings), layer))
    assert [line["loss"] for line in lines(tmp_path / "run")] == losses
    assert len(set(losses)) == 3
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in method.state_dict().items():
        assert torch.equal(kept[f"method.{name}"], value), name


@pytest.mark.parametrize("method", METHODS)
def test_first_step_has_the_controls_base_loss(tmp_path, method):
    for name, flags in (("ser", ["--steps", 2]), ("control", ["--steps", 2, "--ser-lambda", 0])):
        train_job(method, [*flags, "--output-dir", tmp_path / name])
    ser, control = lines(tmp_path / "ser"), lines(tmp_path / "control")
    assert ser[0]["base"] == control[0]["base"] == control[0]["loss"]
    assert ser[1]["base"] != control[1]["base"]
    assert ser[0]["loss"] == pytest.approx(ser[0]["base"] + 0.5 * ser[0]["ser"])
    assert set(ser[0]) - set(control[0]) == {"ser", "ser_chance", "ser_accuracy", "ser_feature_std"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["online", "momentum"])
def test_gradient_of_ser_reaches_its_projector_and_the_blocks_ahead_of_its_layer_and_no_others(method, target):
    if (method, target) == ("barlow_twins", "momentum"):
        pytest.skip("no momentum encoder")
    settings = parsed(method, ["--ser-target", target, "--drop-path", 0, "--layer", 2, "--depth", 4])
    views = next(loader(settings, method))
    gradients = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        objective = build_objective(settings, SCRIPTS[method].build)
        objective.weight = weight
        scalars = objective(views)
        scalars["loss"].backward()
        gradients.append({name: p.grad for name, p in objective.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    reached = {name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])}
    early = ("regularizer.", "method.encoder.blocks.0.", "method.encoder.blocks.1.", "method.encoder.pos_embed")
    expected = {name for name in gradients[0] if name.startswith((*early, "method.encoder.patch_embed"))}
    # A bias of the keys shifts all logits of a softmax alike: its gradient is rounding alone, which may be the same.
    assert expected - reached <= {name for name in expected if name.endswith("qkv.bias")}
    assert reached <= expected, reached - expected
    assert all(gradients[0][name].abs().max() == 0 for name in expected if name.startswith("regularizer."))
    assert all(gradients[1][name].abs().max() > 0 for name in expected if name.startswith("regularizer."))


def test_momentum_target_compares_each_trained_view_with_the_other_slow_view():
    settings = parsed("moco_v3", ["--ser-target", "momentum", "--depth", 4])
    objective = build_objective(settings, moco_v3.build).eval()
    with torch.no_grad():
        for p in objective.method.target.parameters():
            p.add_(0.05 * torch.randn_like(p))
    views = next(loader(settings, "moco_v3"))
    (pair,) = views.whole
    fast, slow = objective.method.encoder, objective.method.target
    term = objective.regularizer.losses[0]
    one = term(patch_tokens(fast, pair.x1, 2), patch_tokens(slow, pair.x2, 2), pair.g2 @ ~pair.g1).loss
    two = term(patch_tokens(fast, pair.x2, 2), patch_tokens(slow, pair.x1, 2), pair.g1 @ ~pair.g2).loss
    close(objective(views)["ser"], (one + two).detach() / 2)


def test_all_layers_have_projectors_of_their_own_and_their_mean():
    settings = parsed("dino", ["--all-layers"])
    objective = build_objective(settings, dino.build).eval()
    views = next(loader(settings, "dino"))
    (pair,) = views.whole
    vit = objective.method.encoder
    losses = [
        term(patch_tokens(vit, pair.x1, layer), patch_tokens(vit, pair.x2, layer), pair.relative).loss
        for layer, term in enumerate(objective.regularizer.losses, start=1)
    ]
    assert len(losses) == 3
    close(objective(views)["ser"], torch.stack(losses).mean().detach())


def test_embeddings_of_all_views_are_those_of_the_encoder_alone():
    """One forward for all crops of a size, whatever order and size they have; b2 first."""
    settings = parsed("barlow_twins", ["--local-views", 4])
    objective = build_objective(settings, barlow_twins.build).eval()
    views = next(loader(settings, "barlow_twins"))
    seen = []
    objective.method.register_forward_pre_hook(lambda method, args: seen.extend(args[0]))
    objective(views)
    wholes = [x for pair in views.whole for x in (pair.x1, pair.x2)]
    assert [crop.shape[-1] for crop in views.crops] == [32, 32, 16, 16, 16, 16]
    assert len(seen) == len(views.crops) == len(wholes) == 6
    vit = objective.method.encoder
    for found, whole, crop in zip(seen, wholes, views.crops, strict=True):
        close(found, torch.cat([vit(whole), vit(crop)]), rtol=1e-4, atol=1e-5)


def test_local_views_never_go_through_the_momentum_encoder():
    objective = build_objective(parsed("dino", ["--local-views", 4]), dino.build)
    sizes = []
    objective.method.target.register_forward_pre_hook(lambda vit, args: sizes.append(args[0].shape[0]))
    objective(next(loader(parsed("dino", ["--local-views", 4]), "dino")))
    assert sorted(sizes) == [4, 4, 24]  # the whole images of both global views, and their 2 x 12 crops


# Stop and go on


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("moco_v3", []),
        ("dino", ["--drop-path", 0.3, "--epochs", 2, "--teacher-warmup-epochs", 2]),
        ("dino", ["--precision", "fp16", "--accumulate", 2]),
        ("barlow_twins", ["--local-views", 4, "--workers", 1]),
        ("barlow_twins", ["--optimizer", "lars", "--learning-rate", 0.2]),
    ],
)
def test_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, method, more):
    flags = ["--steps", 6, *more]  # DINO's last layer learns from the third of two epochs' six steps on
    whole, parts = [*flags, "--output-dir", tmp_path / "whole"], [*flags, "--output-dir", tmp_path / "parts"]
    train_job(method, whole)
    train_job(method, parts, stop_after=2)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [0, 1]
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert load_encoder(str(tmp_path / "parts" / "encoder"))
    train_job(method, parts, stop_after=5)
    train_job(method, parts)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    ours, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("parts", "whole"))
    assert ours["model"].keys() == other["model"].keys()
    for name, value in ours["model"].items():
        assert torch.equal(value, other["model"][name]), name
    before = (tmp_path / "parts" / "metrics.jsonl").read_text()
    train_job(method, parts)  # nothing is left to do
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == before


def test_lines_after_the_checkpoint_and_a_line_that_was_cut_off_are_dropped(tmp_path):
    flags = ["--steps", 4, "--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags, stop_after=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    train_job("moco_v3", flags)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2, 3]


def test_only_whole_checkpoints_are_picked_up(tmp_path):
    flags = ["--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags, stop_after=2)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    stale = path.with_name(".123-checkpoint.pt")
    stale.write_bytes(whole[: len(whole) // 2])
    train_job("moco_v3", flags)
    assert len(lines(tmp_path / "run")) == 3
    assert not stale.exists()
    for part in (b"", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(SERError, match="a whole checkpoint") as error:
            train_job("moco_v3", flags)
        assert error.value.remedy.startswith(f"--resume never --output-dir {tmp_path / 'run'}")
        assert path.read_bytes() == part
    train_job("moco_v3", [*flags, "--resume", "never"])
    assert len(lines(tmp_path / "run")) == 3


def test_resume_with_other_settings_is_refused(tmp_path):
    flags = ["--output-dir", tmp_path / "run"]
    train_job("dino", flags, stop_after=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(SERError, match="the same settings") as error:
        train_job("dino", [*flags, "--ser-lambda", 0.25, "--center-momentum", 0.8])
    assert error.value.remedy.startswith(f"--output-dir {tmp_path / 'run'}_2")
    assert error.value.given == "center_momentum=0.9 there and 0.8 here, ser_lambda=0.5 there and 0.25 here"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    train_job("dino", [*flags, "--log-every", 2, "--checkpoint-minutes", 1])  # these may differ
    assert len(lines(tmp_path / "run")) == 3


def test_a_run_that_starts_anew_leaves_no_checkpoint_of_the_one_before(tmp_path):
    """Else the next run after a kill would go on from there."""
    flags = ["--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags)

    def die(moment):
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job("moco_v3", [*flags, "--resume", "never"], each_step=die)


def test_checkpoint_is_restored_into_an_optimizer_that_has_stepped(tmp_path):
    settings = parsed("moco_v3")
    objective = build_objective(settings, moco_v3.build)
    optimizer = build_optimizer(objective, settings)
    set_rates(optimizer, settings, Moment(0, 3, 5))
    objective(next(loader(settings, "moco_v3")))["loss"].backward()
    optimizer.step()
    checkpoints.save(tmp_path, objective, optimizer, None, settings, 1, is_main=True)
    other = build_objective(settings, moco_v3.build)
    fresh = build_optimizer(other, settings)
    assert checkpoints.restore(checkpoints.saved(tmp_path, settings), other, fresh, None) == 1
    for (name, value), restored in zip(objective.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, restored), name
    for group, restored in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        names = ("lr", "weight_decay", "decays", "factor")
        assert [group[name] for name in names] == [restored[name] for name in names]
        for p, q in zip(group["params"], restored["params"], strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], fresh.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("method", METHODS)
def test_exported_encoder_is_the_trained_one(tmp_path, method):
    train_job(method, ["--output-dir", tmp_path / "run", "--layer", 2])
    folder = tmp_path / "run" / "encoder"
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    vit = load_encoder(str(folder))
    assert (cls_layer(vit), cls_layer(plain)) == (2, 0)
    branch = "target" if method == "dino" else "encoder"
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    weights = {k.removeprefix(f"method.{branch}."): v for k, v in kept["model"].items()}
    trained = build_encoder(parsed(method)).eval()
    trained.load_state_dict({k: v for k, v in weights.items() if k in trained.state_dict()})
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(vit(images), trained(images))
    assert torch.equal(late_cls(plain, 2)(images), trained(images))
    untrained = build_encoder(parsed(method)).eval()
    assert not torch.equal(vit(images), untrained(images))
    recorded = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert recorded["method"] == method
    assert recorded["settings"] == parsed(method, ["--output-dir", tmp_path / "run"]).plain() == kept["settings"]


# Other encoders, and other ways of training


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("moco_v3", ["--architecture", "deit3_small_patch16_224"]),
        ("moco_v3", ["--architecture", "vit_small_patch14_reg4_dinov2"]),
        ("moco_v3", ["--architecture", "eva02_tiny_patch14_224", "--initialisation", "timm"]),
        ("dino", ["--architecture", "vit_small_patch16_dinov3"]),
        ("dino", ["--no-dynamic-size", "--scale", 1, 1, "--aspect", 1, 1]),
        ("dino", ["--precision", "bf16", "--cls-layer", 0]),
        ("dino", ["--partition-ratio", 1, "--local-views", 4]),
        ("barlow_twins", ["--accumulate", 2, "--tracker", "tensorboard"]),
    ],
)
def test_trains_and_exports(tmp_path, method, flags):
    if "tensorboard" in flags:
        pytest.importorskip("tensorboard")
    folder = tmp_path / "with space" / "run"
    train_job(method, [*flags, "--output-dir", folder])
    found = lines(folder)
    assert all(math.isfinite(line["loss"]) for line in found)
    assert len({line["loss"] for line in found}) == 3
    assert load_encoder(str(folder / "encoder"))(torch.randn(2, 3, 32, 32)).shape == (2, 24)


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path):
    flags = ["--drop-path", 0.3]
    for name, more in (("plain", []), ("less", ["--gradient-checkpointing"]), ("workers", ["--workers", 2])):
        train_job("dino", [*flags, *more, "--output-dir", tmp_path / name])
    assert lines(tmp_path / "workers") == lines(tmp_path / "plain")
    for line, other in zip(lines(tmp_path / "less"), lines(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_seeds_give_other_runs_and_the_same_seed_the_same(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_job("dino", ["--seed", seed, "--drop-path", 0.3, "--output-dir", tmp_path / name])
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert all(x["loss"] != y["loss"] for x, y in zip(lines(tmp_path / "a"), lines(tmp_path / "c"), strict=True))


def test_gradient_of_accumulated_parts_is_that_of_the_mean_of_their_losses(tmp_path):
    flags = ["--drop-path", 0, "--clip", None]
    train_job("dino", [*flags, "--accumulate", 2, "--output-dir", tmp_path / "run"], gradients=True)
    settings = parsed("dino", [*flags, "--batch-size", 8])
    torch.manual_seed(0)
    objective = build_objective(settings, dino.build)
    views = loader(settings, "dino")
    losses = [objective(next(views))["loss"] for _ in range(2)]
    (sum(losses) / 2).backward()
    found = torch.load(tmp_path / "run" / GRADIENTS, weights_only=True)
    for name, gradient in found.items():
        close(gradient, objective.method.get_parameter(name).grad)
    assert len(found) > 30


def test_non_finite_loss_ends_the_training_with_what_to_type(tmp_path):
    for more in ([], ["--ser-lambda", 0]):
        with pytest.raises(SERError, match="a finite loss") as error:
            train_job("moco_v3", ["--steps", 8, "--learning-rate", 1e6, *more, "--output-dir", tmp_path / "run"])
        assert "at step" in error.value.given
        assert error.value.remedy.startswith(f"--output-dir {tmp_path / 'run'}_2 --learning-rate 500000 ")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


# Folders of one's own


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(shade))
    Image.fromarray(noise.numpy()).save(path)


def test_unlabelled_folder_trains_without_knn(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "data" / f"{i}.png", i)
    train_job("dino", ["--data", tmp_path / "data", "--knn-every", 1, "--output-dir", tmp_path / "run"])
    assert "no k-NN" in capsys.readouterr().out
    assert "knn" not in lines(tmp_path / "run")[-1]


def test_folder_of_one_class_has_knn(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "data" / "train" / "only" / f"{i}.png", i)
        picture(tmp_path / "data" / "val" / "only" / f"{i}.png", 100 + i)
    train_job("dino", ["--data", tmp_path / "data", "--knn-every", 1, "--output-dir", tmp_path / "run"])
    assert [line.get("knn") for line in lines(tmp_path / "run")] == [1.0, 1.0, 1.0]
    assert "k-NN 100.0 %" in capsys.readouterr().out


def test_unreadable_images_are_counted_and_named_once(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "data" / f"{i:02}.png", i)
    broken = [tmp_path / "data" / f"{i:02}.png" for i in (3, 4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    flags = ["--data", tmp_path / "data", "--steps", 6, "--output-dir", tmp_path / "run"]
    train_job("dino", flags, stop_after=3)
    train_job("dino", flags)
    assert sorted((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == list(map(str, broken))
    assert "2 images could not be read" in capsys.readouterr().out


# Along the way


class Places:
    """A source whose image i is grey level i, of class i."""

    def __init__(self, n):
        self.classes = [str(i) for i in range(n)]

    def __len__(self):
        return len(self.classes)

    def image(self, i):
        return Image.new("RGB", (8, 8), (i, i, i))

    def label(self, i):
        return i

    def name(self, i):
        return str(i)


@pytest.mark.parametrize(("images", "ranks"), [(7, 3), (2, 4), (6, 2), (5, 1)])
def test_each_image_is_embedded_once_in_equally_many_forwards(images, ranks, monkeypatch):
    """A sharded encoder waits for the forwards of all processes, so that one more on some of them hangs."""
    monkeypatch.setattr(monitor, "DataLoader", lambda data, **_: torch.utils.data.DataLoader(data, batch_size=1))
    encoder = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(1))
    gathered = []
    for rank in range(ranks):
        here = SimpleNamespace(
            process_index=rank, num_processes=ranks, device=CPU, gather=lambda x: x, autocast=torch.no_grad
        )
        calls = []
        handle = encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gathered.append(monitor.embeddings(encoder, Places(images), 8, here, 0))
        handle.remove()
        assert len(calls) == -(-images // ranks)
    labels = torch.cat([found for _, found in gathered])
    assert sorted(labels.tolist()) == list(range(images))
    assert torch.cat([features for features, _ in gathered])[labels.argsort(), 0].diff().gt(0).all()


def test_collapse_is_told_once_and_only_after_patience():
    watch = Collapse(threshold=0.1, patience=3)
    assert watch.warning([0.5, 0.05, 0.05]) is None
    assert watch.warning([0.5, 0.05, 0.05]) is None
    assert "collapsed" in watch.warning([0.05])
    assert watch.warning([0.05] * 9) is None


# What goes wrong

WRONG = [
    ("dino", ["--partition-ratio", 0.05], "1 of 16 images in b2", "--partition-ratio 0.125"),
    ("dino", ["--layer", 4], "layer=4 of an encoder of 3 blocks", "--layer 3"),
    ("dino", ["--cls-layer", 3], "cls_layer=3", "--cls-layer 2"),
    ("dino", ["--no-dynamic-size", "--local-views", 4], "local_views=4", "--dynamic-size"),
    ("dino", ["--no-dynamic-size"], "scale=(0.7, 1.3)", "--scale 1 1 --aspect 1 1"),
    ("dino", ["--preset", "big"], "preset='big'", "--preset small"),
    ("dino", ["--preset=big"], "preset='big'", "--preset small"),
    ("dino", ["--batch-size", 4000], "1920 images", "--batch-size 1920"),
    ("dino", ["--data", "/nowhere"], "no such folder", "--data "),
    ("dino", ["--fsdp", "--precision", "fp16"], "fsdp with precision=fp16", "--precision bf16"),
    ("dino", ["--fsdp"], "one process", "--fsdp"),
    ("barlow_twins", ["--ser-target", "momentum"], "ser_target='momentum'", "--ser-target online"),
    ("dino", ["--accumulate", 3], "accumulate=3", "--accumulate 1"),
    ("dino", ["--accumulate", 8], "0 of 2 images in b2", "--partition-ratio 1"),
    ("dino", ["--seed", -1], "seed=-1", "--seed 0"),
    ("moco_v3", ["--image-size", 30], "image_size=30", "--image-size 32"),
    ("moco_v3", ["--local-views", 4, "--local-size", 15], "local_size=15", "--local-size 16"),
    ("moco_v3", ["--local-views", 4, "--local-size", 32], "local views of 32", "--local-size 13"),
    ("moco_v3", ["--width", 22], "width 22", "--width 24"),
    ("dino", ["--heads", 5], "divisible by num_heads", "--"),
    ("dino", ["--architecture", "vit_nope"], "Unknown model", "--architecture vit_small_patch16_224"),
    ("dino", ["--architecture", "cait_xxs24_224"], "dynamic_img_size", "--architecture vit_small_patch16_224"),
    ("moco_v3", ["--architecture", "eva02_tiny_patch14_224"], "weight_init", "--initialisation timm"),
    (
        "dino",
        ["--architecture", "vit_small_patch16_dinov3", "--positions", "sincos"],
        "no position embedding",
        "--positions learned",
    ),
    ("dino", ["--scale", 2, 1], "scale=(2.0, 1.0)", "--scale 0.7 1.3"),
    ("dino", ["--prototypes", 0], "prototypes=0", "--prototypes 65536"),
    ("dino", ["--patch-size", 0], "patch_size=0", "--patch-size 16"),
    ("dino", ["--drop-path", 1.5], "drop_path=1.5", "--drop-path 0.1"),
    ("dino", ["--ser-lambda", -1], "ser_lambda=-1", "--ser-lambda 0.5"),
    ("dino", ["--steps", 0], "steps=0", "--steps 100"),
]


@pytest.mark.parametrize(("method", "flags", "given", "remedy"), WRONG)
def test_wrong_settings_end_before_the_training(tmp_path, method, flags, given, remedy):
    with pytest.raises(SERError) as error:
        train_job(method, [*flags, "--output-dir", tmp_path / "run"])
    assert given in error.value.given
    assert remedy in error.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(SERError, match="--batch-size 15"):
        whole_images(16, 0.25, 3)


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SERError, match="pip install wandb"):
        train_job("dino", ["--tracker", "wandb", "--output-dir", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SERError, match="a folder to write to"):
        train_job("dino", ["--output-dir", tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "mine"


def test_depth_is_that_of_the_architecture():
    settings = replace(dino.PRESETS["paper"], architecture="vit_large_patch16_224", layer=20)
    settings.check("dino.py")
    assert settings.late_layer == 20
    assert replace(settings, all_layers=True).layers == tuple(range(1, 25))
    with pytest.raises(SERError, match="--layer 3"):
        replace(settings, layer=25).check("dino.py")


@pytest.mark.parametrize("method", METHODS)
def test_help_has_every_setting_with_its_meaning(method, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(method, ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("--ser-lambda", "--partition-ratio", "--hidden", "--resume", "--fsdp"):
        assert name in text
    assert text.count("--") > 45


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["paper", "released", "small"])
def test_presets_go_together(method, preset):
    settings = SCRIPTS[method].PRESETS[preset]
    assert settings.preset == preset
    settings.check(f"{method}.py")
    assert json.loads(json.dumps(settings.plain())) == settings.plain()
    assert settings.same_run(settings.plain()) == []


def test_backward_is_outside_autocast(tmp_path):
    """Inside, matrix products of parts that compute in single precision would go backward in half precision."""
    seen = []

    def build(settings):
        method = moco_v3.build(settings)
        method.projector[0].weight.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        return method

    AcceleratorState._reset_state()
    loop.train("moco_v3", parsed("moco_v3", ["--precision", "bf16", "--steps", 1, "--output-dir", tmp_path]), build)
    AcceleratorState._reset_state()
    assert seen == [False]


def test_two_precisions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SERError, match="remedy:   --precision fp16"):
        loop.train("dino", parsed("dino", ["--output-dir", tmp_path / "run"]), dino.build)
    assert not (tmp_path / "run").exists()
