"""The picture of a model's token maps: transformed tokens beside the tokens of the transformed image, as colours."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from .actions import act
from .groups import GroupElement
from .metrics import transformations
from .report_plots import STYLE, short
from .vit import patch_tokens

__all__ = ["colours", "draw_maps"]

SHOWN = {"rotation": 0, "flip": 0, "scale": -1}  # which element of a transformation: a quarter turn, ..., the larger
QUANTILES = (0.02, 0.98)  # of a component, shown darkest and brightest: a few tokens stand far out
GAP = 0.12  # between groups of panels, in panels


@torch.no_grad()
def draw_maps(path: Path, vit: nn.Module, images: Tensor, pixels: Tensor, layer: int, name: str) -> None:
    """Save the picture: a row an image x, and for each transformation g the panels g·x, g·f(x) and f(g·x).

    Args:
        path: where to.
        vit: in evaluation mode.
        images: (N, 3, H, W), values in [0, 1], to be shown.
        pixels: the same, normalised as for the model.
        layer: blocks run before the tokens f that are shown.
        name: of the model.
    """
    elements = {kind: batch[SHOWN[kind]] for kind, batch in transformations(vit, pixels).items()}
    tokens = patch_tokens(vit, pixels, layer)
    maps = []  # (g·f(x), f(g·x)), each map without its own mean token, as the spatial score compares them
    for g in elements.values():
        pair = act(g, tokens), patch_tokens(vit, act(g, pixels, antialias=True), layer)
        maps.append([(part - part.mean((-2, -1), keepdim=True)).float().cpu() for part in pair])
    widths = [1.0] + [GAP, 1.0, 1.0, 1.0] * len(elements)
    aspect = images.shape[-2] / images.shape[-1]
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=(1.35 * sum(widths), 0.9 + len(images) * (1.35 * aspect + 0.2)), layout=layout)
        figure.suptitle(f"{short(name)}: patch tokens f after {layer} blocks", x=0.01, ha="left", fontsize=12)
        panels = figure.subplots(len(images), len(widths), squeeze=False, width_ratios=widths)
        for panel in panels[:, 1::4].flat:
            panel.set_visible(False)
        for row, image in zip(range(len(images)), images, strict=True):
            painted = colours([part[row] for pair in maps for part in pair])
            _show(panels[row, 0], image, "image x" if row == 0 else "")
            for i, (kind, g) in enumerate(elements.items()):
                cosine = F.cosine_similarity(maps[i][0][row], maps[i][1][row], dim=0).mean().item()
                moved = act(g, image[None], antialias=True)[0]
                done = {"rotation": "turned", "flip": "flipped", "scale": "scaled"}[kind]
                headings = (f"g·x:\n{_words(kind, g)}", f"g·f(x):\n{done} tokens", f"f(g·x): tokens\nof {done} image")
                shown = (moved, *painted[2 * i : 2 * i + 2])
                for panel, picture, heading in zip(panels[row, 2 + 4 * i :], shown, headings, strict=False):
                    _show(panel, picture, heading if row == 0 else "")
                panels[row, 4 + 4 * i].set_xlabel(f"score {cosine:.2f}", labelpad=2)
        figure.savefig(path, dpi=110)


def colours(maps: list[Tensor]) -> list[Tensor]:
    """(D, h, w) maps as (3, h, w) colours: three principal components of all together, so that colours compare."""
    tokens = torch.cat([part.flatten(1).T for part in maps]).double().numpy()
    with np.errstate(invalid="ignore"):  # constant maps have no part of a variance of zero
        components = PCA(3, svd_solver="full").fit_transform(tokens)
    low, high = np.quantile(components, QUANTILES, axis=0)
    painted = torch.tensor(((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1))
    split = painted.split([part[0].numel() for part in maps])
    return [part.T.reshape(3, *whole.shape[1:]) for part, whole in zip(split, maps, strict=True)]


def _words(kind: str, g: GroupElement) -> str:
    return {"rotation": "quarter turn", "flip": "flip", "scale": f"scale × {g.scale.mean().item():.2f}"}[kind]


def _show(panel: Axes, image: Tensor, heading: str) -> None:
    panel.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    if heading:
        panel.set_title(heading, fontsize=9)
