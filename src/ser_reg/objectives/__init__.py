"""The terms that stand beside an SSL loss, one call for all."""

from .augself import AugSelf
from .base import Objective, Output
from .equimod import EquiMod
from .essl import ESSL
from .reconstruction import Reconstruction
from .ser import SERLoss
from .stl import STL

__all__ = ["ESSL", "OBJECTIVES", "STL", "AugSelf", "EquiMod", "Objective", "Output", "Reconstruction", "SERLoss"]

# Terms by the name that the trainings' command line takes: one line registers a term.
OBJECTIVES: dict[str, type[Objective]] = {
    "ser": SERLoss,
    "augself": AugSelf,
    "equimod": EquiMod,
    "essl": ESSL,
    "stl": STL,
    "reconstruction": Reconstruction,
}
