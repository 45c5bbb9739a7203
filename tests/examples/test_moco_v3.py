"""MoCo-v3: its loss against a loop over the formula, its official initialisation, λ = 0 against a plain training."""

import math

import moco_v3
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("accelerate")

from pretraining.encoder import build_encoder, trainable
from pretraining.schedules import Moment
from pretraining_jobs import lines, parsed, train_job
from tiny_batches import batches, tiny_step

from ser_reg import late_cls
from ser_reg.backbones import backbone
from ser_reg.objectives import SERLoss

close = torch.testing.assert_close


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
    monkeypatch.setattr(moco_v3, "rank_and_world_size", lambda: (rank, 4))
    monkeypatch.setattr(moco_v3, "all_gather", lambda mine: F.normalize(keys, dim=1))
    loss = moco_v3.contrastive_loss(queries, keys[3 * rank : 3 * rank + 3], 0.2)
    assert loss.item() == pytest.approx(literal_contrast(queries, keys, 0.2, first=3 * rank), rel=1e-5)


def test_loss_is_the_sum_of_both_directions_without_gradient_for_the_momentum_branch():
    encoder = nn.Linear(3, 6)
    method = moco_v3.MoCoV3(encoder, dim=6, hidden=8, out=5, temperature=0.3)
    x1, x2 = torch.randn(2, 7, 3)
    with torch.no_grad():
        q1, q2 = (method.predictor(method.projector(encoder(x))) for x in (x1, x2))
        k1, k2 = (method.target_projector(method.target(x)) for x in (x1, x2))
    loss = method.loss([encoder(x1), encoder(x2)], [method.target(x1), method.target(x2)])
    assert loss.item() == pytest.approx(literal_contrast(q1, k2, 0.3) + literal_contrast(q2, k1, 0.3), rel=1e-5)
    loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target"), name


def test_local_views_find_both_global_views_with_the_same_total_weight():
    method = moco_v3.MoCoV3(nn.Identity(), dim=6, hidden=8, out=5)
    embeddings = [torch.randn(7, 6) for _ in range(4)]
    q = [method.predictor(method.projector(e)).detach() for e in embeddings]
    k = [method.target_projector(e).detach() for e in embeddings[:2]]
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    expected = 2 * sum(literal_contrast(q[i], k[j], 0.2) for i, j in pairs) / 6
    assert method.loss(embeddings, embeddings[:2]).item() == pytest.approx(expected, rel=1e-5)


def test_momentum_branch_follows_ahead_of_its_keys_along_a_cosine_to_one():
    method = moco_v3.MoCoV3(nn.Linear(3, 4), 4, 8, 5, momentum=moco_v3.PRESETS["paper"].method.momentum)
    for step, momentum in ((0, 0.99), (50, 0.995), (100, 1.0)):
        slow = [p.clone() for p in method.target.parameters()]
        with torch.no_grad():
            for p in method.encoder.parameters():
                p.add_(1)
        fast = [p.clone() for p in method.encoder.parameters()]
        method.before_step(Moment(step, 100, 100))
        for was, source, now in zip(slow, fast, method.target.parameters(), strict=True):
            close(now, momentum * was + (1 - momentum) * source)
    assert not any(p.requires_grad for p in method.target.parameters())
    assert method.exported is method.encoder


# As the official release builds it


@pytest.fixture(scope="module")
def paper():
    torch.manual_seed(0)
    return tiny_step("moco_v3", moco_v3.PRESETS["paper"])


def test_official_initialisation(paper):
    method = paper.method
    for vit in (method.encoder, method.target):
        facts = backbone(vit)
        assert {block.attn.num_heads for block in facts.layers} == {12}
        assert facts.positions.shape == (1, 197, 384)
        assert not facts.positions.requires_grad
        assert (facts.positions[0, 0] == 0).all()
        projection = facts.projection
        assert not projection.weight.requires_grad
        assert not projection.bias.requires_grad
        assert (projection.bias == 0).all()
        assert projection.weight.std().item() == pytest.approx(0.0417, abs=1e-4)
        assert projection.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (3 * 16 * 16 + 384)), rel=1e-3)
        assert facts.cls_layer == 3
        assert vit.cls_token.std().item() < 3e-6
        assert {norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
        for block in facts.layers:
            assert block.attn.qkv.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (384 + 384)), rel=1e-2)
            assert block.mlp.fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (384 + 1536)), rel=1e-2)
            assert all((layer.bias == 0).all() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1))
    for name, parameter in method.target.named_parameters():
        assert torch.equal(parameter, method.encoder.get_parameter(name))


