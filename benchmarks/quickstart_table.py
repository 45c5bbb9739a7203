"""The README's table of the quickstart, as markdown, from the results.json of several seeds.

    python benchmarks/quickstart_table.py                                 # of the published runs
    python benchmarks/quickstart_table.py out/quickstart/results.json     # of your own

Mean ± sample standard deviation over seeds; the difference is taken within each seed, then over seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["caption", "load", "table"]

RESULTS = Path(__file__).parent / "results" / "quickstart"
Read = Callable[[dict[str, Any]], float]  # a figure of one column of one run


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """Runs that differ in nothing but their seed."""
    runs = [json.loads(path.read_text()) for path in paths]
    if not runs:
        raise SystemExit("no results: python examples/quickstart.py --output-dir out/quickstart")
    settings = [{k: v for k, v in run["settings"].items() if k not in ("seed", "output_dir")} for run in runs]
    if any(other != settings[0] for other in settings):
        raise SystemExit("these runs differ in more than their seed: give those of one setting")
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Rows of markdown."""
    lambdas = [runs[0]["arms"][arm]["ser_lambda"] for arm in ("control", "ser")]
    header = [
        "",
        "raw pixels",
        "untrained",
        f"λ = {lambdas[0]:g}",
        f"SER, λ = {lambdas[1]:g}",
        "difference",
        "higher in",
    ]
    rows = [header, ["---", *["---:"] * 6]]
    for probe, name in (("knn", "k-NN accuracy, %"), ("linear", "linear accuracy, %")):
        rows.append(_row(name, runs, lambda m, probe=probe: 100 * m["accuracy"][probe], 1))
    settings = runs[0]["settings"]
    transformations, last = runs[0]["arms"]["ser"]["equivariance"], str(settings["depth"])
    for layer in sorted({settings["layer"], settings["depth"]}):
        for name in transformations:
            rows.append(_row(f"tokens matched, layer {layer}, {name}, %", runs, _matched(name, str(layer)), 1))
    for name in transformations:
        read, above = _score(name, last, "spatial")
        rows += [_row(f"spatial score, layer {last}, {name}", runs, read, 3)]
        rows += [_row("— above unrelated images", runs, above, 3)]
    read, _ = _score("rotation", last, "raw")
    rows.append(_row(f"raw score, layer {last}, rotation", runs, read, 3))
    rows.append(_row("seconds of training", runs, lambda m: m["train_seconds"], 0))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def caption(runs: list[dict[str, Any]]) -> str:
    """Hardware, versions, number of runs and settings."""
    environment, settings, data = (runs[0][key] for key in ("environment", "settings", "data"))
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "timm"))
    seconds = [run["seconds"] for run in runs]
    return (
        f"{len(runs)} seeds ({', '.join(str(run['settings']['seed']) for run in runs)}), mean ± sample standard "
        f"deviation; {environment['threads']} threads of {environment['processor']}, python {environment['python']}, "
        f"{versions}; {settings['steps']} steps of {settings['batch_size']} images of {settings['image_size']} pixels, "
        f"SER at layer {settings['layer']} of {settings['depth']}; {data['train']} training and {data['held_out']} "
        f"held-out patches of {len(data['classes'])} photographs; {min(seconds):.0f} to {max(seconds):.0f} s a run."
    )


def _matched(transformation: str, layer: str) -> Read:
    """How to read how often a token finds its own place in the moved image, in per cent."""
    return lambda measured: 100 * measured["matching"][transformation][layer]["top1"]


def _score(transformation: str, layer: str, reading: str) -> tuple[Read, Read]:
    """How to read an equivariance score, and how far it lies above that of unrelated images."""

    def score(measured: dict[str, Any]) -> float:
        return measured["equivariance"][transformation][layer][reading]

    def above(measured: dict[str, Any]) -> float:
        return score(measured) - measured["equivariance"][transformation][layer][f"{reading}_floor"]

    return score, above


def _row(name: str, runs: list[dict[str, Any]], read: Read, digits: int) -> list[str]:
    columns = [[run["references"][key] for run in runs] for key in ("raw_pixels", "untrained")]
    columns += [[run["arms"][key] for run in runs] for key in ("control", "ser")]
    values: list[list[float]] = []
    for column in columns:
        try:
            values.append([read(measured) for measured in column])
        except KeyError:  # raw pixels have no layers, references no training
            values.append([])
    differences = [ser - control for control, ser in zip(*values[2:], strict=True)]
    higher = f"{sum(d > 0 for d in differences)} of {len(runs)}"
    if equal := sum(d == 0 for d in differences):
        higher += f" ({equal} equal)"
    return [name, *(_spread(v, digits) for v in values), _spread(differences, digits, "+"), higher]


def _spread(values: list[float], digits: int, sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    found = load([Path(name) for name in sys.argv[1:]] or sorted(RESULTS.glob("seed[0-9].json")))
    print(table(found), caption(found), sep="\n\n")
