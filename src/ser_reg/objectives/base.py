"""What a term is: features of several views, and how the views were made, give a loss to add.

A new term is a file beside this one with a subclass of `Objective`, and a line in `OBJECTIVES`. It sets `wants` and
`policy`, takes ``Term(dim, own settings, *, maker=None)``, each setting explained by its name under Args, where the
trainings' flags read it, and writes `compare`:

1. It reads what it needs of the views. By reading.py, which has a crop's box and what was drawn for colours, and raises
   where views are of another kind.
2. It says its first word to the other ranks: `image_counts`, or a loss of losses/, which counts by itself.
3. It computes. By heads.py, whose perceptrons and batch norm are over all ranks as torch's are not, and which averages
   maps over their places; what is compared across images is gathered, or given to a loss of losses/; losses of single
   images are averaged by `mean_over_ranks`.
4. It logs. By measures.py: ``accuracy`` or ``r2``, ``chance`` (the loss when nothing is told), ``feature_std`` (0 when
   all are one) and, of maps, ``matching``.

What all terms share is done here. ``ser_reg.check(model, term=Term)`` asks a new one whether it trains what it should.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import (
    all_gather_counts,
    mark_as_raised_on_all_ranks,
    raise_on_all_ranks,
    rank_and_world_size,
)
from ..errors import SERError, require
from ..losses.ntxent import largest_square, largest_value
from ..views.view import View

__all__ = [
    "FINITE",
    "SQUARABLE",
    "Objective",
    "Output",
    "check_number",
    "check_numbers",
    "check_size",
    "mean_over_ranks",
]

# What is expected of features while a training goes well; one that does not can be told by these words.
FINITE, SQUARABLE = "finite features", "numbers that can be squared"
FIRST_CALLS = 3  # in which ranks compare their parameters: a difference shows at once, and later calls cost nothing


class Output(NamedTuple):
    """The loss, and what shows that it works."""

    loss: Tensor
    """Scalar, with gradient. Its weight λ belongs to your loop: ``loss = ssl_loss + 0.5 * term(z, views).loss``."""
    logs: dict[str, Tensor]
    """Detached scalars by name, on the device of the features, so that logging costs no wait until they are read; NaN
    where this rank cannot know. What to look at first comes first."""

    def __add__(self, other: object) -> NoReturn:
        raise _not_a_number()

    def __radd__(self, other: object) -> NoReturn:
        raise _not_a_number()

    def __mul__(self, other: object) -> NoReturn:
        raise _not_a_number()

    def __rmul__(self, other: object) -> NoReturn:
        raise _not_a_number()


def _not_a_number() -> SERError:
    given, remedy = "an Output, which holds more than a number", "loss = loss + 0.5 * term(z, views).loss"
    return SERError("loss + term(z, views)", given, "its loss", remedy)


class Objective(nn.Module):
    """A term beside an SSL loss. Parameters of its own are trained: give them to the optimiser, and in a distributed
    run wrap it like the model (or put both into one module).

    Args:
        dim: D, channels of the features.
        maker: what made the views, for terms whose heads depend on what it draws.

    Raises:
        SERError: `dim` is no positive whole number.
    """

    wants: str = ""
    """The line to type that makes its views; quoted in its errors."""
    policy: str = "equivariant"
    """Which kind of views it compares: "equivariant" (whole images, moved), "cropped" (two crops), "original" (crops,
    and the original ahead of them), "turned" (one crop, turned four ways), "paired" (crops of images in pairs) or
    "path" (two views, and images on the way as targets). Trainings choose views by it, and know no term by name."""
    encoded: int = 2
    """How many of the views are encoded; behind them there are none, or, with the policy "path", targets."""
    dense: bool = True
    """Whether it wants maps (B, D, h, w). Otherwise vectors (B, D) do too, and maps are averaged over their places."""
    default_weight: float = 1.0
    """λ of the source, which trainings take unless told."""
    gathers: bool = True
    """Whether `compare` gathers over ranks, beginning with `all_gather_counts`, as the losses of this library do."""
    half_precision: bool = False
    """Whether parameters may be of half precision. Batch norm and cross-entropy of heads want float32."""
    keys_width: int = 0
    """Numbers of each token that other ranks receive."""

    def __init__(self, dim: int, *, maker: object = None) -> None:
        super().__init__()
        check_size(f"{type(self).__name__}(dim)", "dim", dim, f"{type(self).__name__}(vit.embed_dim)")
        self.dim = dim
        self.maker = maker
        self._compared = 0  # calls in which ranks compared their parameters

    def compare(self, features: list[Tensor], views: list[View], group: dist.ProcessGroup | None) -> Output:
        """What a term writes: its loss and logs.

        It may raise a SERError ahead of the first word between ranks, as all raise it then.

        Args:
            features: one map (B, D, h, w), or vectors (B, D) if the term is not `dense`, for each encoded view,
                checked, in float32 (float64 if the parameters are), outside autocast. B may be 0 on some ranks.
            views: those that are encoded, and targets behind them if the policy is "path".
            group: the processes whose images are one batch.
        """
        raise NotImplementedError

    def forward(
        self, features: Sequence[Tensor], views: Sequence[View], group: dist.ProcessGroup | None = None
    ) -> Output:
        """The term for a batch of images, of which there are several views.

        Args:
            features: one map (B, D, h, w) for each of the views that are encoded, in their order; terms that are not
                `dense` take vectors (B, D) as well.
            views: as a maker gave them, in a tuple or a list.
            group: the processes whose images are one batch; by default all there are.

        Raises:
            SERError: features or views that do not fit the term or each other, features without gradient in training,
                or, on a CPU, such that are not finite. In a distributed run it is raised on every rank.
        """
        call = f"{type(self).__name__}(...)(features, views)"
        # Here and below no next(..., default): torch.compile of torch 2.6 cannot trace that.
        some = features if isinstance(features, (list, tuple, Tensor)) else ()
        device = [*(z.device for z in some if isinstance(z, Tensor)), torch.device("cpu")][0]
        # One float32 island: half precision loses tokens in resampling and candidates in the log-sum-exp.
        with torch.autocast(device.type, enabled=False):
            _, world_size = rank_and_world_size(group)
            try:
                checked = self._checked(call, features, views)
                if world_size > 1 and self.training and self._compared < FIRST_CALLS:
                    self._compared += 1
                    self._compare_parameters(call, device, group)
                output = self.compare(checked, list(views), group)
            except SERError as error:
                raise_on_all_ranks(error, device, group)
            if world_size > 1 and not self.gathers:
                all_gather_counts(call, None, (), {}, device, group)  # or a rank that raised would wait for ever
            return output

    def image_counts(
        self, call: str, features: Sequence[Tensor], group: dist.ProcessGroup | None, least: int = 2
    ) -> list[int]:
        """Images of every rank, or an error on all of them: the first word between ranks of a term.

        Args:
            call: what the user called, for the message.
            features: what `compare` was given.
            group: the processes whose images are one batch.
            least: how many images all ranks need together; batch norm cannot do with one.
        """
        n, device = len(features[0]), features[0].device
        _, world_size = rank_and_world_size(group)
        counts: list[tuple[int, ...]] = [(n,)]
        if world_size > 1:
            gradient = torch.is_grad_enabled() and any(z.requires_grad for z in features)
            alike = {"training mode": (float(self.training), "term.train()  # or term.eval()")}
            alike["requires_grad"] = (float(gradient), "torch.set_grad_enabled(True)")
            counts = all_gather_counts(call, None, (n,), alike, device, group)
        total = sum(images for images, *_ in counts)
        if total < least:
            given = f"{total} images in {world_size} processes"
            remedy = "partition_size(batch_size, ratio, world_size)  # never 1"
            raise mark_as_raised_on_all_ranks(SERError(call, given, f"at least {least} images", remedy))
        return [images for images, *_ in counts]

    def _compare_parameters(self, call: str, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Raise, on all ranks, if their parameters differ: those of a term that was not wrapped drift apart."""
        parameters = list(self.parameters())
        if any(hasattr(p, "full_tensor") for p in parameters):
            return  # sharded, so that each rank holds others
        checksum = sum((p.detach().double().abs().sum().item() for p in parameters), 0.0)
        remedy = "term = torch.nn.parallel.DistributedDataParallel(term)  # or one module with the model"
        all_gather_counts(call, None, (), {"sum of the term's parameters": (checksum, remedy)}, device, group)

    def _checked(self, call: str, features: Sequence[Tensor], views: Sequence[View]) -> list[Tensor]:
        """The features, in the precision of the island."""
        listed = isinstance(features, (list, tuple, Tensor)) and isinstance(views, (list, tuple))
        given = f"features in a {type(features).__name__}, views in a {type(views).__name__}"
        require(listed, call, given, "a list or a tuple of each", "z = [patch_tokens(vit, v.images, 3) for v in views]")
        given = f"{len(features)} features, {len(views)} views"
        has_targets = self.policy == "path" and len(views) >= self.encoded
        fit = len(features) == self.encoded and (has_targets or len(views) == self.encoded)  # more: which are meant?
        require(fit, call, given, f"{self.encoded} features, and the views they are of", self.wants)
        for i, view in enumerate(views, start=1):
            require(isinstance(view, View), call, f"view {i} is a {type(view).__name__}", "views", self.wants)
        for i, (z, view) in enumerate(zip(features, views, strict=False), start=1):
            self._check_map(call, f"features of view {i}", z, view)
        z1 = features[0]
        counts = " and ".join(str(len(z)) for z in features)
        require(len({len(z) for z in features}) == 1, call, f"{counts} images", "views of the same images", self.wants)
        require(
            not (self.training and torch.is_grad_enabled()) or any(z.requires_grad for z in features),
            call,
            "features without gradient, in training",
            "features of the encoder, not detached: else the term trains its own heads alone",
            "term.eval()  # or, to train, patch_tokens(vit, view.images, layer=3) outside torch.no_grad()",
        )
        weight = [*self.parameters(), z1][0]
        require(
            all(z.device == weight.device for z in features),
            call,
            lambda: ", ".join(f"features on {z.device}" for z in features) + f", the term on {weight.device}",
            "one device",
            f"term.to({str(z1.device)!r})",
        )
        half = weight is not z1 and weight.dtype in (torch.float16, torch.bfloat16)
        given, expected = f"a term of {weight.dtype}", "parameters in float32; features may be of half precision"
        require(self.half_precision or not half, call, given, expected, "term.float()")
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        cast = [z.to(dtype) for z in features]
        if z1.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would have to wait
            check_numbers(call, cast)
        return cast

    def _check_map(self, call: str, name: str, z: Tensor, view: View) -> None:
        wanted = f"token maps (B, {self.dim}, h, w)" + ("" if self.dense else f" or vectors (B, {self.dim})")
        require(
            isinstance(z, Tensor) and z.ndim in ((4,) if self.dense else (2, 4)),
            call,
            lambda: f"{name} {tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__}",
            wanted,
            "z = [patch_tokens(vit, view.images, layer=3) for view in views]",
        )
        last = z.ndim == 4 and z.shape[-1] == self.dim
        require(
            z.shape[1] == self.dim,
            call,
            f"{name} {tuple(z.shape)}",
            wanted,
            "z.permute(0, 3, 1, 2)  # channels first" if last else f"{type(self).__name__}({z.shape[1]})",
        )
        require(z.is_floating_point(), call, f"{name} of {z.dtype}", "floating point features", "z.float()")
        require(
            len(view.relation) in (len(z), 1),
            call,
            f"{name} of {len(z)} images, of which the view has {len(view.relation)}",
            "features and views of the same images",
            self.wants,
        )


