"""What a finding is, and what the questions are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ..backbones import Backbone, patch_tokens
from ..objectives import Objective
from ..views import View

__all__ = ["Case", "CheckReport", "Finding", "features"]


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
    draws: list[tuple[View, ...]]
    """Several pairs of views."""
    maps: list[list[Tensor]]
    """Features of each, without gradient."""


def features(model: nn.Module, views: Sequence[View], layer: int) -> list[Tensor]:
    """Maps of the views, as the term takes them."""
    return [patch_tokens(model, view.images, layer) for view in views]
