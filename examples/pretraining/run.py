"""What a run holds, and how it is prepared: data, step, optimiser and checkpoint, ready for the loop."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from data import Source, open_source
from data.sampler import PartitionSampler, whole_images
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import fully_shard

from ser_reg import SERError
from ser_reg.backbones import backbone
from ser_reg.errors import require
from ser_reg.export import FORMAT
from ser_reg.records import atomically, environment

from . import checkpoints
from .base import BaseMethod
from .encoder import require_whole_patches, trainable
from .optimizer import build_optimizer
from .settings import Settings
from .step import Step
from .term import build_heads
from .views import Recipes, extra_recipes, maker

__all__ = ["Length", "Run", "build_step", "prepare", "shard", "synchronise"]

S = TypeVar("S", bound=Settings)


class Length(NamedTuple):
    """How many images and steps."""

    batch: int
    """Images of a forward, over all processes: the batch of a step, or a part of it."""
    read: int
    """How many of them have the views that the term reads: those that are seen whole (b2), where it wants such."""
    epoch: int
    """Steps of the optimiser in an epoch."""
    steps: int
    """Steps of the optimiser in all."""


class Run(NamedTuple):
    """What the loop works with."""

    settings: Settings
    accelerator: Accelerator
    console: Console
    source: Source
    held_out: Source | None
    """Labelled images for k-NN, if there are any."""
    length: Length
    recipes: Recipes
    """Of the global views and the local ones."""
    step: Step
    module: nn.Module
    """The step as it is called: wrapped for several processes, or sharded."""
    optimizer: AcceleratedOptimizer
    done: int
    """Steps that earlier runs have done."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process


def prepare(name: str, settings: S, build: Callable[[S], BaseMethod], recipes: Recipes) -> Run:
    """A run, new or where one of the same settings was stopped.

    Args:
        name: of the base method, as settings.json has it.
        settings: all there is to know.
        build: the base method around a new encoder.
        recipes: of its views, global ones and local ones.

    Raises:
        SERError: data that is not there, settings that do not fit it or the number of processes, or a checkpoint of
            another run.
    """
    accelerator = _accelerator(settings)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    source = open_source(settings.data.data, "train", settings.run.seed)
    held_out = _held_out(settings, source, console)
    length = _length(settings, source, accelerator)

    torch.manual_seed(settings.run.seed)
    step = synchronise(build_step(settings, build, recipes), accelerator.num_processes, accelerator.device)
    _describe(console, settings, step)
    _describe_length(console, settings, len(source), length, accelerator.num_processes)
    step.to(accelerator.device)
    module: nn.Module = shard(step, accelerator.device) if settings.run.fsdp else accelerator.prepare(step)
    optimizer = accelerator.prepare(build_optimizer(step, settings.optimizer))
    done = _restore(settings, accelerator, module, optimizer)
    if accelerator.is_main_process:
        _record(name, settings, accelerator.device)
    if done:
        console.print(f"going on after step {done} of {length.steps}")
    return Run(settings, accelerator, console, source, held_out, length, recipes, step, module, optimizer, done)


def build_step(settings: S, build: Callable[[S], BaseMethod], recipes: Recipes) -> Step:
    """Base method first: with the same seed its weights are the same with a term and without."""
    method = build(settings)
    call, term, policy = f"build({type(method).__name__})", settings.term, settings.term.policy
    require(
        term.target == "online" or method.target is not None,
        call,
        f"target={term.target!r}",
        f"maps of the trained encoder: {type(method).__name__} has no momentum encoder",
        f"{term.name} --term.target online",
    )
    if settings.data.local_views or (settings.has_term and policy.extra == "turned"):
        require_whole_patches(call, method.encoder, local_size=settings.data.local_size)
    if not settings.has_term:
        return Step(method)
    facts, views = backbone(method.encoder), recipes[0]
    extra = extra_recipes(policy, views, settings.data)
    widths = {layer: facts.width(layer) for layer in settings.layers}
    tells = maker(settings.views, policy, facts.patch_size, views, extra)
    heads = build_heads(term, widths, tells, facts.patch_size)
    return Step(method, heads, term.weight, term.target, policy)


