"""The arithmetic of patch-wise NT-Xent: tile by tile, gradients in the same sweep, memory linear in the tokens.

Let x be the unit tokens over sqrt(temperature), so that logits are x @ x.T. The first rows of x are the anchors, which
are keys of one another; behind them stand keys that are no anchors here (those of other ranks). Logits are symmetric,
so each pair of images is visited once: a tile's row sums go to the anchors of one image, its column sums to those of
the other. Once these sums Z stand, the tiles are computed again, weighted by exp(logit) * (1/Z_row + 1/Z_column), and
give the gradients of rows and columns; for a key that is no anchor, 1/Z is 0. So the gradient is known when the forward
pass ends, and backward multiplies it by whatever arrives.

Images may have different numbers of tokens: `offsets` says where each begins.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import SERError
from .tokens import precision, to_device, token_scale

__all__ = ["accuracy", "stream"]

PACKAGE = __name__.split(".")[0]
PROBES = 256  # anchors that the accuracy looks at


def stream(
    z1: Tensor,
    z2: Tensor,
    others: Tensor | None,
    offsets: Tensor,
    temperature: float,
    chunk_size: int | None,
    weight: float,
    differentiate: bool,
) -> Tensor:
    """`weight` times the symmetric loss of aligned tokens, averaged over anchors; differentiable once.

    Args:
        z1, z2: (T, D), the tokens of all images of both views, one image behind the other.
        others: (K, D), keys of other ranks, scaled by `token_scale` already.
        offsets: (B + 1,) int64 on the CPU, where each image begins in z1 and z2, and T at the end. A tensor, so that a
            compiler takes any number of images for one graph.
        temperature, chunk_size: as in `patch_ntxent`.
        weight: factor of the loss.
        differentiate: whether a gradient will be asked for.
    """
    loss: Tensor = _Stream.apply(z1, z2, others, offsets, temperature, chunk_size, weight, differentiate)
    return loss


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, others: Tensor | None, offsets: Tensor, *options: Any) -> Tensor:
        ctx.dtype = z1.dtype
        loss: Tensor
        loss, grads, rows = _contrast(z1, z2, others, offsets, *options)
        ctx.save_for_backward(grads, rows)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = "patch_ntxent(z1, z2).backward(create_graph=True)"
            raise SERError(call, "a gradient to be differentiated again", "first derivatives", "create_graph=False")
        grads, (first, second) = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # Cast last: in half precision small gradients vanish unless a gradient scaler's factor is in before.
        return (
            (grads[first] * grad).to(ctx.dtype) if needed[0] else None,
            (grads[second] * grad).to(ctx.dtype) if needed[1] else None,
            grads[2 * first.shape[0] :] * grad if needed[2] else None,
            *[None] * 5,
        )


# An operator of its own, because a compiler that looked inside would unroll the loops over tiles.
@torch.library.custom_op(f"{PACKAGE}::patch_ntxent", mutates_args=())
def _contrast(
    z1: Tensor,
    z2: Tensor,
    others: Tensor | None,
    offsets: Tensor,
    temperature: float,
    chunk_size: int | None,
    weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradients for the rows of x (empty unless `differentiate`), and (2, T) which rows the views are."""
    with torch.autocast(z1.device.type, enabled=False):
        bounds = offsets.tolist()
        token = torch.arange(len(z1), device=z1.device)
        _, start, end = _images(bounds, z1.device)
        first, second = token + start, token + end  # image by image, both views of an image side by side
        x, scale = _keys(z1, z2, others, first, second, temperature)
        near = x[: len(scale)]
        partner = torch.empty_like(torch.cat([first, second]))  # the row of the same token in the other view
        partner[first], partner[second] = second, first
        positive = x.new_empty(len(near))
        positive[first] = positive[second] = torch.linalg.vecdot(near[first], near[second])

        # |logit| <= 1/temperature: where the dtype holds exponentials of that, a sum needs no running maximum.
        bounded = 1 / temperature < 2 / 3 * math.log(torch.finfo(x.dtype).max)
        starts = [2 * bound for bound in bounds]
        negatives, grads = _sweep(x, positive, starts, _side(chunk_size, z1), bounded, differentiate)
        mean = weight / max(1, len(near))
        excess = negatives - positive  # the loss is log(1 + exp(excess)), which loses no digits when it is small
        loss = excess.logaddexp(torch.zeros_like(excess)).sum() * mean

        if differentiate:
            sigmoid = torch.sigmoid(excess)
            g = grads[: len(near)]
            g.addcmul_(-(sigmoid + sigmoid[partner]).unsqueeze(-1), near[partner])
            # Only what turns a token counts, since its length was divided out.
            g.addcmul_(near, torch.linalg.vecdot(g, near).unsqueeze(-1), value=-temperature).mul_(scale * mean)
            grads[len(near) :] *= mean
        return loss, grads, torch.stack([first, second])


