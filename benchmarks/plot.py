"""Time and peak memory of the loss by number of images, drawn from the raw results of each machine.

python benchmarks/plot.py             # writes loss.png beside each loss.json
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ser_reg.report.style import STYLE, marks

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "dense": "dense formula",
    "ours": "streaming (ours)",
    "released": "released form",
    "products": "three plain products",
}


def draw(folder: Path) -> Path:
    """loss.png beside loss.json."""
    rows: list[dict[str, Any]] = json.loads((folder / "loss.json").read_text())["rows"]
    hardware = json.loads((folder / "loss.json").read_text())["environment"]["hardware"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (form, label) in enumerate(LABELS.items()):
        timed = [(r["images"], statistics.median(r["seconds"][form])) for r in rows if form in r.get("seconds", {})]
        weighed = [(r["images"], r["peak_bytes"][form] / 2**20) for r in rows if form in r.get("peak_bytes", {})]
        for axis, points in zip(axes, (timed, weighed), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **marks(i))
    for axis, title in zip(axes, ("seconds, forward and backward", "peak memory, MiB"), strict=True):
        ticks = [2, 4, 8, 16, 32, 64]
        axis.set(xscale="log", yscale="log", xlabel="images of 196 tokens", title=title, xticks=ticks)
        axis.set_xticklabels(ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"The loss on {hardware}, 512 channels, float32")
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        for raw in sorted(RESULTS.glob("*/loss.json")):
            print(draw(raw.parent))