def synchronise(step: Step, world_size: int, device: torch.device) -> Step:
    """Batch statistics over all processes. `nn.SyncBatchNorm` runs on GPUs only: on CPUs each process has its own."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(step) if world_size > 1 and device.type == "cuda" else step


def shard(step: Step, device: torch.device) -> Step:
    """Parameters over the processes (FSDP2), block by block, those of the momentum encoder as well."""
    # Nothing here works in place on what an encoder returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for encoder in (step.method.encoder, step.method.target):
        if encoder is not None:
            for layer in backbone(encoder).layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(encoder, mesh=mesh)  # by itself, as evaluations call it
    return fully_shard(step, mesh=mesh)


def _accelerator(settings: Settings) -> Accelerator:
    run = settings.run
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    given = f"--mixed_precision {launched} of accelerate, and --precision {run.precision}"
    alike = launched in ("no", run.precision)
    require(alike, "train(settings)", given, "one precision", f"--precision {launched}")
    installed = run.tracker == "none" or importlib.util.find_spec(run.tracker) is not None
    remedy = f"pip install {run.tracker}"
    require(installed, f"--tracker {run.tracker}", "it is not installed", "a tracker", remedy)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without GPUs would not find each other
        mixed_precision=run.precision,
        gradient_accumulation_steps=run.accumulate,
        log_with=None if run.tracker == "none" else run.tracker,
        project_dir=run.output_dir,
    )
    remedy = "torchrun --nproc-per-node 8 examples/moco_v3.py --fsdp  # or leave --fsdp out"
    several = not run.fsdp or accelerator.num_processes > 1
    require(several, "--fsdp", "one process", "several, to share parameters", remedy)
    return accelerator


def _held_out(settings: Settings, source: Source, console: Console) -> Source | None:
    """Labelled images for k-NN, if there are any; their neighbours are those of `source`."""
    try:
        held_out = open_source(settings.data.data, "val", settings.run.seed)
    except SERError as error:
        console.print(f"no k-NN along the way: {error.given} (wanted: {error.expected})")
        return None
    return held_out if held_out.classes and source.classes else None


def _length(settings: Settings, source: Source, accelerator: Accelerator) -> Length:
    """Raises a SERError for a batch that does not fit the source or the processes."""
    run, rank, world_size = settings.run, accelerator.process_index, accelerator.num_processes
    batch = run.batch_size // run.accumulate
    read = whole_images(batch, settings.read, world_size)
    PartitionSampler(len(source), run.batch_size, read, rank, world_size, run.seed)  # says what does not fit
    PartitionSampler(len(source), batch, read, rank, world_size, run.seed, paired=settings.term.policy.paired)
    epoch = (len(source) // batch) // run.accumulate
    return Length(batch, read, epoch, run.steps or max(1, round(run.epochs * epoch)))


def _describe(console: Console, settings: Settings, step: Step) -> None:
    """What is trained.

    The paper's Table 1 counts 42.9 M parameters for MoCo-v3 and 43.4 M with SER: the momentum branch and the patch
    projection, which MoCo-v3 does not train, are not among them; positions are, which its official release fixes.
    """
    base, all_ = trainable(step.method), trainable(step)
    positions = backbone(step.method.encoder).positions
    fixed = 0 if positions is None or positions.requires_grad else positions.numel()
    term = f", {(all_ + fixed) / 1e6:.1f} M with {settings.term.name}" if settings.has_term else ", no added term"
    but = f" ({fixed / 1e6:.2f} M of them fixed positions)" if fixed > 5000 else ""
    console.print(f"{(base + fixed) / 1e6:.1f} M parameters{term}{but}; [CLS] joins after {settings.late_layer} blocks")


def _describe_length(console: Console, settings: Settings, images: int, length: Length, world_size: int) -> None:
    """On what it is trained."""
    accumulate = settings.run.accumulate
    batches = f"{length.batch} images" + (f" in each of {accumulate} parts" if accumulate > 1 else "")
    read = f", {length.read} of them {'whole' if settings.term.policy.whole else 'read by the term'}"
    steps = f"{length.steps:,} steps of {batches}{read if length.read else ''}"
    console.print(f"{images:,} images; {steps}; {world_size} processes")


def _restore(settings: Settings, accelerator: Accelerator, module: nn.Module, optimizer: AcceleratedOptimizer) -> int:
    """Put a checkpoint back if there is one; steps that are done."""
    folder, resume = settings.run.output_dir, settings.run.resume == "auto"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "--output-dir out/pretraining"
        raise SERError(f"--output-dir {folder}", str(error), "a folder to write to", remedy) from error
    state = checkpoints.load(folder, settings) if resume else None
    done = checkpoints.restore(state, module, optimizer.optimizer, accelerator.scaler) if state else 0
    del state  # a file that is mapped is not freed when it is replaced
    _require_same(done, settings, accelerator)  # and all have read what the main process may write over
    if accelerator.is_main_process:
        checkpoints.discard(folder, resume)
    return done


def _require_same(done: int, settings: Settings, accelerator: Accelerator) -> None:
    """Raise, on all processes, unless all go on from the same step: nodes may see different folders."""
    steps = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    found = ", ".join(map(str, sorted(set(steps))))
    given = f"checkpoints after {found} steps in {settings.run.output_dir}"
    remedy = "--output-dir /a/folder/that/all/nodes/share"
    require(len(set(steps)) == 1, "train(settings)", given, "the same on every node", remedy)


def _record(name: str, settings: Settings, device: torch.device) -> None:
    """Write OUTPUT_DIR/settings.json."""
    run = {"format": FORMAT, "method": name, "settings": settings.plain(), "environment": environment(device)}
    with atomically(settings.run.output_dir / "settings.json") as path:
        path.write_text(json.dumps(run, indent=1) + "\n")
