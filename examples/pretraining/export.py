"""The encoder that evaluations judge, as timm loads it, out of a run that may be sharded."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ser_reg import export_timm

from .checkpoints import FULL
from .encoder import build_encoder
from .run import Run

__all__ = ["export"]


def export(run: Run) -> None:
    """Write OUTPUT_DIR/encoder. All processes have to call; the main one writes."""
    state = get_model_state_dict(run.module, options=FULL)
    if not run.is_main:
        return
    settings, method = run.settings.encoder, run.step.method
    prefix = "method.encoder." if method.exported is method.encoder else "method.target."
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(settings, run.settings.late_layer)
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    folder = run.settings.run.output_dir / "encoder"
    export_timm(encoder, folder, settings.architecture, **settings.model_args)
