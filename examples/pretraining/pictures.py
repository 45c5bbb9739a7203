"""What a term paints, at the end of a run: pictures beside those that it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from data.batch import Group
from torch import Tensor

from .encode import encode_views
from .run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "write_pictures"]

SHOWN = 8  # images


def write_pictures(run: Run, groups: Sequence[Group]) -> None:
    """Write OUTPUT_DIR/reconstructions.png, if the term has pictures, of some images of a batch.

    Sharded parameters are not put together for it: then there is none.

    Args:
        run: at its end.
        groups: of the batch, those that the term reads last.
    """
    step = run.step
    head = step.heads[-1] if step.layers else None
    if not (run.is_main and hasattr(head, "pictures") and len(groups[-1].images[0])) or run.settings.run.fsdp:
        return
    group, encoder = _some(groups[-1]), step.method.encoder
    training = encoder.training
    encoder.eval()
    with torch.no_grad(), run.accelerator.autocast():
        trained = encode_views(encoder, group.images, step.layers)[1]
        features, views = step.in_order(group, trained)
        targets, painted = head.pictures([maps[step.layers[-1]] for maps in features], views)
    encoder.train(training)
    draw(targets, painted).savefig(run.settings.run.output_dir / "reconstructions.png", dpi=150)


def _some(group: Group) -> Group:
    """Both global views, and what the term has besides, of a few images."""
    views, extra = ([view[:SHOWN] for view in kind] for kind in (group.views[:2], group.extra))
    return Group([v.images for v in views], [v.relation for v in views], [v.drawn for v in views], extra)


def draw(targets: Sequence[Tensor], painted: Sequence[Tensor]) -> Figure:
    """A row of targets, one of what was painted, for each place on the way; a column an image."""
    from matplotlib.figure import Figure  # few runs draw

    rows = [row for pair in zip(targets, painted, strict=True) for row in pair]
    figure = Figure(figsize=(1.1 * len(rows[0]) + 0.6, 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for i, (row, places) in enumerate(zip(rows, axes, strict=True)):
        places[0].set_ylabel(f"{'painted' if i % 2 else 'target'} {i // 2 + 1}")
        for image, place in zip(row.float().cpu(), places, strict=True):
            place.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            place.set(xticks=[], yticks=[])
    return figure
