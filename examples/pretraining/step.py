"""A step's forward, in one module: base method and added term. It is what DDP, FSDP and autocast see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from data.batch import Group
from torch import Tensor, nn
from torch.nn import functional as F

from ser_reg import View
from ser_reg.objectives import Objective, Output

from .base import BaseMethod, BaseOutput, Encoded
from .encode import encode

__all__ = ["Step"]


class Step(nn.Module):
    """L = L_base(b1 and b2 jointly) + λ · L_term(b2), Equation 3.

    Which term is added it cannot tell: any `Objective` gets maps and views of the group whose views know their
    relation, pair by pair.

    Args:
        method: the base method.
        heads: the term, by layer; its loss is their mean (Table 10). None leaves the base method alone.
        weight: λ.
        target: whether the other view's maps come from the trained encoder ("online"), as in the paper's equations, or
            from the momentum encoder ("momentum"), as in its released code.
    """

    def __init__(
        self,
        method: BaseMethod,
        heads: Mapping[int, Objective] | None = None,
        weight: float = 0.0,
        target: str = "online",
    ) -> None:
        super().__init__()
        self.method = method
        self.layers = tuple(heads or ())
        self.heads = nn.ModuleList((heads or {}).values())
        self.weight = weight
        self.target = target

    def forward(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Scalars: "loss", to go backward from; "base", "term" and diagnostics, detached."""
        out: BaseOutput = self.method(groups, self._encode)
        base, embeddings = out.loss, out.trained.embeddings[0]
        scalars = {"loss": base, "base": base.detach(), "embedding_std": spread(embeddings.detach())}
        if not self.layers:
            return scalars
        term = _mean(self._compare_all(groups, out))
        logs = {f"term_{name}": value for name, value in term.logs.items()}
        return scalars | {"loss": base + self.weight * term.loss, "term": term.loss.detach()} | logs

    def _encode(self, encoder: nn.Module, groups: Sequence[Group]) -> Encoded:
        """With maps where the term wants them; in the momentum branch these are rarely wanted."""
        wanted = encoder is self.method.encoder or self.target == "momentum"
        return encode(encoder, groups, self.layers if wanted else ())

    def _compare_all(self, groups: Sequence[Group], out: BaseOutput) -> list[Output]:
        """The term for each pair of views. Local views have no momentum side."""
        which = next(i for i, group in enumerate(groups) if group.relations is not None)
        views, trained = groups[which].views, out.trained.features[which]
        outputs, first = [], 0
        if self.target == "momentum":  # each trained view against the other slow one
            slow, first = out.momentum.features[which], 2
            outputs.append(self._compare([trained[0], slow[1]], [views[0], views[1]]))
            outputs.append(self._compare([trained[1], slow[0]], [views[1], views[0]]))
        for i in range(first, len(views), 2):
            outputs.append(self._compare(trained[i : i + 2], views[i : i + 2]))
        return outputs

    def _compare(self, features: Sequence[dict[int, Tensor]], views: Sequence[View]) -> Output:
        """Mean over layers."""
        maps = features[: self.heads[0].encoded]
        return _mean([head([m[k] for m in maps], views) for head, k in zip(self.heads, self.layers, strict=True)])


def _mean(outputs: list[Output]) -> Output:
    logs = {name: torch.stack([out.logs[name] for out in outputs]).mean() for name in outputs[0].logs}
    return Output(torch.stack([out.loss for out in outputs]).mean(), logs)


def spread(embeddings: Tensor) -> Tensor:
    """1 for directions spread evenly over all dimensions, 0 when all images have the same embedding."""
    return F.normalize(embeddings.float(), dim=1).var(0, correction=0).sum().sqrt()
