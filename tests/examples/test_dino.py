"""DINO: its loss against a loop over the formula, its center, its teacher and its last layer."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

import dino
from pretraining.schedules import Moment
from pretraining_jobs import lines, parsed, train_job
from tiny_batches import batches

close = torch.testing.assert_close
SMALL = dino.PRESETS["small"].method


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
def test_loss_is_its_formula_and_its_center_moves_after_use(views):
    settings = replace(SMALL, prototypes=12, teacher_temperature=0.06, student_temperature=0.2)
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
        assert method.loss(embeddings, embeddings[:2]).item() == pytest.approx(expected, rel=1e-4)
        batch = sum(row for teacher in teachers for row in teacher.double()) / 14
        center = 0.9 * center + 0.1 * batch
        close(method.center[0].double(), center, rtol=1e-4, atol=1e-7)
        assert center.abs().max() > 1e-3


def test_center_is_the_mean_over_the_images_of_all_ranks(monkeypatch):
    method = dino.DINO(nn.Linear(3, 6), dino.DINOHead(6, 8, 5, 12, True), replace(SMALL, prototypes=12))
    images = [torch.randn(2, 7, 6) for _ in range(3)]  # of each rank, in two views
    teachers = torch.stack([torch.stack([method.target_head(e) for e in views]) for views in images])
    elsewhere = teachers[:2].mean((1, 2)).sum(0, keepdim=True)
    monkeypatch.setattr(dino, "all_reduce", lambda mine: mine + elsewhere)
    monkeypatch.setattr(dino, "rank_and_world_size", lambda: (2, 3))
    method.loss(list(images[2]), list(images[2]))
    close(method.center[0], 0.1 * teachers.flatten(0, 2).mean(0))


def plain_training(settings):
    """DINO as if there were neither engine nor term: losses of its steps."""
    torch.manual_seed(settings.run.seed)
    made, own, rates = dino.build(settings), settings.method, settings.optimizer
    student, head, teacher, teacher_head = made.encoder, made.head, made.target, made.target_head
    trained = [(name, p) for name, p in made.named_parameters() if p.requires_grad]
    matrices, vectors = ([p for _, p in trained if (p.ndim > 1) == kind] for kind in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}])
    center, losses = torch.zeros(1, own.prototypes), []
    for step, groups in enumerate(batches("dino", settings)):
        progress = step / settings.run.steps
        down = 0.5 * (1 + math.cos(math.pi * progress))
        peak = rates.learning_rate * settings.run.batch_size / 256
        for group, decays in zip(optimizer.param_groups, (True, False), strict=True):
            group["lr"] = rates.final_learning_rate + down * (peak - rates.final_learning_rate)
            last = rates.final_weight_decay
            group["weight_decay"] = decays * (last + down * (rates.weight_decay - last))
        crops = torch.cat(groups[0].images)
        s1, s2 = (head(x) for x in student(crops).chunk(2))
        with torch.no_grad():
            t1, t2 = (teacher_head(x) for x in teacher(crops).chunk(2))
        warm = own.teacher_warmup_epochs
        epoch = int(progress * settings.run.epochs)
        first, then = own.first_teacher_temperature, own.teacher_temperature
        temperature = then if epoch >= warm else first + (then - first) * epoch / (warm - 1)

        def cross_entropy(s, t, center=center, temperature=temperature):
            sharp = torch.softmax((t - center) / temperature, dim=-1)
            return -(sharp * torch.log_softmax(s / own.student_temperature, dim=-1)).sum(-1).mean()

        loss = (cross_entropy(s2, t1) + cross_entropy(s1, t2)) / 2
        center = own.center_momentum * center + (1 - own.center_momentum) * torch.cat([t1, t2]).mean(0, keepdim=True)
        optimizer.zero_grad()
        loss.backward()
        for name, p in trained:
            p.grad *= min(1, rates.clip / p.grad.norm().item())
            if "head.last" in name and progress * settings.run.epochs < own.frozen_last_layer_epochs:
                p.grad = None
        optimizer.step()
        momentum = 1 - down * (1 - own.momentum)
        with torch.no_grad():
            for slow, fast in ((teacher, student), (teacher_head, head)):
                for k, q in zip(slow.parameters(), fast.parameters(), strict=True):
                    k.copy_(momentum * k + (1 - momentum) * q)
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("on_cpu")
def test_a_training_without_a_term_is_dino_step_by_step(tmp_path):
    """What moves when: the center after the loss, the teacher after the update, the last layer in the second epoch."""
    flags = ["none", "--steps", 8, "--epochs", 4, "--momentum", 0.6, "--teacher-warmup-epochs", 3, "--clip", 0.1]
    flags += ["--teacher-temperature", 0.07, "--drop-path", 0, "--learning-rate", 0.02, "--output-dir", tmp_path]
    train_job("dino", flags)
    expected = plain_training(parsed("dino", flags))
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(expected, rel=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_prototypes_are_unit_vectors_that_stay_so_unless_told_otherwise():
    for fixed in (True, False):
        head = dino.DINOHead(6, 8, 5, 12, norm_last_layer=fixed)
        close(head.last.weight.norm(dim=1), torch.ones(12))
        length = head.last.parametrizations.weight.original0
        assert length.requires_grad is not fixed
        assert all((layer.bias == 0).all() for layer in head.mlp[::2])
        assert head.last.bias is None
        assert (head(torch.randn(4, 6)).abs() <= 1 + 1e-6).all()  # cosines: unit vectors on both sides


def test_teacher_temperature_grows_by_epochs_as_in_the_official_release():
    settings = replace(SMALL, teacher_warmup_epochs=4, teacher_temperature=0.07)
    method = dino.DINO(nn.Identity(), dino.DINOHead(6, 8, 5, settings.prototypes, True), settings)
    method.before_step(Moment(step=25, steps=100, epochs=10))
    assert method.teacher_temperature == pytest.approx(0.06)


def test_teacher_follows_after_the_update_along_a_cosine_to_one():
    settings = replace(dino.PRESETS["paper"].method, prototypes=6)
    method = dino.DINO(nn.Linear(3, 4), dino.DINOHead(4, 8, 5, 6, True), settings)
    for step, momentum in ((0, 0.996), (50, 0.998), (100, 1.0)):
        slow = [p.clone() for p in method.target.parameters()]
        with torch.no_grad():
            for p in method.encoder.parameters():
                p.add_(1)
        fast = [p.clone() for p in method.encoder.parameters()]
        method.after_update(Moment(step, 100, 100))
        for was, source, now in zip(slow, fast, method.target.parameters(), strict=True):
            close(now, momentum * was + (1 - momentum) * source)
    assert not any(p.requires_grad for p in method.target.parameters())
    assert method.exported is method.target


def test_last_layer_learns_after_its_epochs():
    head = dino.DINOHead(6, 8, 5, 12, norm_last_layer=False)
    method = dino.DINO(nn.Identity(), head, replace(SMALL, prototypes=12))
    for epoch, frozen in ((0, True), (0.99, True), (1, False)):
        embeddings = list(torch.randn(2, 4, 6))
        method.zero_grad()
        method.loss(embeddings, embeddings).backward()
        method.before_update(Moment(int(epoch * 100), 1000, 10))
        assert all((p.grad is None) == frozen for p in method.head.last.parameters())
        assert all(p.grad is not None for p in method.head.mlp.parameters())


def test_dropped_paths_are_the_students_alone():
    method = dino.build(parsed("dino", ["--drop-path", 0.5]))
    vits = (method.encoder, method.target)
    rates = [[layer.drop_prob for layer in vit.modules() if hasattr(layer, "drop_prob")] for vit in vits]
    assert max(rates[0]) == 0.5
    assert max(rates[1]) == 0
