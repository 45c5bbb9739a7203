"""Time and peak memory of the loss by number of images, drawn from the raw results of each machine.

python benchmarks/plot.py             # writes loss.png beside each loss.json
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
# Okabe-Ito colours, which colour-blind readers tell apart, and markers for those who print in grey
STYLES = {
    "ours": ("streaming (ours)", "#d55e00", "o"),
    "dense": ("dense formula", "#0072b2", "s"),
    "released": ("released form", "#009e73", "^"),
    "products": ("three plain products", "#555555", "x"),
}


def draw(folder: Path) -> Path:
    rows: list[dict[str, Any]] = json.loads((folder / "loss.json").read_text())["rows"]
    hardware = json.loads((folder / "loss.json").read_text())["environment"]["hardware"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for form, (label, colour, marker) in STYLES.items():
        timed = [(r["images"], statistics.median(r["seconds"][form])) for r in rows if form in r.get("seconds", {})]
        weighed = [(r["images"], r["peak_bytes"][form] / 2**20) for r in rows if form in r.get("peak_bytes", {})]
        for axis, points in zip(axes, (timed, weighed), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    for axis, title in zip(axes, ("seconds, forward and backward", "peak memory, MiB"), strict=True):
        ticks = [2, 4, 8, 16, 32, 64]
        axis.set(xscale="log", yscale="log", xlabel="images of 196 tokens", title=title, xticks=ticks)
        axis.set_xticklabels(ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"The loss on {hardware}, 512 channels, float32")
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    for raw in sorted(RESULTS.glob("*/loss.json")):
        print(draw(raw.parent))
