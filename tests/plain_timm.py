"""An exported encoder as plain timm loads it, which knows nothing of late [CLS]."""

from pathlib import Path
from typing import Any

import timm

__all__ = ["OLDEST", "plain_timm"]

OLDEST = timm.__version__ == "1.0.20"  # its local-dir reads no safetensors, other ways do


def plain_timm(folder: Path | str) -> Any:
    """The model, which remembers its folder in `pretrained_cfg`."""
    if not OLDEST:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    return timm.create_model(f"local-dir:{folder}", checkpoint_path=f"{folder}/model.safetensors")
