"""The streaming loss against the formula: values, gradients, symmetries, precision, memory, messages."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import dense_ntxent, literal_ntxent, released_ntxent
from torch import Tensor

import ser_reg
from ser_reg import PatchNTXent, SERError, patch_ntxent
from ser_reg.losses import ntxent
from ser_reg.losses.ntxent import contrast
from ser_reg.losses.streaming import stream

TEMPERATURES = [0.01, 0.07, 0.3, 1.0]


def pair(images: int, tokens: int, width: int, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two views in float64 whose tokens resemble each other, lengths far from 1."""
    generator = torch.Generator().manual_seed(seed)
    z1, other = torch.randn(2, images, tokens, width, generator=generator, dtype=torch.float64)
    return (3 * z1).requires_grad_(), (0.1 * (z1 + noise * other)).requires_grad_()


def value_and_gradients(loss: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss, (z1, z2))


def close(left: tuple[Tensor, ...], right: tuple[Tensor, ...], tolerance: float = 1e-9) -> bool:
    return all(
        torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance) for a, b in zip(left, right, strict=True)
    )


# Against the formula --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(2, 4),
    tokens=st.integers(1, 4),
    width=st.integers(1, 6),
    chunk_size=st.none() | st.integers(1, 12),
    temperature=st.sampled_from([0.001, *TEMPERATURES]),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_read_literally(images, tokens, width, chunk_size, temperature, seed):
    z1, z2 = pair(images, tokens, width, seed)
    expected = value_and_gradients(literal_ntxent(z1, z2, temperature), z1, z2)
    loss = patch_ntxent(z1, z2, temperature, chunk_size=chunk_size)
    assert close(value_and_gradients(loss, z1, z2), expected)
    assert close((loss,), (dense_ntxent(z1, z2, temperature),))


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 64, 10_000, None])
@pytest.mark.parametrize(("images", "tokens"), [(2, 37), (7, 11), (33, 2)])
def test_tiles_never_touch_the_result(images, tokens, chunk_size):
    z1, z2 = pair(images, tokens, 24)
    for temperature in (0.002, 0.3):
        expected = value_and_gradients(dense_ntxent(z1, z2, temperature), z1, z2)
        loss = patch_ntxent(z1, z2, temperature, chunk_size=chunk_size)
        assert close(value_and_gradients(loss, z1, z2), expected)
        with torch.no_grad():
            assert torch.equal(patch_ntxent(z1, z2, temperature, chunk_size=chunk_size), loss)


@pytest.mark.parametrize("temperature", [0.3, 0.001])
def test_gradcheck(temperature):
    z1, z2 = pair(3, 2, 4)
    assert torch.autograd.gradcheck(lambda a, b: patch_ntxent(a, b, max(temperature, 0.05), chunk_size=4), (z1, z2))


def test_is_the_mean_of_both_directions():
    z1, z2 = pair(3, 5, 8)
    one, other = literal_ntxent(z1, z2, symmetric=False), literal_ntxent(z2, z1, symmetric=False)
    assert one.item() != pytest.approx(other.item(), rel=1e-3)
    assert patch_ntxent(z1, z2).item() == pytest.approx((one.item() + other.item()) / 2, rel=1e-12)
    assert PatchNTXent(0.07)(z1, z2).equal(patch_ntxent(z1, z2, 0.07))
    assert repr(PatchNTXent(0.07)) == "PatchNTXent(temperature=0.07)"


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(lambda n: sum(map(bool, n)) > 1),
    others=st.integers(0, 9),
    chunk_size=st.none() | st.integers(1, 12),
    temperature=st.sampled_from([0.001, 0.3]),
    seed=st.integers(0, 99),
)
def test_images_may_have_different_numbers_of_tokens(tokens, others, chunk_size, temperature, seed):
    """The arithmetic alone: ragged images, and keys that are no anchors, given as images of a third view."""
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(2, sum(tokens), 4, generator=generator, dtype=torch.float64)).requires_grad_().unbind()
    keys = torch.randn(others, 4, generator=generator, dtype=torch.float64)
    keys = (torch.nn.functional.normalize(keys, dim=-1) / temperature**0.5).requires_grad_()
    offsets = torch.tensor([0, *tokens]).cumsum(0)
    loss = stream(z1, z2, keys, offsets, temperature, chunk_size, 1.0, True)
    x1, x2 = (torch.nn.functional.normalize(z, dim=-1) / temperature**0.5 for z in (z1, z2))
    image = torch.arange(len(tokens)).repeat_interleave(torch.tensor(tokens))
    losses = []
    for a, b in ((x1, x2), (x2, x1)):
        positive = (a * b).sum(1, keepdim=True)
        negatives = [(a @ x.mT).masked_fill(image[:, None] == image, -math.inf) for x in (a, b)]
        losses.append(torch.cat([positive, *negatives, a @ keys.mT], 1).logsumexp(1) - positive[:, 0])
    expected = torch.cat(losses).mean()
    wanted = torch.autograd.grad(expected, (z1, z2, keys), retain_graph=True)
    assert close((loss, *torch.autograd.grad(loss, (z1, z2, keys))), (expected, *wanted))


