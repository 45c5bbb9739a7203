"""What is kept of a long training after each epoch, so that it goes on where it was stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ser_reg.errors import SERError, require
from ser_reg.records import atomically

__all__ = ["EpochCheckpoint"]


class EpochCheckpoint:
    """A file that holds the state after the last whole epoch, of a training described by `key`.

    Args:
        path: the file; written by one process, read by all.
        key: what the training depends on; the state of another is refused.
        writes: whether this process is the one that writes.
    """

    def __init__(self, path: Path, key: dict[str, Any], writes: bool) -> None:
        self.path, self.key, self.writes = path, {name: str(value) for name, value in key.items()}, writes

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
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise SERError(call, str(error).split("\n")[0], "a whole file", remedy) from error
        key = state.pop("key")
        other = [name for name in self.key | key if self.key.get(name) != key.get(name)]
        given, expected = (", ".join(f"{name} {found.get(name)}" for name in other) for found in (key, self.key))
        require(not other, call, f"a training with {given}", expected, remedy)
        return state

    def save(self, state: dict[str, Any]) -> None:
        if self.writes:
            with atomically(self.path) as draft:
                torch.save(state | {"key": self.key}, draft)
