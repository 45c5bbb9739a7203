"""The benchmark tables as markdown, from the raw results of each machine.

python benchmarks/table.py            # every machine
python benchmarks/table.py FOLDER     # one of benchmarks/results
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

__all__ = ["FOLDERS", "tables"]

RESULTS = Path(__file__).parent / "results"
FOLDERS = sorted({path.parent for name in ("act", "pipeline") for path in RESULTS.glob(f"*/{name}.json")})
Rows = list[dict[str, Any]]


def spread(ratios: list[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    ratios = sorted(ratios)
    low, median, high = ratios[0], ratios[len(ratios) // 2], ratios[-1]
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def against(row: dict[str, Any], form: str, other: str) -> str:
    pairs = zip(row["seconds"][form], row["seconds"][other], strict=True)
    return spread([a / b for a, b in pairs])


def act(rows: Rows) -> list[list[str]]:
    head = ["`act` against a loop over samples, times as fast", *dict.fromkeys(f"{r['images']} images" for r in rows)]
    kinds = {"permutation": "turns and flips", "shrinking": "and 14×14 to 12×12", "enlarging": "and 14×14 to 16×16"}
    return [
        head,
        *([name, *(spread(r["ratios"], 1) for r in rows if r["kind"] == kind)] for kind, name in kinds.items()),
    ]


def median(row: dict[str, Any], form: str = "ours") -> float:
    return statistics.median(row["seconds"][form])


def exponent(rows: Rows) -> str:
    """How time and memory of the streaming loss grow with the number of images, by the last four of each."""
    timed = [(r["images"], median(r)) for r in rows if "seconds" in r]
    weighed = [(r["images"], r["peak_bytes"]["ours"]) for r in rows if "peak_bytes" in r]
    power = [
        statistics.linear_regression(*([math.log(x) for x in axis] for axis in zip(*points[-4:], strict=True))).slope
        for points in (timed, weighed)
    ]
    return f"Time grows like the number of images to the power {power[0]:.2f}, memory {power[1]:.2f}."


def loss(rows: Rows) -> list[list[str]]:
    head = [
        "images",
        "seconds",
        "time / released form",
        "time / dense form",
        "time / three products",
        "peak memory",
        "of released",
    ]
    timed = {r["images"]: r for r in rows if "seconds" in r}
    weighed = {r["images"]: r["peak_bytes"] for r in rows if "peak_bytes" in r}
    table = [head]
    for images in sorted(timed | weighed):
        row = timed.get(images, {"seconds": {}})
        line = [str(images), f"{median(row):.3f}" if images in timed else ""]
        line += [
            against(row, "ours", form) if form in row["seconds"] else "" for form in ("released", "dense", "products")
        ]
        peak = weighed.get(images, {})
        line.append(f"{peak['ours'] / 2**20:.0f} MiB" if peak else "")
        line.append(f"{peak['ours'] / peak['released']:.3f}" if "released" in peak else "")
        table.append(line)
    return table


def overhead(rows: Rows) -> list[list[str]]:
    step = "{model}, {side} pixels, {batch} images".format(**rows[0])
    head = [f"with the term / without ({step})", "its images", "time, tokens by tap", "by `patch_tokens`"]
    table = [[*head, "memory, tokens by tap", "by `patch_tokens`"]]
    for row in rows:
        times = [against(row, form, "plain") for form in ("tap", "patch_tokens")]
        peaks = [f"{row['peak_bytes'][form] / row['peak_bytes']['plain']:.2f}" for form in ("tap", "patch_tokens")]
        table.append([f"r = {row['ratio']:.0%}", str(row["images"]), *times, *peaks])
    return table


def flops(rows: Rows) -> list[list[str]]:
    (row,) = rows
    return [
        ["FLOPs of a step / of the MoCo-v3 step (ViT-S/16, 256 images a rank, 8 ranks, r = 1 %)", ""],
        ["tokens taken from the SSL forward", f"{row['relative']:.4f}"],
        ["tokens from `patch_tokens` beside it", f"{row['relative_with_own_forwards']:.4f}"],
        ["the paper's Table 17", "1.008"],
    ]


def pipeline(rows: Rows) -> list[list[str]]:
    table = [
        [
            "JPEG files of 500×375, two views of MoCo-v3 at 224 pixels: images per second",
            "before",
            "now",
            "now / before",
        ]
    ]
    for row in rows:
        rates = row.get("images_per_second")
        if row["kind"] in ("worker", "pipeline"):
            name = "one worker: decode, crop, resize, flip (before: and the photometric part)"
            if row.get("clock") == "process_time":
                name = "the same in a second of processor time, which other work on the machine leaves alone"
            if row["kind"] == "pipeline":
                name = (
                    f"ready for the model, photometric part included: {row['workers']} workers, {row['device'].upper()}"
                )
            times = [b / a for a, b in zip(rates["old"], rates["new"], strict=True)]
            table.append([name, spread(rates["old"], 0), spread(rates["new"], 0), spread(times, 1)])
        elif row["kind"] == "model":
            name = f"ViT-S/16, forward and backward of both views, batch {row['batch']}, {row['device'].upper()}"
            table.append([name, "", spread(rates, 1), ""])
    return table


def stages(rows: Rows) -> str:
    """Milliseconds of one image, in a sentence."""
    row = next(row for row in rows if row["kind"] == "stages")
    spent = "; ".join(f"{name} {value:.2f}" for name, value in row["milliseconds"].items())
    return (
        f"Milliseconds an image: {spent}. Pillow's and torchvision's pixels differ by {row['decoders']} of 256 steps."
    )


def tables(folder: Path) -> str:
    """All tables of one machine, with what was measured on."""
    texts = []
    for name, make in {"act": act, "loss": loss, "overhead": overhead, "flops": flops, "pipeline": pipeline}.items():
        path = folder / f"{name}.json"
        if path.exists():
            head, *lines = make(json.loads(path.read_text())["rows"])
            rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
            texts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    for name, say in {"loss": exponent, "pipeline": stages}.items():
        if (folder / f"{name}.json").exists():
            texts.append(say(json.loads((folder / f"{name}.json").read_text())["rows"]))
    there = json.loads(min(folder.glob("*.json")).read_text())["environment"]
    trained = "; forward and backward, float32" if (folder / "act.json").exists() else ""
    texts.append(
        f"{there['hardware']}, {there['threads']} threads, python {there['python']}, torch {there['torch']}, timm "
        f"{there['timm']}{trained}; median (lowest–highest) of runs taken in turn."
    )
    return "\n\n".join(texts)


if __name__ == "__main__":
    for folder in [Path(name) for name in sys.argv[1:]] or FOLDERS:
        print(tables(folder))
