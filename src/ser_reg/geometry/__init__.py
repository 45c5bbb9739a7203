"""What can be done to a map: the elements of the group, and their action."""

from .action import act
from .elements import GroupElement

__all__ = ["GroupElement", "act"]
