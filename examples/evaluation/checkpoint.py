"""What is kept of a long training after each epoch, so that it goes on where it was stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ser_reg.errors import SERError, require
from ser_reg.records import atomically

from .crops import Crops

__all__ = ["EpochCheckpoint"]


class EpochCheckpoint:
    """A file that holds the state after the last whole epoch, of a training described by `key`.

    Args:
        path: the file; written by one process, read by all.
        key: what the training depends on; the state of another is refused.
        writes: whether this process is the one that writes.
        crops: whose unreadable images are kept as well, so that they are known to a training that goes on.
    """

    def __init__(self, path: Path, key: dict[str, Any], writes: bool, crops: Crops | None = None) -> None:
        self.path, self.key, self.writes = path, {name: str(value) for name, value in key.items()}, writes
        self.crops = crops

    def load(self) -> dict[str, Any] | None:
        """The state, on the CPU; None if nothing has been done.

        Raises:
            SERError: the file belongs to a training with other settings, or cannot be read.
        """
        if not self.path.exists():
            return None
        call, remedy = f"resume {self.path}", f"rm '{self.path}'  # begins anew"
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            key, unreadable = state.pop("key"), state.pop("unreadable")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise SERError(call, str(error).split("\n")[0], "a whole file", remedy) from error
        except (AttributeError, KeyError, TypeError) as error:
            raise SERError(call, "a file of something else", "the progress of a training", remedy) from error
        other = [name for name in self.key | key if self.key.get(name) != key.get(name)]
        given, expected = (", ".join(f"{name} {found.get(name)}" for name in other) for found in (key, self.key))
        require(not other, call, f"a training with {given}", expected, remedy)
        if self.crops:
            self.crops.unreadable |= dict(unreadable)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """All processes call it."""
        unreadable = self.crops.all_unreadable() if self.crops else []
        if self.writes:
            with atomically(self.path) as draft:
                torch.save(state | {"key": self.key, "unreadable": unreadable}, draft)
