"""The added term: its settings, made from the signatures of `ser_reg.objectives`, and its heads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_type_hints

import docstring_parser
import tyro

from ser_reg import SERError
from ser_reg.errors import require
from ser_reg.objectives import OBJECTIVES, Objective

from .policies import POLICIES, Policy

__all__ = ["DEFAULT_TERM", "TERMS", "NoTerm", "TermSettings", "build_heads", "term_words"]

DEFAULT_TERM = "ser"


@dataclass(frozen=True, kw_only=True)
class TermSettings:
    """The added term, and how it stands beside the base method. A subclass has the term's own settings as well."""

    name: ClassVar[str]
    objective: ClassVar[type[Objective]]

    weight: float = 0.5
    """λ (Table 8). 0: the control (Table 5), with what the term would change of the views. The released scripts of SER
    set 1.0 (DINO 0.3)."""
    ratio: float = 1.0
    """r: part of the batch that the term reads; where it wants whole images, the part that is seen whole (Table 8)."""
    layer: int = 3
    """Blocks ahead of the tokens that it compares (Figure 3, Table 4)."""
    all_layers: bool = False
    """The term at every layer instead, each with a head of its own (Table 10)."""
    target: Literal["online", "momentum"] = "online"
    """The other view's tokens come from the trained encoder, as in the equations, or from the momentum encoder, as in
    the released code for MoCo-v3 and DINO."""

    @property
    def policy(self) -> Policy:
        """What its views look like."""
        return POLICIES["cropped" if getattr(self, "crops", False) else self.objective.policy]

    def check(self, script: str) -> None:
        """Raise a SERError for weights and ratios that are none. Its own settings the term checks when it is built."""
        typed = f"python examples/{script} {self.name}"
        require(self.weight >= 0, script, f"weight={self.weight}", "no negative weight", f"{typed} --term.weight 0.5")
        require(
            0 < self.ratio <= 1,
            script,
            f"ratio={self.ratio}",
            "a part of the batch, 0 to 1",
            f"{typed} --term.ratio {self.policy.ratio}  # or, for the plain base method: python examples/{script} none",
        )
        two = self.objective.encoded == 2 and self.policy.extra == "none"
        require(
            two or self.target == "online",
            script,
            f"target={self.target!r} with {self.name}",
            "maps of the trained encoder: this term does not compare the base method's two views alone",
            f"{typed} --term.target online",
        )


@dataclass(frozen=True)
class NoTerm:
    """The plain base method: nothing is added, and all images are cropped."""

    name: ClassVar[str] = "none"
    weight: ClassVar[float] = 0.0
    ratio: ClassVar[float] = 0.0
    layer: ClassVar[int] = 0
    all_layers: ClassVar[bool] = False
    target: ClassVar[str] = "online"
    policy: ClassVar[Policy] = Policy()

    def check(self, script: str) -> None:
        """Nothing can be wrong."""


@dataclass(frozen=True, kw_only=True)
class _WholeOrCrops(TermSettings):
    """Of terms that compare whole images, and can do with crops whose relation is known."""

    crops: bool = False
    """The term reads the base method's own crops (of the part r of the batch) and how they relate; no image is seen
    whole."""


def _settings_of(name: str, objective: type[Objective]) -> type[TermSettings]:
    """A dataclass with what the constructor takes besides the width of the maps and the maker of the views, and with
    the weight and the ratio that suit the term."""
    described = docstring_parser.parse(objective.__doc__ or "")
    meanings = {parameter.arg_name: parameter.description for parameter in described.params}
    kinds = get_type_hints(objective.__init__)
    own = [
        (
            parameter.name,
            Annotated[kinds.get(parameter.name, str), tyro.conf.arg(help=meanings.get(parameter.name))],
            tyro.MISSING if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(objective).parameters.values()
        if parameter.name not in ("dim", "maker")
    ]
    base = _WholeOrCrops if POLICIES[objective.policy].whole else TermSettings
    if taken := {f.name for f in fields(base)} & {parameter for parameter, *_ in own}:
        raise TypeError(f"{objective.__name__} takes {', '.join(taken)}, which here belongs to every term: rename it")
    suited = [("weight", float, objective.default_weight), ("ratio", float, POLICIES[objective.policy].ratio)]
    space = {"__doc__": described.short_description or objective.__name__, "name": name, "objective": objective}
    return make_dataclass(
        f"{objective.__name__}Settings", suited + own, bases=(base,), namespace=space, frozen=True, kw_only=True
    )


TERMS: dict[str, type[TermSettings] | type[NoTerm]] = {
    name: _settings_of(name, objective) for name, objective in OBJECTIVES.items()
} | {NoTerm.name: NoTerm}


def term_words(chosen: TermSettings | NoTerm, suited: Mapping[str, Mapping[str, Any]]) -> Any:
    """The type that tyro shows as one word for each term.

    Args:
        chosen: the preset's; others have its layer, its ratio if they too see whole images, and defaults of their own.
        suited: other defaults by term, of the base method.
    """
    words = []
    for name, kind in TERMS.items():
        default = chosen if name == chosen.name else kind(**_borrowed(chosen, kind), **suited.get(name, {}))
        word = tyro.conf.subcommand(name, default=default, prefix_name=False, description=kind.__doc__)
        words.append(Annotated[kind, word])
    return Union[tuple(words)]  # noqa: UP007  (of as many as there are)


def _borrowed(chosen: TermSettings | NoTerm, kind: type[TermSettings] | type[NoTerm]) -> dict[str, Any]:
    if NoTerm.name in (chosen.name, kind.name):
        return {}
    whole = chosen.policy.whole and POLICIES[kind.objective.policy].whole
    return {name: getattr(chosen, name) for name in ("layer", "all_layers", *(["ratio"] if whole else []))}


def build_heads(
    settings: TermSettings, widths: Mapping[int, int], maker: object, patch_size: int
) -> dict[int, Objective]:
    """One of the term for each layer.

    Args:
        settings: which term, and its own settings.
        widths: D of the maps, by layer: blocks that run before them.
        maker: what makes the views.
        patch_size: of the encoder, which a term that takes it and was told none is told.

    Raises:
        SERError: a setting of its own that the term refuses; the remedy is a flag.
    """
    common = {f.name for f in fields(_WholeOrCrops)}
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in common}
    if own.get("patch_size", patch_size) is None:
        own["patch_size"] = patch_size
    try:
        return {layer: OBJECTIVES[settings.name](dim, **own, maker=maker) for layer, dim in widths.items()}
    except SERError as error:
        name = error.given.partition("=")[0]
        if name not in own:
            raise
        remedy = f"{settings.name} --term.{name.replace('_', '-')} {getattr(type(settings), name)}"
        raise SERError(f"the term {settings.name}", error.given, error.expected, remedy) from error
