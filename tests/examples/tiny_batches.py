"""Views of tiny batches, as the loop of the trainings has them in one process without workers."""

import importlib

from data import open_source
from data.batch import ViewDataset, collate
from data.sampler import PartitionSampler, whole_images
from pretraining.views import DeviceViews

__all__ = ["batches"]


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