def test_positions_are_sines_and_cosines_of_rows_and_columns(paper):
    waves = 10000 ** -(torch.arange(96).double() / 96)
    row, column = torch.meshgrid(torch.arange(14).double(), torch.arange(14).double(), indexing="ij")
    columns = [f(axis.flatten()[:, None] * waves) for axis in (row, column) for f in (torch.sin, torch.cos)]
    expected = torch.cat(columns, dim=1)  # (196, 384), in the order of the release; timm has another one of channels
    found = backbone(paper.method.encoder).positions[0, 1:].double()
    distance = torch.cdist(expected.T, found.T)
    nearest = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-4
    assert len(set(nearest.tolist())) == 384


def test_heads_have_no_bias_and_end_without_scale(paper):
    method = paper.method

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


def test_parameters_of_the_paper(paper):
    """Table 1: 42.9 M, with SER 43.4 M. They count positions, which the paper's code learns and the official release of
    MoCo-v3 fixes; the 0.46 M of SER are the projector and its layer norm."""
    fixed = backbone(paper.method.encoder).positions.numel()
    assert fixed == 197 * 384
    assert f"{(trainable(paper.method) + fixed) / 1e6:.1f}" == "42.9"
    assert f"{(trainable(paper) + fixed) / 1e6:.1f}" == "43.4"
    assert trainable(paper) - trainable(paper.method) == 384 * 512 + 512 * 512 + 2 * 384
    released = moco_v3.PRESETS["released"]
    assert trainable(build_encoder(released.encoder, 3)) == trainable(paper.method.encoder) + fixed


def test_released_preset_keeps_pytorchs_patch_projection_frozen():
    projection = backbone(build_encoder(moco_v3.PRESETS["released"].encoder, 3)).projection
    assert projection.weight.std().item() == pytest.approx(0.0208, abs=1e-4)
    assert not projection.weight.requires_grad
    assert projection.bias.abs().max() > 0


# Without a term


def plain_training(settings, vit):
    """MoCo-v3 as if no term had ever been written: losses of its steps."""
    torch.manual_seed(settings.run.seed)
    vit = vit()
    own, rates = settings.method, settings.optimizer
    method = moco_v3.MoCoV3(vit, settings.encoder.width, own.hidden, own.out)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=rates.weight_decay)
    losses = []
    for step, groups in enumerate(batches("moco_v3", settings)):
        progress = step / settings.run.steps
        for group in optimizer.param_groups:  # no warm-up
            peak = rates.learning_rate * settings.run.batch_size / 256
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * progress))
        momentum = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - own.momentum)
        with torch.no_grad():
            for slow, fast in ((method.target, vit), (method.target_projector, method.projector)):
                for k, q in zip(slow.parameters(), fast.parameters(), strict=True):
                    k.lerp_(q, 1 - momentum)
        halves = embedded(vit, groups)
        with torch.no_grad():
            slow_halves = embedded(method.target, groups)
        q1, q2 = (method.predictor(method.projector(half)) for half in halves)
        with torch.no_grad():
            k1, k2 = (method.target_projector(half) for half in slow_halves)
        loss = moco_v3.contrastive_loss(q1, k2, 0.2) + moco_v3.contrastive_loss(q2, k1, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, method


def embedded(vit, groups):
    """Of both views: crops in one forward, whole images view by view unless they have one size; these come first."""
    halves = []
    for one, two in (group.images for group in groups):
        alike = one.shape == two.shape
        halves.append(vit(torch.cat([one, two])).chunk(2) if alike else (vit(one), vit(two)))
    return halves[0] if len(halves) == 1 else [torch.cat(pair) for pair in zip(*reversed(halves), strict=True)]


def tiny_vit(settings):
    """The encoder written down without the project's own builder; [CLS] joins early."""
    vit = timm.create_model(
        settings.encoder.architecture,
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


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("flags", "layer"), [(["--term.weight", 0], 2), (["none"], 0)])
def test_without_a_term_a_training_is_the_base_method_bit_for_bit(tmp_path, monkeypatch, flags, layer):
    """λ = 0 keeps b2 and late [CLS]; the word none is the plain base method around plain timm."""

    def built(*args, **kwargs):
        raise AssertionError("the term was built though it is not wanted")

    monkeypatch.setattr(SERLoss, "__init__", built)
    flags = [*flags, "--output-dir", tmp_path / "run"]
    train_job("moco_v3", flags)
    settings = parsed("moco_v3", flags)
    losses, method = plain_training(settings, lambda: late_cls(tiny_vit(settings), layer))
    assert [line["loss"] for line in lines(tmp_path / "run")] == losses
    assert len(set(losses)) == 3
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in method.state_dict().items():
        assert torch.equal(kept[f"method.{name}"], value), name
