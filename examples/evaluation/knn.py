"""The vote of the nearest training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ser_reg.errors import require

from .accuracy import knn_accuracy
from .base import Judgement, Session, labels_as, percent

__all__ = ["Knn"]


@dataclass(frozen=True, kw_only=True)
class Knn(Judgement):
    """Vote of the nearest training images by cosine, each with weight exp(cosine / temperature).

    Table 3 of the paper: 20 neighbours. It does not state the temperature; 0.07 is DINO's. The embedding is the
    normalised [CLS], or what timm pools. Nothing is trained.
    """

    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Of their weights."""

    def run(self) -> None:
        session = Session(self)
        train = session.embeddings("train")
        n = len(train.labels)
        given, expected = f"--k {self.k} of {n} training images that can be read", f"at most {n} neighbours"
        require(self.k <= n, session.call, given, expected, f"{session.call} --k {max(1, n // 10)}")
        test = session.embeddings("val")
        results: dict[str, Any] = {"train_images": len(train.labels), "test_images": len(test.labels)}
        if session.main:
            sets = (train["pooled"], train.labels, test["pooled"], labels_as(test, train.classes, session.call))
            results["top1"] = knn_accuracy(*sets, k=self.k, temperature=self.temperature, device=session.device)
            session.note(f"{self.k}-NN: {percent(results['top1'])} of {len(test.labels)} images")
        session.write(results)
