"""The terms that stand beside an SSL loss, one call for all."""

from .base import Objective, Output
from .ser import SERLoss

__all__ = ["OBJECTIVES", "Objective", "Output", "SERLoss"]

# Terms by the name that the trainings' command line takes: one line registers a term.
OBJECTIVES: dict[str, type[Objective]] = {
    "ser": SERLoss,
}
