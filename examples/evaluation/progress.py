"""A long training that goes on where it was stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from results import atomically

from ser_reg import SERError

__all__ = ["Progress"]


class Progress:
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
        remedy = f"rm '{self.path}'  # begins anew"
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise SERError(f"resume {self.path}", str(error).split("\n")[0], "a whole file", remedy) from error
        key = state.pop("key")
        other = [name for name in self.key | key if self.key.get(name) != key.get(name)]
        if other:
            given = ", ".join(f"{name} {key.get(name)}" for name in other)
            expected = ", ".join(f"{name} {self.key.get(name)}" for name in other)
            raise SERError(f"resume {self.path}", f"a training with {given}", expected, remedy)
        return state

    def save(self, state: dict[str, Any]) -> None:
        if self.writes:
            with atomically(self.path) as part:
                torch.save(state | {"key": self.key}, part)
