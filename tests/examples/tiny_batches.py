"""Views of tiny batches: as the loop of the trainings has them, and the same without the engine."""

import importlib
from types import SimpleNamespace

import torch
from data import open_source
from data.batch import ViewDataset, collate
from data.sampler import PartitionSampler, whole_images
from pretraining.batches import Batches
from pretraining.device_views import DeviceViews
from pretraining.run import Length, build_step
from pretraining.views import extra_recipes, maker

__all__ = ["batches", "engine_batches", "tiny_step"]


def tiny_step(method, settings):
    """The step of a method, base and term, with its own views."""
    module = importlib.import_module(method)
    return build_step(settings, module.build, module.recipes(settings))


def batches(method, settings, rank=0, world_size=1):
    """The groups of one batch after another: images that the term does not read, then those that it reads."""
    run, policy = settings.run, settings.term.policy
    views, local = importlib.import_module(method).recipes(settings)
    read = whole_images(run.batch_size, settings.read, 1)
    extra = extra_recipes(policy, views, settings.data)
    source = open_source(settings.data.data, "train", run.seed)
    data = ViewDataset(source, views, local, extra, whole=policy.whole)
    on_device = DeviceViews(
        [recipe.photometric for recipe in (*views, *local)],
        policy,
        maker(settings.views, policy, settings.encoder.patch_size, views, extra),
        (run.batch_size, read),
        run.seed,
        crop_turns=settings.views.crop_turns,
        extra=extra[0].photometric if extra else None,
    )
    sampler = PartitionSampler(
        len(source), run.batch_size, read, rank, world_size, run.seed, last=run.steps, paired=policy.paired
    )
    for number, requests in enumerate(sampler):
        yield on_device(collate([data[request] for request in requests]), number)


def engine_batches(method, settings, done=0, rank=0, world_size=1):
    """The same by the engine, on one of several ranks, after the steps that were done before."""
    module, run = importlib.import_module(method), settings.run
    batch = run.batch_size // run.accumulate
    source = open_source(settings.data.data, "train", run.seed)
    read = whole_images(batch, settings.read, world_size)
    found = Batches(
        SimpleNamespace(
            settings=settings,
            accelerator=SimpleNamespace(process_index=rank, num_processes=world_size, device=torch.device("cpu")),
            source=source,
            length=Length(batch, read, len(source) // batch // run.accumulate, run.steps),
            recipes=module.recipes(settings),
            step=tiny_step(method, settings),
            done=done,
        )
    )
    for _ in range((run.steps - done) * run.accumulate):
        yield found.next()
