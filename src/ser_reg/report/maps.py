"""Token maps as colours: transformed tokens beside the tokens of the transformed image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from ..backbones import backbone, patch_tokens
from ..geometry import GroupElement, act
from .base import Picture, Records, Section, Subject, early_layer
from .style import STYLE, short

__all__ = ["Maps", "colours"]

IMAGES = 3  # with token maps, those that vary most
SHOWN = {"rotation": 0, "flip": 0, "scale": -1}  # which element of a transformation: a quarter turn, ..., the larger
DONE = {"rotation": "turned", "flip": "flipped", "scale": "scaled"}
QUANTILES = (0.02, 0.98)  # of a component, shown darkest and brightest: a few tokens stand far out
GAP = 0.12  # between groups of panels, in panels

CAPTION = (
    "Three principal components of the tokens as red, green and blue, the same components all along a row, each map "
    "without its mean token. In an equivariant model the two maps of a pair match: <em>turned tokens</em> g·f(x) and "
    "<em>tokens of the turned image</em> f(g·x). The score below is that of this one pair."
)


class Maps(Section):
    """Its pictures need the model: they are drawn while it is measured."""

    heading = "Token maps"

    def measure(self, subject: Subject) -> dict[str, Any]:
        images = sorted(subject.images, key=lambda image: -image.std().item())[:IMAGES]
        pictures = []
        for layer in _layers(subject):
            path = subject.stem.with_name(f"{subject.stem.name}_layer_{layer}.png")
            _draw(path, subject, torch.stack(images), subject.normalised(images), layer)
            pictures.append(path.name)
        return {"pictures": pictures}

    def forwards(self, subject: Subject) -> int:
        return len(_layers(subject)) * min(IMAGES, len(subject.photographs)) * (1 + len(subject.elements))

    def draw(self, folder: Path, records: Records) -> list[Picture]:
        return [
            Picture(folder / picture, f"Token maps of {name}")
            for name, record in records.items()
            for picture in record["pictures"]
        ]

    def caption(self, records: Records) -> str:
        return CAPTION


def _layers(subject: Subject) -> list[int]:
    depth = backbone(subject.model).depth
    return sorted({early_layer(depth), depth})


@torch.no_grad()
def _draw(path: Path, subject: Subject, images: Tensor, pixels: Tensor, layer: int) -> None:
    """Save the picture: a row an image x, and for each transformation g the panels g·x, g·f(x) and f(g·x).

    Args:
        path: where to.
        subject: with the model, and its name for the title.
        images: (N, 3, H, W), values in [0, 1], to be shown.
        pixels: the same, normalised as for the model.
        layer: layers run before the tokens f that are shown.
    """
    model = subject.model
    elements = {kind: batch[SHOWN[kind]] for kind, batch in subject.elements.items()}
    tokens = patch_tokens(model, pixels, layer)
    maps = []  # (g·f(x), f(g·x)), each map without its own mean token, as the spatial score compares them
    for g in elements.values():
        pair = act(g, tokens), patch_tokens(model, act(g, pixels, antialias=True), layer)
        maps.append([(x - x.mean((-2, -1), keepdim=True)).float().cpu() for x in pair])
    widths = [1.0] + [GAP, 1.0, 1.0, 1.0] * len(elements)
    aspect = images.shape[-2] / images.shape[-1]
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=(1.35 * sum(widths), 0.9 + len(images) * (1.35 * aspect + 0.2)), layout=layout)
        title = f"{short(subject.name)}: patch tokens f after {layer} {backbone(model).unit}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        panels = figure.subplots(len(images), len(widths), squeeze=False, width_ratios=widths)
        for panel in panels[:, 1::4].flat:
            panel.set_visible(False)
        for row, image in enumerate(images):
            _draw_row(panels[row], image, elements, [[x[row] for x in pair] for pair in maps], headings=row == 0)
        figure.savefig(path, dpi=110)


def _draw_row(
    panels: Any, image: Tensor, elements: dict[str, GroupElement], maps: list[list[Tensor]], headings: bool
) -> None:
    """One image: itself, and for each element the moved image and both maps, with their score."""
    painted = colours([x for pair in maps for x in pair])
    _show(panels[0], image, "image x" if headings else "")
    for i, (kind, g) in enumerate(elements.items()):
        acted, of_moved = maps[i]
        cosine = F.cosine_similarity(acted, of_moved, dim=0).mean().item()
        moved = act(g, image[None], antialias=True)[0]
        texts = (f"g·x:\n{_words(kind, g)}", f"g·f(x):\n{DONE[kind]} tokens", f"f(g·x): tokens\nof {DONE[kind]} image")
        shown = (moved, *painted[2 * i : 2 * i + 2])
        for panel, picture, text in zip(panels[2 + 4 * i :], shown, texts, strict=False):
            _show(panel, picture, text if headings else "")
        panels[4 + 4 * i].set_xlabel(f"score {cosine:.2f}", labelpad=2)


def colours(maps: list[Tensor]) -> list[Tensor]:
    """(D, h, w) maps as (3, h, w) colours: three principal components of all together, so that colours compare."""
    tokens = torch.cat([x.flatten(1).T for x in maps]).double().numpy()
    with np.errstate(invalid="ignore"):  # of constant maps no component explains any of a variance of zero
        components = PCA(3, svd_solver="full").fit_transform(tokens)
    low, high = np.quantile(components, QUANTILES, axis=0)
    painted = torch.tensor(((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1))
    split = painted.split([x[0].numel() for x in maps])
    return [colour.T.reshape(3, *x.shape[1:]) for colour, x in zip(split, maps, strict=True)]


def _words(kind: str, g: GroupElement) -> str:
    return {"rotation": "quarter turn", "flip": "flip", "scale": f"scale × {g.scale.mean().item():.2f}"}[kind]


def _show(panel: Axes, image: Tensor, heading: str) -> None:
    panel.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    if heading:
        panel.set_title(heading, fontsize=9)
