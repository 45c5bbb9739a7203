"""The loop that all trainings share, from settings to an exported encoder."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from results import atomically, environment
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from ser_reg import SERError, export_timm

from . import checkpoints
from .dataset import Batch, ViewDataset, collate
from .encoder import build_encoder, model_args, trainable
from .geometry import Geometry
from .monitor import Collapse, knn
from .objective import Method, Objective, Views
from .optimizer import build_optimizer, clip, set_rates
from .partition import PartitionSampler, whole_images
from .policies import Method as Base
from .policies import policies
from .regularizer import SoftEquivariance
from .schedules import Moment
from .settings import Settings
from .sources import Source, open_source
from .tracking import Log, progress_bar

__all__ = ["build_objective", "shard", "synchronise", "train"]

LOCAL_AREA = (0.05, 0.25)  # of the 2+4 views (released code of SER), whatever the base method has
DROPPED_PATHS = 3  # a stream of random numbers: the partition has 0 and 1, the geometry 2

S = TypeVar("S", bound=Settings)


def train(base: Base, settings: S, build: Callable[[S], Method]) -> None:
    """Pretrain, or go on from where a run of the same settings was stopped.

    OUTPUT_DIR then holds settings.json, metrics.jsonl (a line a step), checkpoint.pt, and encoder/, which
    ``ser_reg.load_encoder`` and timm load.

    Args:
        base: name of the base method, for its view policies.
        settings: all there is to know.
        build: the base method around a new encoder.

    Raises:
        SERError: data that is not there, settings that do not fit it or the number of processes, a checkpoint of
            another run, or a loss that is no longer finite.
    """
    accelerator = _accelerator(settings)
    main, console = accelerator.is_main_process, Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    source, held_out = open_source(settings.data, "train", settings.seed), _held_out(settings, console)
    part = settings.batch_size // settings.accumulate
    whole = whole_images(part, settings.partition_ratio, ranks)
    per_epoch = (len(source) // part) // settings.accumulate
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    PartitionSampler(len(source), settings.batch_size, whole, rank, ranks, settings.seed)  # says what does not fit

    torch.manual_seed(settings.seed)
    objective = synchronise(build_objective(settings, build), ranks, accelerator.device)
    _describe(console, settings, objective, source, whole, part, steps, ranks)
    objective.to(accelerator.device)
    module: nn.Module = shard(objective, accelerator.device) if settings.fsdp else accelerator.prepare(objective)
    optimizer = accelerator.prepare(build_optimizer(objective, settings))

    _make(settings.output_dir)
    state = checkpoints.saved(settings.output_dir, settings) if settings.resume == "auto" else None
    done = checkpoints.restore(state, module, optimizer.optimizer, accelerator.scaler) if state else 0
    del state  # a file that is mapped is not freed when it is replaced
    _agree_on(done, settings, accelerator)  # and all have read what the main process may write over
    if main:
        checkpoints.discard(settings.output_dir, resume=settings.resume == "auto")
        with atomically(settings.output_dir / "settings.json") as path:
            run = {"method": base, "settings": settings.plain(), "environment": environment(accelerator.device)}
            path.write_text(json.dumps(run, indent=1) + "\n")
    if done:
        console.print(f"going on after step {done} of {steps}")

    method: Method = objective.method
    views, local_views = policies(
        base,
        settings.image_size,
        _area(settings),
        settings.local_size,
        settings.local_views,
        LOCAL_AREA,
        settings.blur,
    )
    sampler = PartitionSampler(
        len(source),
        part,
        whole,
        rank,
        ranks,
        settings.seed,
        first=done * settings.accumulate,
        last=steps * settings.accumulate,
    )
    loader = DataLoader(
        ViewDataset(source, views, local_views),
        batch_sampler=sampler,
        num_workers=settings.workers,
        collate_fn=collate,
        worker_init_fn=_outlive_stop_signal,
        pin_memory=accelerator.device.type == "cuda",
    )
    patch = method.encoder.patch_embed.patch_size[0]
    geometry = Geometry(settings, patch, whole, rank, ranks, accelerator.device)
    log, collapse, unreadable = Log(settings, accelerator, done), Collapse(), _Unreadable(settings.output_dir)
    stop, saved_at, batches = _StopSignal(), time.monotonic(), iter(loader)
    knn_steps = max(1, round(settings.knn_every * per_epoch)) if settings.knn_every and held_out else 0
    module.train()

    def checkpoint(after: int) -> None:
        checkpoints.save(settings.output_dir, module, optimizer.optimizer, accelerator.scaler, settings, after, main)
        _export(settings, module, method, main)

    with progress_bar(console, main) as bar:
        task = bar.add_task("", total=steps, completed=done)
        for step in range(done, steps):
            moment = Moment(step, steps, settings.epochs)
            rate = set_rates(optimizer.optimizer, settings, moment)
            _seed(settings.seed, step, rank)
            method.before_step(moment)
            waited, parts = 0.0, []
            for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
                batch, seconds = _timed(batches)
                waited += seconds
                unreadable.note(batch.unreadable)
                with accelerator.accumulate(module):
                    with accelerator.autocast():  # the forward alone: parts in single precision stay so backward
                        scalars = _forward(module, geometry(batch, number), settings, step)
                    accelerator.backward(scalars["loss"])
                    if accelerator.sync_gradients:
                        accelerator.unscale_gradients(optimizer)
                        if settings.clip is not None:
                            clip(module.parameters(), settings.clip)
                        method.before_update(moment)
                    optimizer.step()
                    optimizer.zero_grad()
                parts.append(scalars)
            method.after_update(moment)
            mean = {name: torch.stack([p[name].detach() for p in parts]).mean() for name in parts[0]}
            log.add(step, rate, mean, settings.batch_size, waited)

            last, evaluates = step + 1 == steps, knn_steps and ((step + 1) % knn_steps == 0 or step + 1 == steps)
            alone_and_stopping = ranks == 1 and stop.wished  # several processes stop together, when they write the log
            if not ((step + 1) % settings.log_every == 0 or last or evaluates or alone_and_stopping):
                continue
            lines = log.collect()
            if evaluates:
                lines[-1]["knn"] = knn(
                    method.exported, source, held_out, settings.image_size, accelerator, settings.workers
                )
                console.print(f"step {step + 1}: k-NN {100 * lines[-1]['knn']:.1f} % on held-out images")
            log.write(lines)
            _raise_unless_finite(lines, settings)
            if warning := collapse.warning([line["embedding_std"] for line in lines]):
                console.print(f"[bold]Warning[/] {warning}")
            bar.update(task, completed=step + 1, description=_summary(lines[-1]))
            due = time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
            wishes = torch.tensor([float(stop.wished), float(due and main)], device=accelerator.device)
            stopping, saving = accelerator.reduce(wishes, "sum").tolist()  # one for all: saving is done by all
            if stopping or saving or last:
                checkpoint(step + 1)
                saved_at = time.monotonic()
            if stopping and not last:
                console.print(f"stopped after step {step + 1}: the same command goes on from here")
                break
            log.restart()
    if done == steps:
        _export(settings, module, method, main)
    accelerator.wait_for_everyone()  # all have noted what they could not read
    if main and (count := unreadable.count()):
        console.print(f"{count} images could not be read and were passed over: see {unreadable.path}")
    accelerator.end_training()
    console.print(f"{settings.output_dir}/encoder, metrics.jsonl")


def build_objective(settings: S, build: Callable[[S], Method]) -> Objective:
    """Base method first: with the same seed its weights are the same with SER and without."""
    method = build(settings)
    regularizer = None
    if settings.has_ser:
        dim = method.encoder.num_features
        regularizer = SoftEquivariance(dim, settings.layers, settings.projection_dim, settings.ser_temperature)
    return Objective(method, regularizer, settings.ser_lambda, settings.ser_target)


def synchronise(module: Objective, ranks: int, device: torch.device) -> Objective:
    """Batch statistics over all processes. `nn.SyncBatchNorm` runs on GPUs only: on CPUs each process has its own."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if ranks > 1 and device.type == "cuda" else module