def check_numbers(call: str, features: Sequence[Tensor]) -> None:
    """Raise unless features are finite, and small enough to be squared."""
    largest = [largest_value(z) for z in features]
    bad = [str(i) for i, value in enumerate(largest, start=1) if not value < math.inf]
    given = f"NaN or infinity in the features of view {' and '.join(bad)}"
    require(not bad, call, given, FINITE, "torch.autograd.set_detect_anomaly(True)")
    given, remedy = f"features up to {max(largest):.1e}", "torch.nn.functional.layer_norm(z, z.shape[1:])"
    require(max(largest) <= largest_square(features[0]), call, given, SQUARABLE, remedy)


def check_size(call: str, name: str, value: object, remedy: str) -> None:
    """Raise unless a width is a positive whole number."""
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(fine, call, f"{name}={value!r}", "a positive whole number", remedy)


def check_number(call: str, name: str, value: object, remedy: str, positive: bool = False) -> None:
    """Raise unless a setting is a finite number, not below 0 (or, if told so, above)."""
    fine = isinstance(value, (int, float)) and 0 <= value < math.inf and not (positive and value == 0)
    require(fine, call, f"{name}={value!r}", "a positive number" if positive else "a number, not below 0", remedy)


def mean_over_ranks(values: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's summand of the mean over all images, such that its mean over ranks, which DDP takes, is that mean.

    Args:
        values: (n,), of the images of this rank.
        counts: how many there are on each rank.
        group: the processes whose images are one batch.

    Example:
        >>> mean_over_ranks(torch.tensor([1.0, 3.0]), [2])
        tensor(2.)
    """
    _, world_size = rank_and_world_size(group)
    mean: Tensor = values.sum() * (world_size / max(1, sum(counts)))
    return mean
