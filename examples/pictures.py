"""The picture of the quickstart: losses, equivariance by layer, token maps before and after a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import GroupElement, act, patch_tokens

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {"control": "#0072B2", "ser": "#D55E00", "reference": "#666666"}
ROWS = 3  # images with token maps
TURN = GroupElement(torch.tensor([1]), torch.tensor([False]), torch.ones(1, 2, dtype=torch.float64))


def draw(
    path: Path,
    results: dict[str, Any],
    encoders: dict[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
) -> None:
    """Save the picture.

    Args:
        path: where to.
        results: as in results.json.
        encoders: "control" and "ser", trained.
        images: (N, 3, S, S), held out, values in [0, 1].
        labels: (N,); the images shown are of different ones.
        normalise: what the encoders want done to images.
    """
    with plt.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(11, 13.5), layout="constrained")
        losses, layers, maps = figure.subfigures(3, 1, height_ratios=[3.2, 3.3, 7])
        names = {arm: f"λ = {results['arms'][arm]['ser_lambda']:g}" for arm in ("control", "ser")}
        names["ser"] = f"SER, {names['ser']}"
        _draw_losses(losses, results["arms"], names)
        _draw_layers(layers, results, names)
        _draw_maps(maps, results["settings"]["depth"], encoders, _vivid(images, labels), normalise, names)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(figure: SubFigure, arms: dict[str, Any], names: dict[str, str]) -> None:
    base, ser = figure.subplots(1, 2)
    for arm, name in names.items():
        _draw_curve(base, arms[arm]["history"]["base_loss"], color=COLOURS[arm], label=name)
    base.set(title="Base loss (MoCo-v3)", xlabel="step", ylabel="nats")
    base.legend(frameon=False)
    ser.set(title="SER loss", xlabel="step", ylabel="nats")
    history = arms["ser"]["history"]
    if "ser_loss" in history:
        _draw_curve(ser, history["ser_chance"], color=COLOURS["reference"], ls=":", label="chance")
        _draw_curve(ser, history["ser_loss"], color=COLOURS["ser"], label=names["ser"])
        ser.legend(frameon=False)


def _draw_curve(panel: Axes, values: list[float], color: str, **style: str) -> None:
    """Every step faintly, and the mean over a window of a tenth of them."""
    window = max(1, len(values) // 10)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    panel.plot(values, color=color, lw=0.8, alpha=0.3)
    panel.plot(np.arange(len(means)) + (window - 1) / 2, means, color=color, lw=2, **style)


def _draw_layers(figure: SubFigure, results: dict[str, Any], names: dict[str, str]) -> None:
    figure.suptitle("Spatial equivariance by layer, held-out images", fontsize=14)
    untrained = results["references"]["untrained"]["equivariance"]
    panels = figure.subplots(1, len(untrained), sharey=True, squeeze=False)[0]
    for panel, transformation in zip(panels, untrained, strict=True):
        layers = list(untrained[transformation])
        panel.axvline(results["settings"]["layer"], color="#DDDDDD", lw=6, zorder=0, label="regularized layer")
        values = [untrained[transformation][layer]["spatial"] for layer in layers]
        panel.plot(layers, values, color=COLOURS["reference"], ls=":", lw=1.6, label="untrained")
        for arm, name in names.items():
            scores = [results["arms"][arm]["equivariance"][transformation][layer] for layer in layers]
            panel.plot(layers, [s["spatial"] for s in scores], color=COLOURS[arm], marker="o", ms=5, label=name)
            floor = [s["spatial_floor"] for s in scores]
            panel.plot(layers, floor, color=COLOURS[arm], ls="--", lw=1.2, label=f"{name}: floor")
        panel.set(title=transformation, xlabel="blocks", xticks=layers)
    panels[0].set(ylabel="cosine")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _draw_maps(
    figure: SubFigure,
    layer: int,
    encoders: dict[str, nn.Module],
    images: Tensor,
    normalise: Callable[[Tensor], Tensor],
    names: dict[str, str],
) -> None:
    figure.suptitle(
        f"Turn g and the patch tokens f of layer {layer}, as colours: do the maps of a pair match?", size=14
    )
    turned = act(TURN, images)
    panels = figure.subplots(len(images), 8, squeeze=False, width_ratios=[1, 1, 0.12, 1, 1, 0.12, 1, 1])
    for gap in panels[:, [2, 5]].flat:
        gap.set_visible(False)
    _show_pairs(panels[:, :2], zip(images, turned, strict=True), ("image x", "g·x"))
    for (arm, name), pair in zip(names.items(), (panels[:, 3:5], panels[:, 6:]), strict=True):
        vit = encoders[arm].eval()
        device = next(vit.parameters()).device
        with torch.no_grad():
            before = act(TURN, patch_tokens(vit, normalise(images).to(device), layer)).cpu()
            after = patch_tokens(vit, normalise(turned).to(device), layer).cpu()
        before, after = (maps - maps.mean((-2, -1), keepdim=True) for maps in (before, after))
        _show_pairs(pair, map(_colours, before, after), (f"{name}\ng·f(x)", f"{name}\nf(g·x)"))
        for panel, cosine in zip(pair[:, 1], F.cosine_similarity(before, after, dim=1).mean((-2, -1)), strict=True):
            panel.set_xlabel(f"cosine {cosine:.2f}")


def _show_pairs(panels: np.ndarray, pairs: Iterable[Sequence[Tensor]], titles: tuple[str, str]) -> None:
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title)
    for row, pair in zip(panels, pairs, strict=True):
        for panel, image in zip(row, pair, strict=True):
            panel.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)


def _colours(*maps: Tensor) -> list[Tensor]:
    """(D, h, w) maps as colours: their three main components over all of them together, so that colours compare."""
    tokens = torch.cat([m.flatten(1).T for m in maps])
    components = tokens @ torch.linalg.svd(tokens, full_matrices=False)[2][:3].T
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low)).clamp(0, 1)
    parts = colours.split([m[0].numel() for m in maps])
    return [part.T.reshape(3, *m.shape[1:]) for part, m in zip(parts, maps, strict=True)]


def _vivid(images: Tensor, labels: Tensor) -> Tensor:
    """The images with most contrast, at most one of a label. The choice knows nothing of the encoders."""
    contrast = images.flatten(2).std(2).mean(1)
    chosen: list[int] = []
    for i in contrast.argsort(descending=True).tolist():
        if labels[i] not in labels[chosen]:
            chosen.append(i)
        if len(chosen) == ROWS:
            break
    return images[chosen]
