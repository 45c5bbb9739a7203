"""A classifier trained on frozen features, at a learning rate that held-out training images chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from accelerate.utils import broadcast_object_list
from data import Source, Subset
from torch import Tensor, nn

from ser_reg.errors import require

from .base import Judgement, Session, folder_name, labels_as, percent
from .checkpoint import EpochCheckpoint
from .classifiers import Batches, CachedBatches, Kind, choose_rate, fit, predict, split, top, top5, usual_batch
from .crops import CropFeatures, Crops
from .features import Extraction

__all__ = ["Trained", "judged", "train_classifier"]


@dataclass(frozen=True, kw_only=True)
class Trained(Judgement):
    """What classifiers on frozen features share.

    The learning rate is chosen on a tenth of the training images (at most 50,000), held out at random; then the
    classifier is trained anew on all of them, and judged at the end of that training, once, on the test images.

    By default the features are those of the middle of each image, computed once: minutes instead of days. With
    --augment they are those of random crops and flips, computed anew in every epoch, which is the paper's protocol.
    """

    epochs: int = 50
    batch_size: int | None = None
    """Of all processes together; by default 1024, and less for fewer than 16,384 training images."""
    last: int = 4
    """Blocks whose normalised [CLS] are joined; 1 for a model without, of which the pooled output is used."""
    augment: bool = False
    """The paper's protocol: random crops and flips, features computed anew in every epoch."""

    @property
    def protocol(self) -> str:
        """In words."""
        return "random crops and flips, drawn anew in every epoch" if self.augment else "the middle of each image"


class _Training(NamedTuple):
    """What a classifier is trained on, and what chooses its rate."""

    most: Batches
    """Of all training images but those held out."""
    all: Batches
    held_out: Tensor
    """(H, D) features."""
    held_out_labels: Tensor
    count: int
    """Of all training images; without those that cannot be read, on kept features."""
    batch_size: int
    """As asked for, or as many as there are images but those held out."""
    crops: Mapping[str, Crops]
    """Of both trainings, which may come upon images that cannot be read; none on kept features."""


def train_classifier(
    session: Session, settings: Trained, kind: Kind, base_rates: tuple[float, ...], scaled: bool
) -> tuple[nn.Module | None, dict[str, object]]:
    """A classifier trained on all training images at the rate that held-out ones chose, and what came of it.

    Without --augment only the main process trains, and the others have no classifier.

    Args:
        base_rates: learning rates to choose from.
        scaled: whether they are for a batch of 256, and grow with it.
    """
    given, remedy = "--base-rates without a number", f"{session.call} --base-rates 0.1 1"
    require(base_rates, session.call, given, "one at least", remedy)
    extraction, name = session.class_tokens(settings.last)
    source = session.source("train")
    test = session.split("val", extraction)
    classes = source.classes
    labels_as(test, classes, session.call)  # ahead of the training
    paper = "" if settings.augment else " (--augment: the paper's protocol)"
    session.note(f"{settings.name} on {settings.protocol}{paper}")
    prepare = _on_crops if settings.augment else _on_kept_features
    training = prepare(session, settings, source, extraction, name)
    if training is None:
        return None, {}
    batch_size = training.batch_size
    rates = [rate * batch_size / 256 if scaled else rate for rate in base_rates]

    def trained(which: str, rates: list[float], batches: Batches) -> list[nn.Module]:
        checkpoint = None
        if settings.augment:  # hours; on kept features it is minutes
            key = session.key(source) | {"rates": rates, "epochs": settings.epochs, "last": settings.last}
            key |= {"batch_size": batch_size, "classifier": kind.name}
            path = settings.output_dir / f"{settings.name}-{which}.progress"
            checkpoint = EpochCheckpoint(path, key, session.main, training.crops[which])
        sizes, long = (training.held_out.shape[1], len(classes)), settings.epochs
        device, note = session.device, session.note_epoch
        return fit(kind, *sizes, rates, batches, long, settings.seed, device, checkpoint, note)

    heads = trained("choice", rates, training.most)
    found = choose_rate(heads, rates, training.held_out, training.held_out_labels)
    best = _best(session, found, len(training.held_out_labels), base_rates, rates, settings.augment)
    [head] = trained("all", [best], training.all)
    unreadable = sorted({pair for crops in training.crops.values() for pair in crops.all_unreadable()})
    if settings.augment:
        session.leave_out("train", unreadable)
    results: dict[str, object] = judged(session, predict(head, test[name]), labels_as(test, classes, session.call))
    results |= {"protocol": settings.protocol, "test_images": len(test.labels)}
    results["train_images"] = training.count - len(unreadable)
    results |= {"classes": classes, "batch_size": batch_size, "rate": best, "held_out_accuracy": found}
    return head, results


def judged(session: Session, scores: Tensor, labels: Tensor) -> dict[str, object]:
    """Top-1 of logits on test images, and top-5 of more than five classes."""
    first, five = top(scores, labels, 1, session.call), top5(scores, labels, session.call)
    also = "" if five is None else f", top-5 {percent(five)}"
    session.note(f"{session.settings.name}: top-1 {percent(first)}{also} of {len(labels)} test images")
    return {"top1": first, "top5": five}


def _on_kept_features(
    session: Session, settings: Trained, source: Source, extraction: Extraction, name: str
) -> _Training | None:
    """Features of the middle of each image, from disk; None on all processes but the main one."""
    train = session.split("train", extraction)
    if not session.main:
        return None
    features, labels = train[name], train.labels
    inner, held_out = split(len(labels), settings.seed)
    batch_size = min(settings.batch_size or usual_batch(len(source)), len(inner))
    most, everything = (
        CachedBatches(features, labels, batch_size, settings.seed, session.device, indices) for indices in (inner, None)
    )
    return _Training(most, everything, features[held_out], labels[held_out], len(labels), batch_size, {})


def _on_crops(session: Session, settings: Trained, source: Source, extraction: Extraction, name: str) -> _Training:
    """Features of random crops, drawn anew in every epoch, by all processes."""
    inner, held_out = (indices.tolist() for indices in split(len(source), settings.seed))
    where = f"{folder_name(settings.data)}-train-held-out-{settings.seed}"
    judge = session.features(Subset(source, held_out), where, extraction)
    batch_size = min(settings.batch_size or usual_batch(len(source)), len(inner))
    how = session.encoder.size, batch_size, settings.seed, settings.workers
    crops = {
        which: Crops(session.accelerator, source, indices, *how)
        for which, indices in {"choice": inner, "all": list(range(len(source)))}.items()
    }
    most, everything = (
        CropFeatures(drawn, session.encoder, lambda *both: extraction.compute(*both)[name]) for drawn in crops.values()
    )
    return _Training(most, everything, judge[name], judge.labels, len(source), batch_size, crops)


def _best(
    session: Session,
    found: dict[float, float],
    held_out: int,
    base_rates: tuple[float, ...],
    rates: list[float],
    together: bool,
) -> float:
    """The best rate, the same on all processes if they train together."""
    [best] = broadcast_object_list([next(iter(found))]) if together else [next(iter(found))]
    session.note(f"learning rate {best:g}: {percent(found[best])} of {held_out} held-out training images")
    if best in (min(rates), max(rates)) and len(set(found.values())) > 1:
        end = "lowest" if best == min(rates) else "highest"
        tried = " ".join(f"{rate:g}" for rate in base_rates)
        session.note(f"that is the {end} of --base-rates {tried}: beyond it there may be better ones")
    return best
