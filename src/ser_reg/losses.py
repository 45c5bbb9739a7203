"""Patch-wise NT-Xent (paper, Section 3.3, Equation 3): exact, and linear in memory.

**Streaming.** Let x be the unit tokens over sqrt(temperature), so that logits are x @ x.T. In the symmetric loss
every token is an anchor and a key of all other images' anchors. Logits are symmetric too, so each pair of images is
visited once: a tile's row sums go to the anchors of one image, its column sums to those of the other. Once these
sums Z stand, the tiles are computed again, weighted by exp(logit) * (1/Z_row + 1/Z_column), and give the gradients
of rows and columns. Keys that are no anchors ("far": other ranks' tokens, or the second view of a one-sided loss)
need no second visit: when a block of anchors has seen all of them its Z is final, and its gradients follow at once.
So the gradient is known when the forward pass ends, and backward multiplies it by whatever arrives.

**Processes.** Of R ranks, rank r holds some of the M anchors of the whole batch and returns

    L_r = R / M * (sum of the losses of its own anchors),

the candidates being the tokens of all ranks. DDP averages over ranks, and

    1/R * sum_r L_r = 1/M * (sum of the losses of all anchors),

the loss of one process that holds the whole batch. Gradients: the gather's backward sums, over ranks, what each L_s
says about a token, so rank r holds the gradient of sum_s L_s with respect to its own tokens, and carries it on to
the weights through its own images; DDP adds these parts and divides by R, which gives the gradient of
1/R * sum_s L_s. A mean over local anchors would let the images of a small shard count for more; without the factor
R the gradient would shrink as ranks are added. Where gradients are summed over ranks instead of averaged, divide
the loss by R. Gradient accumulation is not a bigger batch: each micro-batch has its own negatives only.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import agree, gather, place
from .errors import SERError

__all__ = ["Contrast", "contrast", "patch_ntxent"]

_SHORTEST = 1e-12  # a token below this norm has no direction: all its similarities are 0, and so is its gradient
_PROBES = 256  # anchors that the accuracy looks at


class Contrast(NamedTuple):
    """The loss, with two detached scalars that say how to read it.

    chance is log(number of candidates), averaged over the anchors of all ranks: the loss of features that tell
    nothing apart. accuracy is how often the positive beats every other candidate, over at most 256 evenly spaced
    anchors of this rank's z1; NaN on a rank without images.
    """

    loss: Tensor
    chance: Tensor
    accuracy: Tensor


def patch_ntxent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.3,
    symmetric: bool = True,
    chunk_size: int | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    r"""Patch-wise NT-Xent between two views' aligned tokens (paper, Section 3.3, Equation 3).

    An anchor z1[i, j] has to find its positive z2[i, j] among the tokens of all other images, in both views:

        loss[i, j] = logsumexp({s(z1[i, j], z2[i, j])} ∪ {s(z1[i, j], z1[m, n]), s(z1[i, j], z2[m, n]) : m ≠ i})
                     - s(z1[i, j], z2[i, j]),        s = cosine similarity / temperature.

    Args:
        z1, z2: (B, N, D), N tokens of each of B images, token j of image i at the same place in both. Any floating
            dtype: double is computed in double, all else in float32, whatever autocast says (products of float32
            matrices as `torch.set_float32_matmul_precision` has them).
        temperature: above 0. The paper takes 0.3 (MoCo-v3, Barlow Twins) and 0.5 (DINO).
        symmetric: the mean of both directions, anchors from z1 and anchors from z2; else anchors from z1 alone.
        chunk_size: side of a tile of logits, in tokens. It trades memory for speed and never touches the result.
            By default 1536 on a CPU (tiles of 9 MiB), 4096 elsewhere (64 MiB).
        group: the processes whose images make up the batch, by default all there are. Images and grid sizes may
            differ between ranks in any way, and a rank may have no image, but every rank has to call, and then to
            go backward if one does. To compute the loss on one rank alone, give it a group of its own.

    Returns:
        Scalar, in nats, float32 (float64 for double): the mean over anchors. With several processes it is this
        rank's part, such that its mean over ranks, and that of the gradients (which DDP takes), are exactly those
        of one process with the whole batch. There is nothing left to scale.

    Raises:
        SERError: z1 and z2 unlike in shape, dtype or device; not floating; no tokens; fewer than 2 images over
            all ranks; temperature not above 0; chunk_size below 1. Ranks that disagree, or of which one is given
            such input: on every rank. Features that are not finite: on a CPU in eager mode; elsewhere looking
            would make the host wait, and the loss is NaN. A gradient of the gradient: not implemented.

    Example:
        >>> z = torch.eye(6).reshape(2, 3, 6)  # 2 images of 3 tokens, all orthogonal
        >>> patch_ntxent(z, z, temperature=1.0)  # a perfect match against 6 negatives: log(e + 6) - 1
        tensor(1.1654)
        >>> patch_ntxent(z, z.roll(1, dims=1), temperature=1.0)  # positives like any other: log(7)
        tensor(1.9459)
    """
    loss, _, _ = _loss(z1, z2, temperature, symmetric, chunk_size, group)
    return loss


def contrast(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    symmetric: bool,
    chunk_size: int | None,
    group: "dist.ProcessGroup | None",
    error: SERError | None = None,
) -> Contrast:
    """`patch_ntxent`, same arguments, with its diagnostics: they cost one more look at up to 256 anchors.

    `error` is why this rank cannot take part, if the caller has found a reason: every rank then raises it.
    """
    loss, counts, others = _loss(z1, z2, temperature, symmetric, chunk_size, group, error)
    total = sum(images * tokens for images, tokens in counts)
    chance = sum(images * tokens * math.log(1 + 2 * (total - tokens)) for images, tokens in counts) / total
    others = None if others is None else others.detach()
    accuracy = _accuracy(z1.detach(), z2.detach(), others, temperature, chunk_size)
    return Contrast(loss, loss.new_full((), chance), accuracy)


def _loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    symmetric: bool,
    chunk_size: int | None,
    group: "dist.ProcessGroup | None",
    error: SERError | None = None,
) -> tuple[Tensor, list[tuple[int, ...]], Tensor | None]:
    """The loss, (images, tokens of each) of every rank, and the tokens of all other ranks, ready to be keys."""
    differentiate = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
    rank, world = place(group)
    counts = _counts(z1, z2, temperature, symmetric, chunk_size, differentiate, world, group, error)
    weight, others = 1.0, None
    if world > 1:
        anchors = [images * tokens for images, tokens in counts]
        weight = world * anchors[rank] / sum(anchors)
        with torch.autocast(z1.device.type, enabled=False):
            mine = torch.cat([(z * _scale(z, temperature)).flatten(0, 1) for z in (z1, z2)])
        shards = gather(mine, [2 * n for n in anchors], group)
        # An image lives on one rank, so what another rank holds is another image, wherever it stands in the list.
        others = torch.cat([shard for owner, shard in enumerate(shards) if owner != rank])
    loss: Tensor = _PatchNTXent.apply(z1, z2, others, temperature, symmetric, chunk_size, weight, differentiate)
    return loss, counts, others


def _counts(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    symmetric: bool,
    chunk_size: int | None,
    differentiate: bool,
    world: int,
    group: "dist.ProcessGroup | None",
    error: SERError | None = None,
) -> list[tuple[int, ...]]:
    """(images, tokens of each) of every rank, once all input is found to be valid and in agreement."""
    call = f"patch_ntxent(z1, z2, temperature={temperature}, symmetric={symmetric}, chunk_size={chunk_size})"
    error = error or _complaint(call, z1, z2, temperature, chunk_size)
    if world == 1:
        if error is not None:
            raise error
        counts: list[tuple[int, ...]] = [(z1.shape[0], z1.shape[1])]
    else:
        images, tokens, width = z1.shape if error is None else (0, 0, 0)
        shared = {
            "feature dimension": (width, "SERLoss(dim, projection_dim=512)"),
            "bits per number": (torch.finfo(_precision(z1)).bits, "z1.float(), z2.float()"),
            "temperature": (temperature if error is None else 0, "temperature=0.3"),
            "symmetric": (symmetric, "symmetric=True"),
            "requires_grad": (differentiate, "torch.set_grad_enabled(True)"),
        }
        counts = agree(call, error, (images, tokens), shared, z1.device, group)
    if sum(images for images, _ in counts) < 2:
        given = f"z1 {tuple(z1.shape)}, {sum(images for images, _ in counts)} images in {world} processes"
        expected = "at least 2 images: negatives are tokens of other images"
        raise SERError(call, given, expected, "partition_size(batch_size, ratio, world_size)  # never 1")
    return counts


def _complaint(call: str, z1: Tensor, z2: Tensor, temperature: float, chunk_size: int | None) -> SERError | None:
    """What is wrong on this rank. Returned, not raised, for the other ranks have to hear of it."""

    def wrong(expected: str, remedy: str, given: str = "") -> SERError:
        views = (f"{name} {tuple(z.shape)} {z.dtype} on {z.device}" for name, z in (("z1", z1), ("z2", z2)))
        return SERError(call, given or ", ".join(views), expected, remedy)

    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        return wrong("a finite temperature above 0", "temperature=0.3", f"temperature={temperature}")
    if chunk_size is not None and chunk_size < 1:
        return wrong("a tile of at least 1 token", "chunk_size=None  # automatic", f"chunk_size={chunk_size}")
    if z1.ndim != 3 or z2.ndim != 3:
        return wrong("token lists (B, N, D)", "z1.flatten(2).mT, z2.flatten(2).mT  # from maps (B, D, h, w)")
    if z1.shape != z2.shape:
        return wrong("equal shapes", "act(g, z1)  # first: it brings z1 onto the grid of z2")
    if z1.dtype != z2.dtype or not z1.is_floating_point():
        return wrong("one floating point dtype", "z1.float(), z2.float()")
    if z1.device != z2.device:
        return wrong("one device", "z1.to(z2.device)")
    if z1.shape[0] and not (z1.shape[1] and z1.shape[2]):
        return wrong("tokens with features", "z1 = patch_tokens(vit, images, layer).flatten(2).mT")
    if z1.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would have to wait
        for name, z in (("z1", z1.detach()), ("z2", z2.detach())):
            # A finite sum proves finite features without a mask as large as they are; an infinite one nothing.
            if not math.isfinite(z.sum()) and not z.isfinite().all():
                bad = (~z.isfinite()).any(-1)
                given = f"{name} with {int(bad.sum())} of {bad.numel()} tokens not finite"
                return wrong("finite features", f"torch.isfinite({name}).all()  # and so on, upstream", given)
    return None


class _PatchNTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, others: Tensor | None, *options: Any) -> Tensor:
        _, ctx.symmetric, *_ = options
        ctx.shape, ctx.dtype = z1.shape, z1.dtype
        loss: Tensor
        loss, near_grad, far_grad = _stream(z1, z2, others, *options)
        ctx.save_for_backward(near_grad, far_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = "patch_ntxent(z1, z2).backward(create_graph=True)"
            raise SERError(call, "a gradient to be differentiated again", "first derivatives", "create_graph=False")
        near_grad, far_grad = ctx.saved_tensors
        g1, g2, others = _views(near_grad, far_grad, ctx.shape, ctx.symmetric)
        needed = ctx.needs_input_grad
        # Cast last: in half precision small gradients vanish unless a gradient scaler's factor is in before.
        return (
            (g1 * grad).to(ctx.dtype) if needed[0] else None,
            (g2 * grad).to(ctx.dtype) if needed[1] else None,
            others * grad if needed[2] else None,
            *[None] * 5,
        )


# An operator of its own, because a compiler that looked inside would unroll the loops over tiles.
@torch.library.custom_op(f"{__package__}::patch_ntxent", mutates_args=())
def _stream(
    z1: Tensor,
    z2: Tensor,
    others: Tensor | None,
    temperature: float,
    symmetric: bool,
    chunk_size: int | None,
    weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in the layout of near and far (empty unless `differentiate`)."""
    with torch.autocast(z1.device.type, enabled=False):
        images, tokens, _ = z1.shape
        near, far = _layout(z1, others, symmetric)
        x1, x2, _ = _views(near, far, z1.shape, symmetric)
        scale1, scale2 = _scale(z1, temperature), _scale(z2, temperature)
        torch.mul(z1, scale1, out=x1)
        torch.mul(z2, scale2, out=x2)
        directions = 2 if symmetric else 1
        positive = torch.linalg.vecdot(x1, x2).repeat(1, directions)  # (images, anchors of an image)

        # |logit| <= 1/temperature: where the dtype holds exponentials of that, a sum needs no running maximum.
        bounded = 1 / temperature < 2 / 3 * math.log(torch.finfo(near.dtype).max)
        side = _side(chunk_size, z1)
        negatives, near_grad, far_grad = _sweep(near, far, positive, side, not symmetric, bounded, differentiate)
        mean = weight / max(1, len(near))
        excess = negatives - positive  # the loss is log(1 + exp(excess)), which loses no digits when it is small
        loss = excess.logaddexp(torch.zeros_like(excess)).sum() * mean

        if differentiate:
            pull = -torch.sigmoid(excess).view(images, directions, tokens).sum(1).unsqueeze(-1)
            g1, g2, g_others = _views(near_grad, far_grad, z1.shape, symmetric)
            g1.addcmul_(pull, x2)
            g2.addcmul_(pull, x1)
            for g, x, scale in ((g1, x1, scale1), (g2, x2, scale2)):
                # Only what turns a token counts, since its length was divided out.
                g.addcmul_(x, torch.linalg.vecdot(g, x).unsqueeze(-1), value=-temperature).mul_(scale * mean)
            g_others *= mean
        return loss, near_grad, far_grad