# Valid places ---------------------------------------------------------------------------------------------------

masks = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
)


def spoilt(z1: Tensor, z2: Tensor, valid: Tensor) -> list[Tensor]:
    """The same, with no numbers where nothing is valid."""
    return [z.detach().masked_fill(~valid[..., None], math.nan).requires_grad_() for z in (z1, z2)]


@settings(max_examples=60, deadline=None)
@given(
    mask=masks,
    chunk_size=st.none() | st.integers(1, 12),
    temperature=st.sampled_from([0.001, 0.3]),
    seed=st.integers(0, 99),
)
def test_valid_equals_the_formula_read_literally(mask, chunk_size, temperature, seed):
    valid = torch.tensor(mask)
    z1, z2 = pair(*valid.shape, 5, seed)
    expected = value_and_gradients(literal_ntxent(z1, z2, temperature, valid=valid), z1, z2)
    given = spoilt(z1, z2, valid)
    loss = patch_ntxent(*given, temperature, valid, chunk_size)
    loss, *grads = value_and_gradients(loss, *given)
    assert close((loss, *grads), expected)
    assert not any(grad[~valid].any() for grad in grads)  # exactly zero, and a number

    alone = [z.detach()[valid].requires_grad_() for z in given]  # as who computes no other tokens hands them over
    found, *of_alone = value_and_gradients(patch_ntxent(*alone, temperature, valid, chunk_size), *alone)
    assert torch.equal(found, loss)
    assert all(torch.equal(a, b[valid]) for a, b in zip(of_alone, grads, strict=True))


def test_all_places_valid_changes_no_bit():
    z1, z2 = pair(4, 5, 6)
    valid = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(contrast(z1, z2, 0.3, valid=valid), contrast(z1, z2, 0.3), rtol=1e-14, atol=0)
    given = value_and_gradients(patch_ntxent(z1, z2, valid=valid), z1, z2)
    assert all(map(torch.equal, given, value_and_gradients(patch_ntxent(z1, z2), z1, z2)))
    assert torch.equal(PatchNTXent(0.07)(z1, z2, valid), patch_ntxent(z1, z2, 0.07))


def test_images_without_a_valid_place_drop_out():
    z1, z2 = pair(5, 3, 6)
    valid = torch.ones(5, 3, dtype=torch.bool)
    valid[[0, 3]] = False
    stay = [1, 2, 4]
    expected = contrast(z1[stay], z2[stay], 0.3)
    torch.testing.assert_close(contrast(z1, z2, 0.3, valid=valid), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("images", [0, 1])
def test_fewer_than_two_images_with_a_valid_place_give_zero(images):
    z1, z2 = pair(3, 4, 5)
    valid = torch.zeros(3, 4, dtype=torch.bool)
    valid[:images, :3] = True
    loss, chance, accuracy = contrast(*spoilt(z1, z2, valid), 0.3, valid=valid)
    assert (loss.item(), chance.item()) == (0, 0)
    assert accuracy.isnan()
    _, g1, g2 = value_and_gradients(patch_ntxent(z1, z2, valid=valid), z1, z2)
    assert torch.equal(g1, torch.zeros_like(z1))
    assert torch.equal(g2, torch.zeros_like(z2))
    assert patch_ntxent(z1[:0], z2[:0], valid=valid[:0]).item() == 0


def test_valid_diagnostics():
    z1, z2 = pair(3, 4, 5, noise=1.0)
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]]).bool()
    _, chance, accuracy = contrast(*spoilt(z1, z2, valid), 0.3, valid=valid)
    counts = [2, 1, 3]
    assert chance.item() == pytest.approx(sum(n * math.log(1 + 2 * (6 - n)) for n in counts) / 6)
    x1, x2 = (torch.nn.functional.normalize(z, dim=-1)[valid] for z in (z1, z2))
    image = torch.arange(3).repeat_interleave(torch.tensor(counts))
    negatives = torch.cat([(x1 @ x.mT).masked_fill(image[:, None] == image, -2) for x in (x1, x2)], 1)
    assert accuracy.item() == pytest.approx(((x1 * x2).sum(1) > negatives.amax(1)).double().mean().item())