@_contrast.register_fake
def _(
    z1: Tensor,
    z2: Tensor,
    others: Tensor | None,
    offsets: Tensor,
    temperature: float,
    chunk_size: int | None,
    weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Shapes, not len: that would be a number to the compiler, and a graph for each.
    rows = 2 * z1.shape[0] + (0 if others is None else others.shape[0])
    loss = z1.new_empty((), dtype=precision(z1))
    grads = loss.new_empty((rows, z1.shape[1]) if differentiate else (0,))
    return loss, grads, torch.empty(2, z1.shape[0], dtype=torch.int64, device=z1.device)


def _images(offsets: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the number of its image, and where that begins and ends."""
    token = torch.arange(offsets[-1], device=device)
    counts = {stop - start for start, stop in pairwise(offsets)}
    if len(counts) <= 1:  # nothing to copy to the device
        count = max([1, *counts])
        image = token // count
        return image, image * count, (image + 1) * count
    bounds = to_device(torch.tensor(offsets), device)
    image = torch.bucketize(token, bounds[1:], right=True)
    return image, bounds[image], bounds[image + 1]


def _keys(
    z1: Tensor, z2: Tensor, others: Tensor | None, first: Tensor, second: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """x, and (2T, 1) what the anchors among its rows were multiplied by."""
    anchors = 2 * len(z1)
    x = z1.new_empty(anchors + (0 if others is None else len(others)), z1.shape[1], dtype=precision(z1))
    scale = x.new_empty(anchors, 1)
    for rows, z in ((first, z1), (second, z2)):
        scale[rows] = token_scale(z, temperature)
        x[rows] = z * scale[rows]
    if others is not None:
        x[anchors:] = others
    return x, scale


def _sweep(
    x: Tensor, positive: Tensor, starts: list[int], side: int, bounded: bool, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every anchor's negatives, shaped like `positive`, and the gradients that negatives give.

    Args:
        x: the keys, of which the first are the anchors, image by image.
        positive: logit of each anchor with its positive.
        starts: where each image begins among the anchors, and their number at the end.
        side: of a tile, in tokens.
        bounded: exponentials of logits need no shift.
        differentiate: whether gradients are wanted.
    """
    anchors = len(positive)
    grads = torch.zeros_like(x) if differentiate else x.new_empty(0)
    negatives = x.new_full((len(x),), -math.inf)
    buffer = x.new_empty(min(side, len(x)) ** 2)
    for rows, keys in _tiles(starts, len(x), side):
        tile = _matrix(buffer, rows, keys)
        torch.mm(x[rows], x[keys].mT, out=tile)
        if bounded:
            tile.exp_()
            by_row, by_key = tile.sum(1).log(), tile.sum(0).log()
        else:
            by_row, by_key = tile.logsumexp(1), tile.logsumexp(0)
        negatives[rows] = negatives[rows].logaddexp(by_row)
        negatives[keys] = negatives[keys].logaddexp(by_key)
    negatives = negatives[:anchors]
    if not differentiate:
        return negatives, grads

    spare = torch.empty_like(buffer)
    log_z = x.new_full((len(x),), math.inf)  # of keys that are no anchors: they have no loss here
    log_z[:anchors] = negatives.logaddexp(positive)
    inverse = torch.exp(-log_z)
    for rows, keys in _tiles(starts, len(x), side):
        tile, weight = _matrix(buffer, rows, keys), _matrix(spare, rows, keys)
        torch.mm(x[rows], x[keys].mT, out=tile)
        if bounded:
            tile.exp_().mul_(torch.add(inverse[rows, None], inverse[keys], out=weight))
        else:
            torch.sub(tile, log_z[keys], out=weight)
            tile.sub_(log_z[rows, None]).exp_().add_(weight.exp_())
        grads[rows].addmm_(tile, x[keys])
        grads[keys].addmm_(tile.mT, x[rows])
    return negatives, grads


def _tiles(starts: list[int], keys: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of anchors of different images once, and every anchor with each key that is none."""
    yield from _between_images(starts, side)
    for rows in _spans(0, starts[-1], side):
        for others in _spans(starts[-1], keys, side):
            yield rows, others


def _between_images(starts: list[int], side: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of different images once, as tiles (rows, keys) of tokens: one half against the other, then within."""
    if len(starts) > 2:
        middle = (len(starts) - 1) // 2
        for rows in _spans(starts[0], starts[middle], side):
            for keys in _spans(starts[middle], starts[-1], side):
                yield rows, keys
        yield from _between_images(starts[: middle + 1], side)
        yield from _between_images(starts[middle:], side)


def _spans(start: int, stop: int, longest: int) -> Iterator[slice]:
    """[start, stop) in even pieces of at most `longest`."""
    pieces = -(-(stop - start) // longest)
    for i in range(pieces):
        yield slice(start + (stop - start) * i // pieces, start + (stop - start) * (i + 1) // pieces)


def _matrix(buffer: Tensor, rows: slice, keys: slice) -> Tensor:
    """The start of the buffer as a matrix: memory that was just used is still in cache."""
    height = rows.stop - rows.start
    return buffer[: height * (keys.stop - keys.start)].view(height, -1)


def _side(chunk_size: int | None, z: Tensor) -> int:
    return chunk_size or (1536 if z.device.type == "cpu" else 4096)  # CPU: the fastest of 512 to 2048 at D = 512


@torch.library.custom_op(f"{PACKAGE}::accuracy", mutates_args=())
def accuracy(
    z1: Tensor, z2: Tensor, others: Tensor | None, offsets: Tensor, temperature: float, chunk_size: int | None
) -> Tensor:
    """How often, among evenly spaced anchors of z1, the positive beats every other candidate; arguments of `stream`."""
    with torch.autocast(z1.device.type, enabled=False):
        x1, x2 = (z * token_scale(z, temperature) for z in (z1, z2))
        far = x1.new_empty(0, z1.shape[1]) if others is None else others
        image, _, _ = _images(offsets.tolist(), z1.device)
        probes = min(len(x1), PROBES)
        probe = torch.arange(probes, device=z1.device) * len(x1) // max(1, probes)
        anchors, positive = x1[probe], torch.linalg.vecdot(x1[probe], x2[probe])
        best = torch.full_like(positive, -math.inf)
        for keys in _spans(0, len(x1), _side(chunk_size, z1)):
            own = image[probe][:, None] == image[keys]
            for x in (x1, x2):
                best = best.maximum((anchors @ x[keys].mT).masked_fill_(own, -math.inf).amax(1))
        for keys in _spans(0, len(far), _side(chunk_size, z1)):
            best = best.maximum((anchors @ far[keys].mT).amax(1))
        return torch.as_tensor((positive > best).to(anchors.dtype).mean())


@accuracy.register_fake
def _(
    z1: Tensor, z2: Tensor, others: Tensor | None, offsets: Tensor, temperature: float, chunk_size: int | None
) -> Tensor:
    return z1.new_empty((), dtype=precision(z1))
