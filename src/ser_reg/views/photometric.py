"""Photometric changes, drawn for each image and recorded, with Pillow's arithmetic."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import require, require_tensor
from .colour import box_reach
from .stages import FACTORS, IDENTITY, grouped, masked
from .view import View

__all__ = ["Photometric", "check_generator"]

SHARES = ("jitter", "grey", "blur", "solarize")
DRAWN = ("jitter", "order", *FACTORS, "grey", "blur", "sigma", "solarize")
CALL = "Photometric(...)(images)"


class Photometric:
    """Colour jitter, greyscale, blur and solarisation, drawn for each image and recorded.

    In this order, which is that of the recipes of MoCo-v3, DINO, Barlow Twins and VICReg:

    1. jitter: brightness, contrast, saturation and hue, in an order drawn for each image, by the law of torchvision's
       ``RandomApply([ColorJitter(...)], jitter)``;
    2. grey: Pillow's "L" in three channels;
    3. blur: Pillow's ``GaussianBlur`` (three box blurs that make up a Gaussian);
    4. solarize: values of 128/255 and more are inverted.

    Takes images with values in [0, 1], before they are normalised, and gives values in [0, 1]. Each operation ends in
    one of 256 values, as Pillow's do, which is where most recipes were tuned: numbers are Pillow's own, but in hue,
    where one pixel in a few hundred is another of the 256 steps, and in blur, which is rounded once where Pillow
    rounds six times (mean difference below 1/255). An image that no operation was drawn for stays as it is.

    Nothing loops over images and nothing waits for the device: images are taken in groups, an operation at a time, by
    indices of the draws, which are on the CPU. Under ``torch.compile``, or with draws moved to a GPU, all images
    go through all operations, and masks say which result each keeps: one graph, and the same numbers as far as the
    compiler keeps the order of arithmetic. The result has no gradient: rounding has none.

    Args:
        brightness: b; the factor is uniform in [max(0, 1 - b), 1 + b].
        contrast: likewise.
        saturation: likewise.
        hue: h, at most 0.5; the shift is uniform in [-h, h] of a turn.
        jitter: probability of these four together; one whose range is 0 is left out.
        grey: probability of losing all colour.
        blur: probability of a blur.
        sigma: range of the blur's standard deviation in pixels, uniform.
        solarize: probability of solarisation.

    Raises:
        SERError: a probability outside [0, 1], a range below 0, or a hue of more than half a turn.

    Source: Section 3.2 of the paper (the photometric part of its views); torchvision's ``ColorJitter``.

    Example:
        >>> photometric = Photometric(blur=0.1, solarize=0.2)  # MoCo-v3's second view
        >>> images = torch.rand(4, 3, 32, 32)
        >>> drawn = photometric.draw(4, torch.Generator().manual_seed(0))
        >>> drawn["jitter"].tolist(), drawn["order"].shape
        ([True, True, False, True], torch.Size([4, 4]))
        >>> torch.equal(photometric.apply(images, drawn), photometric(images, torch.Generator().manual_seed(0)))
        True
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        jitter: float = 0.8,
        grey: float = 0.2,
        blur: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.0,
    ) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue
        self.jitter = jitter
        self.grey = grey
        self.blur = blur
        self.sigma = sigma
        self.solarize = solarize
        for name in FACTORS[:3]:
            self._check_setting(name, math.inf, "a half range, a number from 0", 0.4)
        self._check_setting("hue", 0.5, "a part of a turn from 0 to 0.5", 0.1)
        for name in SHARES:
            self._check_setting(name, 1, "a probability, 0 to 1", 0.5)
        pair = isinstance(sigma, (tuple, list)) and len(sigma) == 2 and all(_is_number(end) for end in sigma)
        require(
            pair and 0 <= sigma[0] <= sigma[1] < math.inf,
            "Photometric(...)",
            f"sigma={sigma!r}",
            "a range (low, high) of deviations in pixels",
            "Photometric(sigma=(0.1, 2.0))",
        )

    def _check_setting(self, name: str, most: float, expected: str, usual: float) -> None:
        value = getattr(self, name)
        fine = _is_number(value) and 0 <= value <= most and value < math.inf
        require(fine, "Photometric(...)", f"{name}={value!r}", expected, f"Photometric({name}={usual})")

    def __repr__(self) -> str:
        return f"Photometric({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images changed by what is drawn for them: `apply` of `draw`."""
        _check_images(images)
        return self.apply(images, self.draw(len(images), generator))

    def view(self, view: View, generator: torch.Generator | None = None) -> View:
        """The view with its images changed, and what was drawn for them in `drawn`, beside what is there.

        Example:
            >>> from ser_reg import GroupElement
            >>> upright = View(torch.rand(2, 3, 32, 32), GroupElement.identity(2), {})
            >>> Photometric(hue=0).view(upright).drawn["hue"]
            tensor([0., 0.])
        """
        given, remedy = f"a {type(view).__name__}", "photometric(images)  # or a view that a maker gave"
        require(isinstance(view, View), "Photometric(...).view(view)", given, "a View", remedy)
        _check_images(view.images)
        drawn = self.draw(len(view.images), generator)
        return View(self.apply(view.images, drawn), view.relation, {**view.drawn, **drawn})

    def draw(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What is done to each of n images, on the CPU: the same for any device of the images.

        Args:
            n: images.
            generator: source of all randomness, on the CPU; without one, the global state is used.

        Returns:
            jitter, grey, blur, solarize (n,) bool, whether it is applied; order (n, 4) int64, which operation comes
            first, second, … (0 brightness, 1 contrast, 2 saturation, 3 hue); brightness, contrast, saturation (n,)
            float32, factors; hue (n,) float32, in turns; sigma (n,) float32, in pixels. Where it is not applied: the
            order 0, 1, 2, 3, factors 1, hue 0, sigma 0.

        Raises:
            SERError: n is no number of images, or the generator is on a GPU.
        """
        call = "Photometric(...).draw(n, generator)"
        whole = isinstance(n, int) and not isinstance(n, bool) and n >= 0
        given = f"n={n!r}" if isinstance(n, (int, float)) else f"a {type(n).__name__} for n"
        require(whole, call, given, "a number of images", "photometric.draw(len(images))")
        check_generator(call, generator)
        uniform = torch.rand(n, 13, generator=generator)
        shares = uniform.new_tensor([getattr(self, name) for name in SHARES])
        jitter, grey, blur, solarize = (uniform[:, :4] < shares).unbind(1)
        order = torch.where(jitter[:, None], uniform[:, 4:8].argsort(1), torch.arange(4))
        identity = uniform.new_tensor(IDENTITY)
        half = uniform.new_tensor([getattr(self, name) for name in FACTORS])
        low, high = identity - half, identity + half
        low[:3].clamp_(min=0)
        factors = torch.where(jitter[:, None], low + (high - low) * uniform[:, 8:12], identity)
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * uniform[:, 12]
        return {
            "jitter": jitter,
            "order": order,
            **dict(zip(FACTORS, factors.T.contiguous().unbind(), strict=True)),
            "grey": grey,
            "blur": blur,
            "sigma": torch.where(blur, sigma, 0.0),
            "solarize": solarize,
        }

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """The images changed by what was drawn for them.

        Args:
            images: (B, 3, H, W), floating point, values in [0, 1], on any device.
            drawn: what `draw` gave for B images, on the CPU. Under ``torch.compile`` a sigma beyond `sigma` is cut off.

        Returns:
            (B, 3, H, W), values in [0, 1], in the dtype of `images` (half precision is changed in float32).

        Raises:
            SERError: images of another shape or type, values outside [0, 1] (looked at on a CPU alone, and not under
                ``torch.compile``; elsewhere they are clamped), or draws that do not fit.
        """
        _check_images(images)
        _check_drawn(drawn, len(images))
        with torch.no_grad():
            if torch.compiler.is_compiling() or drawn["jitter"].device.type != "cpu":
                return masked(images, drawn, box_reach(float(self.sigma[1])))
            return grouped(images, drawn)


def check_generator(call: str, generator: Any) -> None:
    """Raise unless draws can come from this generator: one on the CPU, or none for torch's global one."""
    device = getattr(getattr(generator, "device", None), "type", None)
    require(
        generator is None or (isinstance(generator, torch.Generator) and device == "cpu"),
        call,
        lambda: f"a generator on {generator.device}" if device else f"a {type(generator).__name__} for a generator",
        "a generator on the CPU, where all is drawn, so that it is the same on any device",
        "generator = torch.Generator().manual_seed(0)",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_images(images: Any) -> None:
    require_tensor(CALL, images)
    given = f"images {tuple(images.shape)}"
    require(images.ndim == 4, CALL, given, "a batch (B, 3, H, W)", "photometric(images[None])")
    remedy = f"photometric(images{'.expand(-1, 3, -1, -1)' if images.shape[1] == 1 else '[:, :3]'})"
    require(images.shape[1] == 3, CALL, given, "red, green and blue", remedy)
    remedy = "photometric(images.float() / 255)"
    require(images.is_floating_point(), CALL, f"images of {images.dtype}", "floating point numbers", remedy)


def _check_drawn(drawn: dict[str, Tensor], n: int) -> None:
    call, remedy = "Photometric(...).apply(images, drawn)", "drawn = photometric.draw(len(images))"
    require(isinstance(drawn, dict), call, f"a {type(drawn).__name__}", "what draw gives, by name", remedy)
    missing = [name for name in DRAWN if name not in drawn]
    require(not missing, call, f"drawn without {', '.join(missing)}", "all that draw gives", remedy)
    plain = [name for name in DRAWN if not isinstance(drawn[name], Tensor) or drawn[name].dtype != _dtype(name)]
    given = ", ".join(f"{name} of {getattr(drawn[name], 'dtype', type(drawn[name]).__name__)}" for name in plain)
    expected = "tensors: bool, order int64, factors, hue and sigma float32"
    require(not plain, call, given, expected, remedy)
    shapes = {name: tuple(drawn[name].shape) for name in DRAWN}
    fine = all(shape == ((n, 4) if name == "order" else (n,)) for name, shape in shapes.items())
    require(fine, call, f"drawn {shapes}", f"draws for each of {n} images", remedy)


def _dtype(name: str) -> torch.dtype:
    if name == "order":
        return torch.int64
    return torch.bool if name in SHARES else torch.float32
