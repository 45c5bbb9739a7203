"""The paper's ablations on the small preset: train, judge, tabulate and draw.

    python examples/ablate.py layer                     # one ablation, three seeds
    python examples/ablate.py all --jobs 2              # all of them, two trainings at a time

Runs go to OUTPUT_DIR/runs and are shared between ablations; one that was stopped goes on where it was, and one that is
done is not run again. OUTPUT_DIR then holds a table (.md) and a picture (.png) of each ablation, and results.json, the
raw results of all runs in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretraining  # noqa: F401  (ahead of torch: how its threads wait)
import tyro
from ablation.judge import judge
from ablation.plot import draw
from ablation.table import markdown
from ablation.variants import ABLATIONS, Variant
from pretraining.settings import read_run
from rich.console import Console
from rich.progress import Progress

from ser_reg import SERError
from ser_reg.errors import require
from ser_reg.records import atomically

__all__ = ["Settings", "collect", "main"]

EXAMPLES = Path(__file__).parent
JUDGED = "judged.json"


@dataclass(frozen=True)
class Settings:
    """The paper's ablations on the small preset."""

    ablation: tyro.conf.Positional[str]
    """One of methods, layer, control, ratio, lambda, group, all-layers, cls, terms, crops, channels; or all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of each variant for each."""
    flags: str = ""
    """More flags for every training, as `--flags="--epochs 20"`; take another output folder with them."""
    output_dir: Path = Path("out/ablations")
    """Where runs, tables and pictures go."""
    jobs: int = 1
    """Trainings at a time; each gets its part of the processor's cores."""


def main(settings: Settings) -> None:
    """Run what is missing, then write tables and pictures."""
    names = list(ABLATIONS) if settings.ablation == "all" else [settings.ablation]
    given, expected = f"ablation {settings.ablation!r}", f"one of {', '.join(ABLATIONS)}, or all"
    require(names[0] in ABLATIONS, "ablate.py", given, expected, "python examples/ablate.py layer")
    given = f"{len(settings.seeds)} seeds, {settings.jobs} jobs"
    remedy = "python examples/ablate.py layer --seeds 0 1 2 --jobs 1"
    require(settings.seeds and settings.jobs >= 1, "ablate.py", given, "at least one of each", remedy)
    console = Console(soft_wrap=True)
    wanted = {v.run: v for name in names for v in ABLATIONS[name].variants}
    runs = [(variant, seed) for seed in settings.seeds for variant in wanted.values()]
    with Progress(console=console) as progress, ThreadPoolExecutor(settings.jobs) as pool:
        task = progress.add_task(f"{len(runs)} trainings", total=len(runs))
        try:
            for future in as_completed([pool.submit(train_and_judge, settings, *run) for run in runs]):
                future.result()
                progress.advance(task)
        finally:
            pool.shutdown(cancel_futures=True)
    results = collect(settings.output_dir, settings.seeds)
    with atomically(settings.output_dir / "results.json") as path:
        path.write_text(json.dumps(results))
    for name in names:
        with atomically(settings.output_dir / f"{name}.md") as path:
            path.write_text(markdown(ABLATIONS[name], results) + "\n")
        with atomically(settings.output_dir / f"{name}.png") as path:
            draw(path, ABLATIONS[name], results)
        console.print(f"\n[bold]{ABLATIONS[name].title}[/] ({ABLATIONS[name].source})\n")
        console.print(markdown(ABLATIONS[name], results), markup=False, highlight=False)


def train_and_judge(settings: Settings, variant: Variant, seed: int) -> None:
    """One run; flags, environment and result are kept in its folder."""
    folder = settings.output_dir / "runs" / variant.run / f"seed{seed}"
    found = folder / JUDGED
    flags = [*variant.flags.split(), *settings.flags.split(), "--seed", str(seed)]
    if found.exists():
        kept = json.loads(found.read_text())
        given = f"{found}, of a run with {' '.join(kept['flags'])}"
        remedy = "python examples/ablate.py ... --output-dir out/other"
        require(kept["flags"] == flags, "ablate.py", given, " ".join(flags), remedy)
        return
    _train(settings, variant, seed, [*flags, "--output-dir", str(folder)])
    run = read_run(folder)
    result = judge(folder, run["settings"], seed)
    kept = {"flags": flags, "environment": run["environment"], "steps": _steps(folder), "result": result}
    with atomically(found) as path:
        path.write_text(json.dumps(kept, indent=1))


def _train(settings: Settings, variant: Variant, seed: int, flags: list[str]) -> None:
    command = [sys.executable, str(EXAMPLES / f"{variant.script}.py"), "--preset", "small", *flags]
    threads = max(1, (os.cpu_count() or 1) // settings.jobs)
    done = subprocess.run(
        [*command, "--tracker", "none", "--knn-every", "0"],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    given = f"exit status {done.returncode}: {done.stderr.strip()[-1000:]}"
    require(done.returncode == 0, f"training {variant.label!r}, seed {seed}", given, "0", " ".join(command))


def _steps(folder: Path) -> int:
    return sum(1 for _ in (folder / "metrics.jsonl").open())


def collect(folder: Path, seeds: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What the runs of these seeds in a folder kept, by variant and seed."""
    results: dict[str, dict[str, Any]] = {}
    for variant in sorted((folder / "runs").iterdir()):
        kept = {str(seed): variant / f"seed{seed}" / JUDGED for seed in seeds}
        results[variant.name] = {seed: json.loads(path.read_text()) for seed, path in kept.items() if path.exists()}
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except SERError as error:
        sys.exit(str(error))
