"""Views of tiny batches: as the loop of the trainings has them, and the same without the engine."""

import importlib
from types import SimpleNamespace

import torch
from data import open_source
from data.batch import ViewDataset, collate
from data.sampler import PartitionSampler, whole_images
from pretraining.batches import Batches
from pretraining.run import Length, build_step
from pretraining.views import DeviceViews

__all__ = ["batches", "engine_batches"]


def batches(method, settings):
    """The groups of one batch after another: crops (b1), then whole images (b2)."""
    run = settings.run
    whole = whole_images(run.batch_size, settings.term.ratio, 1)
    source = open_source(settings.data.data, "train", run.seed)
    data = ViewDataset(source, *importlib.import_module(method).recipes(settings))
    views = DeviceViews(settings.views.maker(settings.encoder.patch_size), whole, run.seed)
    sampler = PartitionSampler(len(source), run.batch_size, whole, seed=run.seed, last=run.steps)
    for number, requests in enumerate(sampler):
        yield views(collate([data[request] for request in requests]), number)


def engine_batches(method, settings, done=0, rank=0, world_size=1):
    """The same by the engine, on one of several ranks, after the steps that were done before."""
    module, run = importlib.import_module(method), settings.run
    batch = run.batch_size // run.accumulate
    source = open_source(settings.data.data, "train", run.seed)
    whole = whole_images(batch, settings.term.ratio, world_size)
    found = Batches(
        SimpleNamespace(
            settings=settings,
            accelerator=SimpleNamespace(process_index=rank, num_processes=world_size, device=torch.device("cpu")),
            source=source,
            length=Length(batch, whole, len(source) // batch // run.accumulate, run.steps),
            step=build_step(settings, module.build),
            done=done,
        ),
        module.recipes(settings),
    )
    for _ in range((run.steps - done) * run.accumulate):
        yield found.next()