@_stream.register_fake
def _(
    z1: Tensor,
    z2: Tensor,
    others: Tensor | None,
    temperature: float,
    symmetric: bool,
    chunk_size: int | None,
    weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    near, far = _layout(z1, others, symmetric)
    loss = near.new_empty(())
    return (loss, near, torch.empty_like(far)) if differentiate else (loss, near.new_empty(0), far.new_empty(0))


def _sweep(
    near: Tensor, far: Tensor, positive: Tensor, side: int, own_in_far: bool, bounded: bool, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of every anchor's negatives, shaped like `positive`, and the gradients that negatives give.

    near (images * span, D) are the anchors, image by image, and keys of one another; far (K, D) are keys alone. With
    `own_in_far`, image i is at i * span there too. `bounded` says that exponentials of logits need no shift.
    """
    images, span = positive.shape
    positive = positive.flatten()
    negatives = torch.full_like(positive, -math.inf)
    near_grad, far_grad = (torch.zeros_like(x) if differentiate else x.new_empty(0) for x in (near, far))
    height = max(min(side * side // max(1, len(far)), len(near)), near.shape[1] // 8, 1)  # of a band of far logits
    buffer = near.new_empty(max(min(side, len(near)) ** 2, height * len(far)))

    for rows, keys in _tiles(0, images, span, side):
        tile = _matrix(buffer, rows, keys)
        torch.mm(near[rows], near[keys].mT, out=tile)
        if bounded:
            tile.exp_()
            by_row, by_key = tile.sum(1).log(), tile.sum(0).log()
        else:
            by_row, by_key = tile.logsumexp(1), tile.logsumexp(0)
        negatives[rows] = negatives[rows].logaddexp(by_row)
        negatives[keys] = negatives[keys].logaddexp(by_key)

    for rows, own in _bands(images, span, height, own_in_far) if len(far) else ():
        band = _matrix(buffer, rows, slice(own.stop - own.start, len(far)))
        # The anchors' own image is cut out of the keys, which leaves a run before it and one after it.
        runs = slice(0, own.start), slice(own.stop, len(far))
        tiles = band.tensor_split((own.start,), 1)
        for run, tile in zip(runs, tiles, strict=True):
            torch.mm(near[rows], far[run].mT, out=tile)
        shift = band.new_zeros(()) if bounded else band.amax(1)
        band.sub_(shift.unsqueeze(-1)).exp_()
        negatives[rows] = negatives[rows].logaddexp(band.sum(1).log() + shift)
        if differentiate:
            share = torch.exp(shift - negatives[rows].logaddexp(positive[rows])).unsqueeze(-1)
            for run, tile in zip(runs, tiles, strict=True):
                near_grad[rows].addmm_(tile, far[run])
                far_grad[run].addmm_(tile.mT, near[rows] * share)
            near_grad[rows] *= share

    spare = torch.empty_like(buffer)
    log_z = negatives.logaddexp(positive)
    inverse = torch.exp(-log_z)
    for rows, keys in _tiles(0, images, span, side) if differentiate else ():
        tile, weight = _matrix(buffer, rows, keys), _matrix(spare, rows, keys)
        torch.mm(near[rows], near[keys].mT, out=tile)
        if bounded:
            tile.exp_().mul_(torch.add(inverse[rows, None], inverse[keys], out=weight))
        else:
            torch.sub(tile, log_z[keys], out=weight)
            tile.sub_(log_z[rows, None]).exp_().add_(weight.exp_())
        near_grad[rows].addmm_(tile, near[keys])
        near_grad[keys].addmm_(tile.mT, near[rows])
    return negatives.view(images, span), near_grad, far_grad


def _tiles(first: int, last: int, span: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of different images in [first, last) once, as tiles (rows, keys) of tokens, `span` per image."""
    if last - first > 1:
        middle = (first + last) // 2
        for rows in _spans(first * span, middle * span, side):
            for keys in _spans(middle * span, last * span, side):
                yield rows, keys
        yield from _tiles(first, middle, span, side)
        yield from _tiles(middle, last, span, side)


def _bands(images: int, span: int, height: int, own_in_far: bool) -> Iterator[tuple[slice, slice]]:
    """Every anchor once, as (rows, the far keys of the same image)."""
    if own_in_far:
        for own in _spans(0, images * span, span):
            for rows in _spans(own.start, own.stop, height):
                yield rows, own
    else:
        for rows in _spans(0, images * span, height):
            yield rows, slice(0, 0)


def _spans(start: int, stop: int, longest: int) -> Iterator[slice]:
    """[start, stop) in even pieces of at most `longest`."""
    pieces = -(-(stop - start) // longest)
    for i in range(pieces):
        yield slice(start + (stop - start) * i // pieces, start + (stop - start) * (i + 1) // pieces)


def _matrix(buffer: Tensor, rows: slice, keys: slice) -> Tensor:
    """The start of the buffer as a matrix: memory that was just used is still in cache."""
    height, width = rows.stop - rows.start, keys.stop - keys.start
    return buffer[: height * width].view(height, width)


def _layout(z1: Tensor, others: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(near, far) of the right size: the anchors, and the keys that are no anchors, `others` already in place."""
    images, tokens, width = z1.shape
    dtype = _precision(z1)
    others = z1.new_empty(0, width, dtype=dtype) if others is None else others
    if symmetric:
        return z1.new_empty(2 * images * tokens, width, dtype=dtype), others
    near = z1.new_empty(images * tokens, width, dtype=dtype)
    return near, torch.cat([torch.empty_like(near), others])


def _views(near: Tensor, far: Tensor, shape: torch.Size, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What near and far hold: (first view, second view, others). Symmetric: both views of an image side by side."""
    images, tokens, width = shape
    if symmetric:
        first, second = near.view(images, 2, tokens, width).unbind(1)
        return first, second, far
    return near.view(shape), far[: len(near)].view(shape), far[len(near) :]


def _side(chunk_size: int | None, z: Tensor) -> int:
    return chunk_size or (1536 if z.device.type == "cpu" else 4096)  # CPU: the fastest of 512 to 2048 at D = 512


def _scale(z: Tensor, temperature: float) -> Tensor:
    """(B, N, 1): what a token is multiplied by, so that products of two are logits."""
    length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=_precision(z))
    length = torch.where(length < math.inf, length, math.nan)  # never a number from features that are none
    scale: Tensor = temperature**-0.5 / length.masked_fill(length < _SHORTEST, math.inf)
    return scale


def _precision(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.custom_op(f"{__package__}::accuracy", mutates_args=())
def _accuracy(z1: Tensor, z2: Tensor, others: Tensor | None, temperature: float, chunk_size: int | None) -> Tensor:
    """How often, among evenly spaced anchors of z1, the positive beats every other candidate."""
    with torch.autocast(z1.device.type, enabled=False):
        x1, x2 = ((z * _scale(z, temperature)).flatten(0, 1) for z in (z1, z2))
        far = x1.new_empty(0, z1.shape[2]) if others is None else others
        token = torch.arange(len(x1), device=z1.device)
        probe = token[:_PROBES] * len(x1) // max(1, min(len(x1), _PROBES))
        anchors, positive = x1[probe], torch.linalg.vecdot(x1[probe], x2[probe])
        best = torch.full_like(positive, -math.inf)
        for keys in _spans(0, len(x1), _side(chunk_size, z1)):
            own = probe[:, None] // z1.shape[1] == token[keys] // z1.shape[1]
            for x in (x1, x2):
                best = best.maximum((anchors @ x[keys].mT).masked_fill_(own, -math.inf).amax(1))
        for keys in _spans(0, len(far), _side(chunk_size, z1)):
            best = best.maximum((anchors @ far[keys].mT).amax(1))
        accuracy: Tensor = (positive > best).to(anchors.dtype).mean()
    return accuracy


@_accuracy.register_fake
def _(z1: Tensor, z2: Tensor, others: Tensor | None, temperature: float, chunk_size: int | None) -> Tensor:
    return z1.new_empty((), dtype=_precision(z1))
