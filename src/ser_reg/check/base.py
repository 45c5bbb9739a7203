"""What a finding is, and what the questions are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone, patch_tokens
from ..objectives import Objective
from ..views import View

__all__ = ["Case", "CheckReport", "Finding"]


class Finding(NamedTuple):
    """One question, whether it was answered well, the figure, and what to type if it was not."""

    question: str
    passed: bool
    figure: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'pass' if self.passed else 'FAIL'}  {self.question}: {self.figure}"
        return line if self.passed or not self.remedy else f"{line}; type: {self.remedy}"


class CheckReport(NamedTuple):
    """The findings; printed, a line each."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


@dataclass(frozen=True)
class Case:
    """Copies of model and term, and views of a few images that the questions are asked with."""

    trunk: Backbone
    term: Objective
    layer: int
    images: int
    """How many; views that show each several times, turn by turn, have several times as many rows."""
    draws: list[tuple[View, ...]]
    """Several draws of the views."""
    maps: list[list[Tensor]]
    """Features of each, without gradient."""

    def encode(self, views: Sequence[View]) -> list[Tensor]:
        """Maps of the views that the term wants encoded, as it takes them in training."""
        maps = [patch_tokens(self.trunk.model, view.images, self.layer) for view in views[: self.term.encoded]]
        # A term refuses features without gradient; that the model is frozen is for the finding to say.
        return [z.requires_grad_() if torch.is_grad_enabled() and not z.requires_grad else z for z in maps]

    def rows(self, start: int, stop: int) -> list[int]:
        """Rows of the images from start to stop."""
        times = len(self.maps[0][0]) // self.images
        return [turn * self.images + image for turn in range(times) for image in range(start, stop)]