def test_numbers_are_looked_at_where_they_are_valid():
    z1, z2 = (z.detach() for z in pair(3, 4, 5))
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0, 1] = False
    z1[0, 1], z2[2, 2] = math.inf, math.nan
    with pytest.raises(SERError, match="z2 with 1 of 11 tokens not finite"):
        patch_ntxent(z1, z2, valid=valid)
    valid[2, 2] = False
    assert patch_ntxent(z1, z2, valid=valid).isfinite()


def test_a_valid_place_in_one_dtype_or_another():
    z1, z2 = pair(4, 6, 16)
    valid = torch.rand(4, 6) < 0.6
    exact = patch_ntxent(z1, z2, 0.3, valid)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        given = [z.detach().to(dtype).requires_grad_() for z in (z1, z2)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = patch_ntxent(*given, 0.3, valid)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
        assert torch.autograd.grad(loss, given[0])[0].dtype == dtype


# Laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_order_of_images_and_tokens_is_irrelevant(seed):
    z1, z2 = pair(5, 7, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    images, tokens = torch.randperm(5, generator=generator), torch.randperm(7, generator=generator)
    expected = value_and_gradients(patch_ntxent(z1, z2, 0.3), z1, z2)
    shuffled = patch_ntxent(z1[images][:, tokens], z2[images][:, tokens], 0.3)
    assert close(value_and_gradients(shuffled, z1, z2), expected, 1e-12)


def test_lengths_of_tokens_are_irrelevant():
    z1, z2 = pair(3, 4, 6)
    length = torch.rand(3, 4, 1, dtype=torch.float64) * 1e6 + 1e-6
    assert close((patch_ntxent(z1 * length, z2, 0.3),), (patch_ntxent(z1, z2, 0.3),))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_aligned_pairs_give_less_loss_than_shuffled_ones(temperature):
    z1, z2 = pair(4, 9, 16)
    aligned = patch_ntxent(z1, z2, temperature)
    assert aligned < patch_ntxent(z1, z2.roll(1, dims=1), temperature)
    assert aligned < patch_ntxent(z1, z2.roll(1, dims=0), temperature)


def test_tokens_of_the_own_image_are_no_negatives():
    z1, z2 = pair(2, 3, 8)
    twin = z1.detach().clone()
    twin[0, 1] = twin[0, 0]  # a second token of image 0 that equals the first one: no anchor of image 0 minds
    changed = z2.detach().clone()
    changed[0, 1] = changed[0, 0]
    anchor = slice(0, 1)
    alone = patch_ntxent(torch.cat([z1[:1, anchor], z1[1:, anchor]]), torch.cat([z2[:1, anchor], z2[1:, anchor]]))
    assert torch.isfinite(patch_ntxent(twin, changed, 0.3))
    assert close((alone,), (literal_ntxent(z1[:, anchor], z2[:, anchor]),))


def test_an_image_that_occurs_twice_leaves_the_loss_sane():
    z1, z2 = pair(3, 4, 8)
    doubled = patch_ntxent(torch.cat([z1, z1[:1]]), torch.cat([z2, z2[:1]]), 0.07)
    assert patch_ntxent(z1, z2, 0.07) < doubled < 10


def test_indistinct_features_are_at_chance():
    z = torch.ones(4, 5, 8, dtype=torch.float64)
    loss, chance, accuracy = contrast(z, z, 0.3)
    assert loss.item() == pytest.approx(math.log(1 + 2 * 3 * 5))
    assert chance.item() == pytest.approx(math.log(1 + 2 * 3 * 5))
    assert accuracy.item() == 0 or accuracy.item() == 1  # all candidates tie, but for rounding


# As a part of training ------------------------------------------------------------------------------------------


def test_composes_with_other_losses_and_scales():
    z1, z2 = pair(3, 4, 8)
    _, *expected = value_and_gradients(dense_ntxent(z1, z2) * 0.5 * 65536 + z1.square().sum(), z1, z2)
    _, *given = value_and_gradients(patch_ntxent(z1, z2) * 0.5 * 65536 + z1.square().sum() + 0 * z2.sum(), z1, z2)
    assert close(tuple(given), tuple(expected))


def test_backward_twice_through_a_retained_graph():
    z1, z2 = pair(3, 4, 8)
    loss = patch_ntxent(z1, z2)
    first = torch.autograd.grad(loss, (z1, z2), retain_graph=True)
    assert close(first, torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_without_gradient_gets_none(side):
    views = list(pair(3, 4, 8))
    _, *expected = value_and_gradients(dense_ntxent(*views, 0.3), *views)
    views[side] = views[side].detach()  # a momentum teacher
    (grad,) = torch.autograd.grad(patch_ntxent(*views, 0.3), views[1 - side])
    assert close((grad,), (expected[1 - side],))


def test_activation_checkpointing_gives_the_same_gradients():
    z1, z2 = pair(3, 4, 8)
    loss = torch.utils.checkpoint.checkpoint(patch_ntxent, z1, z2, use_reentrant=False)
    assert close(value_and_gradients(loss, z1, z2), value_and_gradients(patch_ntxent(z1, z2), z1, z2))


def test_non_contiguous_input():
    z1, z2 = pair(3, 4, 8)
    turned = [z.mT.contiguous().mT for z in (z1, z2)]
    assert not turned[0].is_contiguous()
    assert close(value_and_gradients(patch_ntxent(*turned), z1, z2), value_and_gradients(patch_ntxent(z1, z2), z1, z2))


def test_second_derivatives_raise_instead_of_being_wrong():
    z1, z2 = pair(3, 4, 8)
    with pytest.raises(SERError, match="create_graph=False"):
        torch.autograd.grad(patch_ntxent(z1, z2), z1, create_graph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph_and_stops_recompiling(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(lambda a, b: patch_ntxent(a, b, 0.3), fullgraph=True, backend=count)
    for images, tokens in ((3, 4), (5, 6), (7, 2), (2, 9), (4, 11)):
        z1, z2 = (z.detach().requires_grad_() for z in pair(images, tokens, 8))
        given, expected = compiled(z1, z2), patch_ntxent(z1, z2, 0.3)
        assert close(value_and_gradients(given, z1, z2), value_and_gradients(expected, z1, z2), 1e-12)
    if torch.__version__ >= "2.7":  # older ones compile for each shape
        assert len(graphs) <= 2  # the first shape, and one for all others


# Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype, temperature):
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in pair(4, 6, 16, noise=2.0))
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    loss = patch_ntxent(z1, z2, temperature)
    assert loss.dtype == torch.float32
    expected = value_and_gradients(dense_ntxent(*exact, temperature), *exact)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5, abs=1e-6 / temperature)
    for z, wanted in zip((z1, z2), expected[1:], strict=True):
        (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert grad.dtype == dtype
        error = (grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error < {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}[dtype]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_finite_and_exact_where_every_exponential_would_vanish(temperature):
    # Positives point the other way and so does everything else but one token: logits span 2 / temperature.
    z1 = torch.tensor([[[1.0, 0.0]], [[-1.0, 1e-3]]], requires_grad=True)
    z2 = torch.tensor([[[-1.0, 0.0]], [[1.0, 1e-3]]], requires_grad=True)
    loss = patch_ntxent(z1, z2, temperature)
    expected = value_and_gradients(dense_ntxent(z1.double(), z2.double(), temperature), z1, z2)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert loss > 1.99 / temperature
    assert close(value_and_gradients(loss, z1, z2), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    z1, z2 = (z.detach().float().requires_grad_() for z in pair(4, 6, 16))
    expected = (*value_and_gradients(patch_ntxent(z1, z2, 0.07), z1, z2), *contrast(z1, z2, 0.07))
    with torch.autocast("cpu", dtype=dtype):
        given = (*value_and_gradients(patch_ntxent(z1, z2, 0.07), z1, z2), *contrast(z1, z2, 0.07))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_gradient_scaler_saves_small_gradients_from_half_precision():
    z1, z2 = (z.detach().mul(5e3).half().requires_grad_() for z in pair(12, 20, 16))
    exact = z1.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(dense_ntxent(exact, z2.double()), exact)
    assert wanted.abs().median() < 2**-25  # rounds to 0 in half precision
    (grad,) = torch.autograd.grad(patch_ntxent(z1, z2) * 2.0**16, z1)
    assert (grad.double() / 2.0**16 - wanted).abs().max() < 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_vectors_have_no_direction(temperature):
    z1, z2 = (z.detach().float().clone() for z in pair(3, 4, 8))
    z1[0, 1], z2[2, 3], z2[0, 1] = 0, 0, 0
    z1.requires_grad_(), z2.requires_grad_()
    loss, g1, g2 = value_and_gradients(patch_ntxent(z1, z2, temperature), z1, z2)
    assert loss.item() == pytest.approx(dense_ntxent(z1.double(), z2.double(), temperature).item(), rel=1e-5)
    assert g1.isfinite().all()
    assert g2.isfinite().all()
    assert not g1[0, 1].any()
    assert not g2[2, 3].any()
    assert g2[0, 0].any()


def test_nothing_but_zeros_is_at_chance():
    z = torch.zeros(3, 4, 8, requires_grad=True)
    loss, grad, _ = value_and_gradients(patch_ntxent(z, z), z, z)
    assert loss.item() == pytest.approx(math.log(17))
    assert not grad.any()


# What is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_never_a_number_from_features_that_are_none(side, bad, temperature, monkeypatch):
    views = [z.detach().float() for z in pair(4, 5, 8)]
    views[side][1, 2, 3] = bad
    with pytest.raises(SERError, match=f"z{side + 1} with 1 of 20 tokens not finite"):
        patch_ntxent(*views, temperature)
    # Where looking would cost a synchronisation, the loss itself has to say so.
    monkeypatch.setattr(ntxent, "_complaint_of_numbers", lambda *_: None)
    assert patch_ntxent(*views, temperature).isnan()
    assert patch_ntxent(*(z.half() for z in views), temperature).isnan()


def test_features_too_long_to_be_measured_are_refused_and_large_ones_are_not(monkeypatch):
    z1, z2 = (z.detach().float() for z in pair(3, 4, 8))
    with pytest.raises(SERError, match=r"z2 with values up to .*e\+30\n  expected: numbers that can be squared"):
        patch_ntxent(z1, z2 * 1e31)
    assert patch_ntxent(z1 * 1e14, z2).item() == pytest.approx(patch_ntxent(z1, z2).item(), rel=1e-5)
    monkeypatch.setattr(ntxent, "_complaint_of_numbers", lambda *_: None)  # where looking would make the host wait
    assert patch_ntxent(z1 * 1e30, z2).isnan()


# Diagnostics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "tokens"), [(2, 1), (3, 7), (40, 51)])
def test_diagnostics(images, tokens):
    z1, z2 = pair(images, tokens, 6, noise=1.0)
    loss, chance, accuracy = contrast(z1, z2, 0.3)
    assert torch.equal(loss, patch_ntxent(z1, z2, 0.3))
    assert loss.requires_grad
    assert not chance.requires_grad
    assert not accuracy.requires_grad
    assert chance.item() == pytest.approx(math.log(1 + 2 * (images - 1) * tokens))

    x1, x2 = (torch.nn.functional.normalize(z.flatten(0, 1), dim=-1) for z in (z1, z2))
    image = torch.arange(images).repeat_interleave(tokens)
    negatives = torch.cat([(x1 @ x.mT).masked_fill(image[:, None] == image, -2) for x in (x1, x2)], 1)
    hits = ((x1 * x2).sum(1) > negatives.amax(1)).double()
    probed = min(256, len(hits))  # evenly spaced
    expected = hits[[i * len(hits) // probed for i in range(probed)]].mean()
    assert accuracy.item() == pytest.approx(expected.item())


# Messages -------------------------------------------------------------------------------------------------------

Z = torch.randn(3, 4, 8)
V = torch.ones(3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("z1", "z2", "options", "message"),
    [
        (Z, Z, {"temperature": 0.0}, "temperature=0.0\n  expected: a finite temperature above 0"),
        (Z, Z, {"temperature": 0.0}, "remedy:   temperature=0.3"),
        (Z, Z, {"temperature": -1.0}, "given:    temperature=-1.0"),
        (Z, Z, {"temperature": math.nan}, "given:    temperature=nan"),
        (Z, Z, {"temperature": math.inf}, "given:    temperature=inf"),
        (Z, Z, {"temperature": torch.tensor(0.3)}, "a finite temperature above 0"),
        (Z, Z, {"temperature": "0.3"}, "given:    temperature='0.3'"),
        (Z, Z, {"chunk_size": 2.5}, "given:    chunk_size=2.5"),
        (Z, Z, {"chunk_size": 0}, "given:    chunk_size=0\n  expected: a tile of at least 1 token"),
        (Z[0], Z[0], {}, "z1 (4, 8) torch.float32 on cpu, z2 (4, 8) torch.float32 on cpu"),
        (Z[0], Z[0], {}, "expected: token lists (B, N, D)"),
        (Z, Z[None], {}, "remedy:   z1.flatten(2).mT, z2.flatten(2).mT"),
        (Z, Z[:, :3], {}, "expected: equal shapes\n  remedy:   act(g, z1)"),
        (Z, Z.double(), {}, "z2 (3, 4, 8) torch.float64 on cpu\n  expected: one floating point dtype"),
        (Z.long(), Z.long(), {}, "remedy:   z1.float(), z2.float()"),
        (Z, Z.to("meta"), {}, "float32 on meta\n  expected: one device\n  remedy:   z1.to(z2.device)"),
        (Z[:1], Z[:1], {}, "z1 (1, 4, 8), 1 images in 1 processes\n  expected: at least 2 images"),
        (Z[:0], Z[:0], {}, "remedy:   partition_size(batch_size, ratio, world_size)"),
        (Z[:, :0], Z[:, :0], {}, "z1 (3, 0, 8)"),
        (
            Z[:1],
            Z[:1],
            {"valid": V[:, :3]},
            "valid (3, 3), z1 (1, 4, 8)\n  expected: True or False for each token, (B, N)",
        ),
        (Z, Z, {"valid": V.view(3, 2, 2)}, "remedy:   valid.flatten(1)  # from (B, h, w)"),
        (
            Z,
            Z,
            {"valid": V.float()},
            "valid of torch.float32\n  expected: a bool tensor (B, N)\n  remedy:   valid.bool()",
        ),
        (
            Z,
            Z,
            {"valid": [[True]]},
            "valid is a list\n  expected: a bool tensor (B, N)\n  remedy:   torch.tensor(valid)",
        ),
        (Z[0], Z[0], {"valid": V}, "4 tokens, 12 valid places\n  expected: the tokens of all places (B, N, D), or"),
        (Z, Z[0], {"valid": V}, "expected: token lists (B, N, D)"),
        (Z[None], Z[None], {"valid": V}, "expected: token lists (B, N, D)"),
        (Z, Z, {"valid": V, "temperature": 0.0}, "remedy:   temperature=0.3"),
        (Z / 0, Z, {}, "given:    z1 with 12 of 12 tokens not finite\n  expected: finite features"),
        (Z, Z / 0, {}, "given:    z2 with 12 of 12 tokens not finite"),
    ],
)
def test_errors_say_what_to_type(z1, z2, options, message):
    for call in (patch_ntxent, contrast) if "chunk_size" not in options else (patch_ntxent,):
        with pytest.raises(SERError, match=re.escape(message)) as caught:
            call(z1, z2, **{"temperature": 0.3, **options})
        assert str(caught.value).startswith("patch_ntxent(z1, z2, temperature=")


# Could these tests fail? ----------------------------------------------------------------------------------------

MUTANTS = {
    "keys of a tile are no anchors": ("negatives[keys] = negatives[keys].logaddexp(by_key)", "pass"),
    "no negatives at all": ("    if len(starts) > 2:\n", "    if False:\n"),
    "rows of a tile are no anchors": ("negatives[rows] = negatives[rows].logaddexp(by_row)", "pass"),
    "images begin one token later": ("starts = [2 * bound for", "starts = [2 * bound + (0 < bound < bounds[-1]) for"),
    "a half is not compared within": ("yield from _between_images(starts[middle:], side)", "pass"),
    "positives give no gradient": ("near[partner])", "0 * near[partner])"),
    "pairs of neighbours are left out": ("    if len(starts) > 2:\n", "    if len(starts) > 3:\n"),
    "lengths of tokens matter": ("length.masked_fill(length < SHORTEST, math.inf)", "1.0"),
    "tokens count twice along their own direction": ("value=-temperature", "value=0.0"),
}


@pytest.fixture
def mutate(tmp_path, monkeypatch):
    """Copies the package with one text replaced, and imports its losses."""
    monkeypatch.syspath_prepend(tmp_path)

    def build(name: str, file: str, old: str, new: str):
        folder = tmp_path / name
        shutil.copytree(Path(ser_reg.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "__init__.py").write_text("")
        (folder / "losses" / "__init__.py").write_text("")
        source = (folder / file).read_text()
        assert old in source
        (folder / file).write_text(source.replace(old, new, 1))
        return importlib.import_module(f"{name}.losses.ntxent")

    return build


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_the_comparison_with_the_formula_finds_mutants(mutant, mutate):
    old, new = MUTANTS[mutant] if mutant else ("", "")
    index = list(MUTANTS).index(mutant) if mutant else "none"
    file = "losses/tokens.py" if mutant == "lengths of tokens matter" else "losses/streaming.py"
    mutated = mutate(f"ser_reg_mutant_{index}", file, old, new)
    z1, z2 = pair(4, 3, 6)
    expected = value_and_gradients(literal_ntxent(z1, z2, 0.3), z1, z2)
    found = value_and_gradients(mutated.patch_ntxent(z1, z2, 0.3, chunk_size=5), z1, z2)
    assert close(found, expected) == (mutant is None)


# Memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import torch
from literal import released_ntxent
from ser_reg.losses import patch_ntxent

def step(images, tokens):
    z1, z2 = (torch.randn(images, tokens, 128, requires_grad=True) for _ in range(2))
    valid = torch.rand(images, tokens) < 0.9 if sys.argv[1] == "ragged" else None
    loss = released_ntxent(z1, z2) if sys.argv[1] == "released" else patch_ntxent(z1, z2, valid=valid, chunk_size=512)
    loss.backward()

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
step(2, 8)  # libraries and their workspaces are not what is measured
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
step(int(sys.argv[2]), int(sys.argv[3]))
print(resident("VmHWM") - before)
"""


def peak(form: str, images: int, tokens: int) -> int:
    """KiB that forward and backward take beyond an idle process, inputs and gradients included."""
    paths = [str(Path(ser_reg.__file__).parents[1]), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths!r}\n{PEAK}"
    command = [sys.executable, "-c", code, form, str(images), str(tokens)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed does not stay with the process
    return int(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)


measures_memory = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")


@pytest.mark.slow
@measures_memory
@pytest.mark.parametrize("form", ["streaming", "ragged"])
@pytest.mark.parametrize(("small", "large"), [((16, 196), (64, 196)), ((4, 512), (4, 2048))])
def test_memory_grows_like_the_tokens(small, large, form):
    assert peak(form, *large) <= 5 * peak(form, *small)


@pytest.mark.slow
@measures_memory
def test_memory_of_the_released_form_grows_faster():
    released = peak("released", 32, 196)
    assert released >= 10 * peak("released", 8, 196)
    assert peak("streaming", 32, 196) <= 0.1 * released


def test_released_form_retold_equals_the_formula():
    z1, z2 = pair(3, 4, 8)
    released = value_and_gradients(released_ntxent(z1, z2, 0.3), z1, z2)
    assert close(released, value_and_gradients(literal_ntxent(z1, z2, 0.3), z1, z2))


@pytest.mark.parametrize(("temperature", "shifted"), [(0.3, False), (0.02, False), (0.01, True)])
def test_sums_have_a_running_maximum_only_where_exponentials_overflow(monkeypatch, temperature, shifted):
    """In float32 exp(50) is a number, exp(100) is none; a maximum of each tile takes a third of the time."""
    shifts, logsumexp = [], torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda self, *dims: shifts.append(dims) or logsumexp(self, *dims))
    z1, z2 = torch.randn(2, 3, 4, 8)
    assert patch_ntxent(z1, z2, temperature).isfinite()
    assert bool(shifts) == shifted


@pytest.mark.parametrize("tokens", [200, 3000])
def test_tiles_are_small_on_a_cpu(monkeypatch, tokens):
    """At most 1536 tokens a side, which is 9 MiB in float32, and no smaller ones than there have to be."""
    sides, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: sides.append(out.shape) or mm(a, b, out=out))
    z1, z2 = torch.randn(2, 2, tokens, 4)
    patch_ntxent(z1, z2)
    assert max(max(side) for side in sides) == min(2 * tokens, 2 * tokens // -(-2 * tokens // 1536))
