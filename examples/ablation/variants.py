"""What each ablation compares, and what the paper found."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ABLATIONS", "Ablation", "Variant"]


class Variant(NamedTuple):
    """One training setting."""

    label: str
    run: str
    """Name of its runs; variants that ask for the same share them. Published results are found by it."""
    flags: str = ""
    """Besides `--preset small`."""
    script: str = "moco_v3"
    paper: float | None = None
    """Top-1 of linear evaluation on ImageNet-1k, %, as the paper has it."""
    against: str = "moco_v3"
    """Run of the variant that it is compared with, seed by seed; by default that of `FULL`."""


class Ablation(NamedTuple):
    """A question."""

    title: str
    source: str
    """Table or figure of the paper."""
    variants: tuple[Variant, ...]
    note: str = ""
    """What differs from the paper's."""


PLAIN = Variant("MoCo-v3", "moco_v3--partition-ratio-0", "none", paper=68.44)
CONTROL = Variant("λ = 0", "moco_v3--ser-lambda-0", "ser --term.weight 0", paper=68.82)
FULL = Variant("SER", "moco_v3", paper=69.28)  # λ = 0.5, r = 0.25, layer 2 of 6, the whole group, [CLS] after layer 2

ABLATIONS: dict[str, Ablation] = {
    "methods": Ablation(
        "Three base methods",
        "Table 2",
        (
            CONTROL._replace(label="MoCo-v3, λ = 0", paper=None),
            FULL._replace(label="MoCo-v3, SER"),
            Variant("DINO, λ = 0", "dino--ser-lambda-0", "ser --term.weight 0", "dino", against="dino"),
            Variant("DINO, SER", "dino", "", "dino", paper=67.63, against="dino"),
            Variant(
                "Barlow Twins, λ = 0",
                "barlow_twins--ser-lambda-0",
                "ser --term.weight 0",
                "barlow_twins",
                against="barlow_twins",
            ),
            Variant("Barlow Twins, SER", "barlow_twins", "", "barlow_twins", paper=64.02, against="barlow_twins"),
        ),
        "The paper's Table 2 has plain base methods (68.44, 67.37, 63.34), not λ = 0.",
    ),
    "layer": Ablation(
        "Which layer?",
        "Table 4, Figure 3 left",
        (
            PLAIN,
            Variant("layer 1", "moco_v3--layer-1", "ser --term.layer 1"),
            FULL._replace(label="layer 2"),
            Variant("layer 4", "moco_v3--layer-4", "ser --term.layer 4", paper=68.72),
            Variant("layer 6", "moco_v3--layer-6", "ser --term.layer 6", paper=68.18),
        ),
        "The paper's layers 3, 9 and 12 of 12 stand beside 2, 4 and 6 of 6; [CLS] joins after the regularized layer.",
    ),
    "control": Ablation(
        "Does the term itself help?",
        "Table 5",
        (
            Variant(
                "untrained", "moco_v3--partition-ratio-0--steps-1--learning-rate-0", "none --steps 1 --learning-rate 0"
            ),
            PLAIN,
            CONTROL,
            FULL,
        ),
    ),
    "ratio": Ablation(
        "How much of the batch?",
        "Table 8",
        (
            PLAIN._replace(label="r = 0 (MoCo-v3)"),
            Variant("r = 0.125", "moco_v3--partition-ratio-0.125", "ser --term.ratio 0.125", paper=69.08),
            FULL._replace(label="r = 0.25"),
            Variant("r = 0.5", "moco_v3--partition-ratio-0.5", "ser --term.ratio 0.5", paper=68.30),
        ),
        "The paper's r = 0.005, 0.01, 0.02 of 2048 stand beside 0.125, 0.25, 0.5 of 64: half, once, twice the default.",
    ),
    "lambda": Ablation(
        "What weight?",
        "Table 8",
        (
            CONTROL._replace(label="λ = 0"),
            FULL._replace(label="λ = 0.5"),
            Variant("λ = 1", "moco_v3--ser-lambda-1", "ser --term.weight 1", paper=68.92),
            Variant("λ = 5", "moco_v3--ser-lambda-5", "ser --term.weight 5", paper=68.73),
            Variant("λ = 10", "moco_v3--ser-lambda-10", "ser --term.weight 10", paper=68.67),
        ),
    ),
    "group": Ablation(
        "Which group?",
        "Table 9",
        (
            FULL._replace(label="full"),
            Variant("- turns", "moco_v3--no-rotations", "--no-rotations", paper=69.17),
            Variant("- turns - flips", "moco_v3--no-rotations--no-flips", "--no-rotations --no-flips", paper=69.12),
            Variant(
                "- turns - scale",
                "moco_v3--no-rotations--scale-1-1--aspect-1-1",
                "--no-rotations --scale 1 1 --aspect 1 1",
                paper=68.67,
            ),
        ),
    ),
    "all-layers": Ablation(
        "One layer or all?",
        "Table 10",
        (
            PLAIN,
            FULL._replace(label="layer 2"),
            Variant("all layers", "moco_v3--all-layers", "ser --term.all-layers", paper=69.21),
        ),
    ),
    "cls": Ablation(
        "Where does [CLS] join?",
        "Figure 3 right",
        (
            Variant("after 0", "moco_v3--cls-layer-0", "--cls-layer 0"),
            Variant("after 1", "moco_v3--cls-layer-1", "--cls-layer 1"),
            FULL._replace(label="after 2", paper=None),
            Variant("after 4", "moco_v3--cls-layer-4", "--cls-layer 4"),
            Variant("after 5", "moco_v3--cls-layer-5", "--cls-layer 5"),
        ),
        "SER at layer 2 throughout. The paper gives a curve, highest near the middle, without numbers.",
    ),
}