def shard(objective: Objective, device: torch.device) -> Objective:
    """Parameters over the processes (FSDP2), block by block, those of the momentum encoder as well."""
    # Nothing here works in place on what an encoder returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for encoder in (objective.method.encoder, objective.method.target):
        if encoder is not None:
            for block in encoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(encoder, mesh=mesh)  # by itself, as evaluations call it
    return fully_shard(objective, mesh=mesh)


def _agree_on(done: int, settings: Settings, accelerator: Accelerator) -> None:
    """Raise, on all processes, unless all go on from the same step: nodes may see different folders."""
    steps = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        given = f"checkpoints after {', '.join(map(str, sorted(set(steps))))} steps in {settings.output_dir}"
        remedy = "--output-dir /a/folder/that/all/nodes/share"
        raise SERError("train(settings)", given, "the same on every node", remedy)


def _accelerator(settings: Settings) -> Accelerator:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", settings.precision):
        given = f"--mixed_precision {launched} of accelerate, and --precision {settings.precision}"
        raise SERError("train(settings)", given, "one precision", f"--precision {launched}")
    if settings.tracker != "none" and importlib.util.find_spec(settings.tracker) is None:
        raise SERError(
            f"--tracker {settings.tracker}", "it is not installed", "a tracker", f"pip install {settings.tracker}"
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without GPUs would not find each other
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=settings.output_dir,
    )
    if settings.fsdp and accelerator.num_processes == 1:
        remedy = "torchrun --nproc-per-node 8 examples/moco_v3.py --fsdp  # or leave --fsdp out"
        raise SERError("--fsdp", "one process", "several, to share parameters", remedy)
    return accelerator


