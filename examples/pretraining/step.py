"""A step's forward, in one module: base method and added term. It is what DDP, FSDP and autocast see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from data.batch import Group
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ser_reg import View
from ser_reg.objectives import Objective, Output

from .base import BaseMethod, BaseOutput, Encoded
from .encode import encode, encode_views
from .policies import POLICIES, Policy

__all__ = ["Step"]


class Step(nn.Module):
    """L = L_base(all images jointly) + λ · L_term(those that the term reads), Equation 3.

    Which term is added it cannot tell: any `Objective` gets maps and views of the group whose views know their
    relation, in the order of its policy.

    Args:
        method: the base method.
        heads: the term, by layer; its loss is their mean (Table 10). None leaves the base method alone.
        weight: λ.
        target: whether the other view's maps come from the trained encoder ("online"), as in the paper's equations, or
            from the momentum encoder ("momentum"), as in its released code.
        policy: what the term's views are.
    """

    def __init__(
        self,
        method: BaseMethod,
        heads: Mapping[int, Objective] | None = None,
        weight: float = 0.0,
        target: str = "online",
        policy: Policy = POLICIES["equivariant"],
    ) -> None:
        super().__init__()
        self.method = method
        self.layers = tuple(heads or ())
        self.heads = nn.ModuleList((heads or {}).values())
        self.encoded = self.heads[0].encoded if heads else 0
        self.weight = weight
        self.target = target
        self.policy = policy

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
        """The term for all that it compares: as a rule once, of whole images for each pair of views."""
        which = next(i for i, group in enumerate(groups) if group.relations is not None)
        group, trained = groups[which], out.trained.features[which]
        if self.target == "momentum":  # each trained view against the other slow one; local views have none
            (first, second), slow = group.views[:2], out.momentum.features[which]
            outputs = [self._compare([trained[0], slow[1]], [first, second])]
            outputs.append(self._compare([trained[1], slow[0]], [second, first]))
        else:
            outputs = [self._compare(*self.in_order(group, trained))]
        if self.policy.whole:
            views = group.views
            outputs += [self._compare(trained[i : i + 2], views[i : i + 2]) for i in range(2, len(views), 2)]
        return outputs

    def in_order(
        self, group: Group, trained: Sequence[dict[int, Tensor]]
    ) -> tuple[list[dict[int, Tensor]], list[View]]:
        """Maps by layer and views as the term is handed them.

        Extra views that it wants encoded have a forward of their own, after that of the base method, none of whose
        heads and batch statistics they reach.

        Args:
            group: images that the term reads.
            trained: maps of the base method's views, by layer.
        """
        views = self.policy.in_order(group.views, group.extra)
        encoded = [view for view in views[: self.encoded] if any(view is other for other in group.extra)]
        encoder = self.method.encoder
        extra = encode_views(encoder, [view.images for view in encoded], self.layers)[1]
        if encoded and isinstance(encoder, FSDPModule):
            encoder.unshard()  # backward it would be so only where embeddings have a gradient, which these do not
        return self.policy.in_order(trained, extra), views

    def _compare(self, features: Sequence[dict[int, Tensor]], views: Sequence[View]) -> Output:
        """Mean over layers."""
        maps = features[: self.encoded]
        return _mean([head([m[k] for m in maps], views) for head, k in zip(self.heads, self.layers, strict=True)])


def _mean(outputs: list[Output]) -> Output:
    logs = {name: torch.stack([out.logs[name] for out in outputs]).mean() for name in outputs[0].logs}
    return Output(torch.stack([out.loss for out in outputs]).mean(), logs)


def spread(embeddings: Tensor) -> Tensor:
    """1 for directions spread evenly over all dimensions, 0 when all images have the same embedding."""
    return F.normalize(embeddings.float(), dim=1).var(0, correction=0).sum().sqrt()
