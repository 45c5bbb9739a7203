"""A backbone: what the library and its examples ask of a model, whatever its family.

To add a family, write one file with a subclass that defines what is abstract here, and add it to `families.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import SERError, require
from .inputs import check_tensor, warn_if_far
from .prefix import is_late

__all__ = ["Backbone"]


class Backbone(ABC):
    """A model seen through one interface. Cheap to make; it holds the `model` and nothing else.

    A map is (B, D, h, w). A `layer` counts the layers already run, blocks of a ViT or stages of a pyramid: map 0
    enters the first one, map `depth` leaves the last one, before the final norm.
    """

    described: ClassVar[str]
    """The family in words, as an error names it."""
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The model classes of this family."""
    untouched: ClassVar[tuple[str, ...]] = ()
    """Methods that a subclass of these leaves as they are; with its own it is of another family."""
    unit: ClassVar[str] = "blocks"
    """What a layer is called."""
    sequence: ClassVar[bool] = False
    """Whether a layer runs on one sequence (B, N, D), prefix tokens first, then the patches: what `late_cls` needs."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __repr__(self) -> str:
        height, width = self.size
        size = f"images of {height} x {width} pixels{' or any other size' if self.any_size else ''}"
        known = f"{type(self.model).__name__}: {self.depth} {self.unit}, {self.width()} channels, {size}"
        return known + (f". {self.joins}" if self.cls_layer else "")

    # What a family defines: the modules ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""

    @property
    @abstractmethod
    def entries(self) -> list[nn.Module]:
        """Module i is called, in every forward, with map i as its first argument, in the model's own layout."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Module:
        """The module that is called with the images (B, C, H, W), once a forward."""

    @property
    @abstractmethod
    def projection(self) -> nn.Module:
        """The module whose weight turns pixels into channels."""

    @property
    def positions(self) -> nn.Parameter | None:
        """The embedding of positions that is added to the patches, (1, N, D), prefix tokens first if they have one."""
        return None

    @property
    def prefix(self) -> int:
        """Tokens ahead of the patches: [CLS], registers, distillation."""
        return 0

    # What a family defines: sizes ------------------------------------------------------------------------------------

    @abstractmethod
    def width(self, layer: int | None = None) -> int:
        """Channels D of the map after `layer`; None: the last."""

    @abstractmethod
    def stride(self, layer: int | None = None) -> int:
        """Pixels a side of a token of the map after `layer`; None: the last."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was built for."""

    @property
    @abstractmethod
    def any_size(self) -> bool:
        """Whether images may differ in size from the one that the model was built for."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels C of its images."""

    @property
    @abstractmethod
    def mean(self) -> tuple[float, float, float]:
        """Mean of the pixels of [0, 1] that its images are normalised by."""

    @property
    @abstractmethod
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the pixels of [0, 1] that its images are normalised by."""

    @abstractmethod
    def check_size(self, call: str, size: tuple[int, int], layer: int) -> tuple[int, int]:
        """The grid (h, w) of the map after `layer` for images of this (height, width).

        Raises:
            SERError: the model does not take them, or they do not fill the grid (unless it was built to pad them).
        """

    def check_model(self, call: str) -> None:  # noqa: B027  # most families have no such model
        """Raise if the model is one of the family that its own package runs wrongly."""

    def check_mode(self, call: str) -> None:  # noqa: B027  # most families have no such mode
        """Raise if the model, as it is set now, would give maps with holes."""

    # What a family defines: computing --------------------------------------------------------------------------------

    @abstractmethod
    def as_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What an entry is called with, as a map, without a copy where that can be."""

    @abstractmethod
    def run(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """Maps by layer of at least one image, already checked, from one forward that stops after the last of these.

        The computation is the model's own, as it is set: training or evaluation, checkpointing, late [CLS].
        """

    def run_empty(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """`run` without an image: a rank that has none still owes its parameters a gradient, of zeros."""
        found = self.run(images.new_zeros(1, *images.shape[1:]), layers)
        return {layer: x[:0] for layer, x in found.items()}

    @abstractmethod
    def position_coding(self) -> list[str]:
        """How the model is told positions, in words; empty if it is not."""

    @abstractmethod
    def without_positions(self) -> Any:
        """A copy of the model that is not told positions; of the same family."""

    @property
    def has_class_tokens(self) -> bool:
        """Whether there are `class_tokens`: a [CLS] and a final norm."""
        return False

    def class_tokens(self, images: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """For linear evaluation: (B, D), as the model pools; (B, last·D), the normalised [CLS] of the last blocks."""
        call = f"backbone(model).class_tokens(images, {last})"
        given = f"{type(self.model).__name__}, which has no normalised [CLS]"
        raise SERError(call, given, "a model with [CLS] and a final norm", "model(images)  # what it pools")

    @abstractmethod
    def classifier(self, classes: int) -> nn.Module:
        """Give the model a new classifier, in place, and return its last module: what the model gives is its output."""

    # What follows ----------------------------------------------------------------------------------------------------

    @classmethod
    def overridden(cls, kind: type) -> list[str] | None:
        """Names of `untouched` methods that a class of models has its own of; None if it is of another family."""
        own = [
            [name for name in cls.untouched if getattr(kind, name) is not getattr(known, name)]
            for known in cls.classes
            if issubclass(kind, known)
        ]
        return min(own, key=len) if own else None

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        """Whether this model is of this family."""
        return cls.overridden(type(model)) == []

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def patch_size(self) -> int:
        """Pixels a side of a token of map 0."""
        return self.stride(0)

    @property
    def has_prefix(self) -> bool:
        """Whether there are prefix tokens, which `late_cls` can let join late."""
        return self.sequence and self.prefix > 0

    @property
    def cls_layer(self) -> int:
        """After how many blocks the prefix tokens join: what `late_cls` was last called with, 0 for the plain model."""
        return sum(is_late(block) for block in self.layers)

    @property
    def joins(self) -> str:
        """Where the prefix tokens join, in words that one needs where a model is loaded by something else."""
        layer = self.cls_layer
        if not layer:
            return "[CLS] joins at the first block, as in plain timm." if self.has_prefix else "No [CLS] joins."
        return (
            f"[CLS] joins after {layer} blocks. Plain timm lets it in at the first, also with these weights, and gives "
            f"other features without an error: after loading, type late_cls(model, {layer})."
        )

    def grid(self, size: tuple[int, int], layer: int | None = None) -> tuple[int, int]:
        """(h, w) of the map after `layer` (None: the last) for images of this (height, width) in pixels.

        Raises:
            SERError: the model does not take this size, or has no such layer.
        """
        call = f"backbone(model).grid({size}, {layer!r})"
        layer = self.depth if layer is None else layer
        self.check_layer(call, layer)
        return self.check_size(call, size, layer)

    def maps(self, images: Tensor, layers: Iterable[int], call: str | None = None) -> dict[int, Tensor]:
        """Maps (B, D, h, w) by layer, in the order asked for, from one forward that runs no layer behind the last.

        Args:
            images: (B, C, H, W), normalised as for the model; none (B = 0) included.
            layers: 0 to depth each.
            call: what the user typed, for errors.

        Raises:
            SERError: what `patch_tokens` raises.
        """
        layers = list(layers)
        call = f"backbone(model).maps(images, {layers!r})" if call is None else call
        if any(base.__name__ == "FSDPModule" for base in type(self.model).__mro__):
            given, expected = "a model sharded by FSDP2", "all its parameters, there during its normal forward only"
            remedy = f"with TokenTap(model, {max(layers, default=0)}) as tap: model(images); z = tap.tokens"
            raise SERError(call, given, expected, remedy)
        for layer in layers:
            self.check_layer(call, layer)
        self.check_images(call, images, max(layers, default=0))
        if not layers:
            return {}
        found = self.run(images, layers) if len(images) else self.run_empty(images, layers)
        return {layer: found[layer] for layer in layers}

    def check_layer(self, call: str, layer: Any, last: int | None = None) -> None:
        """Raise unless `layer` is a whole number from 0 to `last` (None: the depth)."""
        last = self.depth if last is None else last
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last:
            remedy = call.replace(repr(layer), str(min(3, last)))
            raise SERError(call, f"layer={layer!r}", f"a whole number of {self.unit} from 0 to {last}", remedy)

    def check_layers(self, call: str, layers: Any) -> list[int]:
        """These numbers of layers, in order and each once; raise unless there are some, as a list."""
        several = isinstance(layers, Iterable) and not isinstance(layers, (str, Tensor, Mapping))
        given, remedy = (
            f"layers={layers!r}",
            f"layers=[{layers!r}]" if type(layers) is int else f"layers=[{min(3, self.depth)}]",
        )
        expected = "several numbers of layers"
        require(several, call, given, expected, remedy)
        found = list(layers)
        for layer in found:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.depth:
                numbers = f"whole numbers of {self.unit} from 0 to {self.depth}"
                raise SERError(call, f"layers={found!r}", numbers, f"layers=[{min(3, self.depth)}]")
        require(found, call, "layers=[]", expected, f"layers=[{min(3, self.depth)}]")
        return sorted(set(found))

    def check_tensor(self, call: str, images: Any) -> None:
        """Raise unless these are images (B, C, H, W) of the model's channels, type and device, of whatever size."""
        check_tensor(call, images, self.embedding, self.channels)
        warn_if_far(images, self.mean, self.std)

    def check_images(self, call: str, images: Tensor, layer: int | None = None) -> tuple[int, int]:
        """The grid of the map after `layer` (None: the last) of these images.

        Raises:
            SERError: the model does not take them, naming `call`, the call that the user made.
        """
        self.check_tensor(call, images)
        self.check_mode(call)
        height, width = images.shape[-2:]
        return self.check_size(call, (height, width), self.depth if layer is None else layer)