def _held_out(settings: Settings, console: Console) -> Source | None:
    """Labelled images for k-NN, if there are any."""
    try:
        held_out = open_source(settings.data, "val", settings.seed)
    except SERError as error:
        console.print(f"no k-NN along the way: {error.given} (wanted: {error.expected})")
        return None
    return held_out if held_out.classes else None


def _describe(
    console: Console,
    settings: Settings,
    objective: Objective,
    source: Source,
    whole: int,
    part: int,
    steps: int,
    ranks: int,
) -> None:
    """What is trained on what, in two lines.

    The paper's Table 1 counts 42.9 M parameters for MoCo-v3 and 43.4 M with SER: the momentum branch and the patch
    projection, which MoCo-v3 does not train, are not among them; positions are, which its official release fixes.
    """
    base, all_ = trainable(objective.method), trainable(objective)
    positions = getattr(objective.method.encoder, "pos_embed", None)
    fixed = 0 if positions is None or positions.requires_grad else positions.numel()
    ser = f", {(all_ + fixed) / 1e6:.1f} M with SER" if all_ > base else ", no SER"
    but = f" ({fixed / 1e6:.2f} M of them fixed positions)" if fixed > 5000 else ""
    console.print(f"{(base + fixed) / 1e6:.1f} M parameters{ser}{but}; [CLS] joins after {settings.late_layer} blocks")
    batches = f"{part} images" + (f" in each of {settings.accumulate} parts" if settings.accumulate > 1 else "")
    console.print(f"{len(source):,} images; {steps:,} steps of {batches}, {whole} of them whole; {ranks} processes")


def _area(settings: Settings) -> tuple[float, float] | None:
    return None if settings.crop_min is None else (settings.crop_min, 1.0)


def _seed(seed: int, step: int, rank: int) -> None:
    """What a step draws (dropped paths) depends on its number alone, so that a resumed run draws the same."""
    words = np.random.SeedSequence(seed, spawn_key=(DROPPED_PATHS, step, rank)).generate_state(1)
    torch.manual_seed(int(words[0]))


def _timed(batches: Iterator[Batch]) -> tuple[Batch, float]:
    start = time.perf_counter()
    return next(batches), time.perf_counter() - start


def _summary(line: dict[str, Any]) -> str:
    ser = f"  SER {line['ser']:.3f} (chance {line['ser_chance']:.3f})" if "ser" in line else ""
    speed = f"{line['images_per_second']:.0f} images/s, {100 * line['data_wait']:.0f} % waiting for data"
    return f"base {line['base']:.3f}{ser}  {speed}"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "--output-dir out/pretraining"
        raise SERError(f"--output-dir {folder}", str(error), "a folder to write to", remedy) from error


def _forward(module: nn.Module, views: Views, settings: Settings, step: int) -> dict[str, Tensor]:
    try:
        scalars: dict[str, Tensor] = module(views)
    except SERError as error:  # on CPUs SER itself finds out that features are no longer finite
        if "NaN" not in error.given:
            raise
        raise _not_finite(f"{error.given} at step {step}", settings) from error
    return scalars


def _raise_unless_finite(lines: list[dict[str, Any]], settings: Settings) -> None:
    for line in lines:
        if not math.isfinite(line["loss"]):
            raise _not_finite(f"loss {line['loss']} at step {line['step']}", settings)


def _not_finite(given: str, settings: Settings) -> SERError:
    slower = f"--output-dir {settings.output_dir}_2 --learning-rate {settings.learning_rate / 2:g}"
    remedy = f"{slower}  # or, to go on from the last checkpoint, --precision bf16"
    return SERError("train(settings)", given, "a finite loss; the last checkpoint is from before", remedy)


def _export(settings: Settings, module: nn.Module, method: Method, main: bool) -> None:
    """The encoder that evaluations judge, as timm loads it."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not main:
        return
    prefix = "method.encoder." if method.exported is method.encoder else "method.target."
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(settings)
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    export_timm(encoder, settings.output_dir / "encoder", settings.architecture, **model_args(settings))


class _StopSignal:
    """SIGTERM, as a scheduler sends it ahead of time: stop after the step, with a checkpoint."""

    def __init__(self) -> None:
        self.wished = False
        signal.signal(signal.SIGTERM, self._wish)

    def _wish(self, number: int, frame: object) -> None:
        self.wished = True


def _outlive_stop_signal(worker: int) -> None:
    """Schedulers send SIGTERM to all processes; the training still needs batches up to its checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Unreadable:
    """Names of images that could not be read, each once, in OUTPUT_DIR/unreadable.txt."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "unreadable.txt"
        self.names = set(self._written())

    def note(self, names: list[str]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        if new:
            self.names.update(new)
            with self.path.open("a") as file:
                file.writelines(f"{name}\n" for name in new)

    def count(self) -> int:
        """How many there are, over all processes, which came upon some of them more than once."""
        written = self._written()
        if len(names := list(dict.fromkeys(written))) < len(written):
            with atomically(self.path) as part:
                part.write_text("".join(f"{name}\n" for name in names))
        return len(names)

    def _written(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []
