"""What each ablation compares, and what the paper found."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ABLATIONS", "NOT_IN_PAPER", "Ablation", "Variant"]


NOT_IN_PAPER = "not in the paper"

# Columns of a table: accuracy and equivariance scores, or accuracy and matching.
SCORES = ("knn", "linear", "rotation", "flip", "scale", "rotation_excess", "rotation_raw")
MATCHING = ("knn", "linear", "matching_rotation", "matching_flip", "near_rotation", "rotation", "flip")
CHANNELS = (
    *("knn", "linear", "own_rotation", "own_flip", "matching_rotation", "matching_flip"),
    *("turn_early", "turn_last", "flip_early", "flip_last"),
)


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
    columns: tuple[str, ...] = SCORES
    """Of its table, names in `table.COLUMNS`."""
    results: str = "ablations.json"
    """File of the published results."""


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
    "terms": Ablation(
        "Which term, at which layer?",
        "Table 6",
        (
            PLAIN,
            FULL._replace(label="SER, layer 2"),
            Variant("SER, layer 6", "moco_v3--layer-6", "ser --term.layer 6", paper=68.18),
            *(
                Variant(
                    f"{name}, layer {layer}",
                    f"moco_v3--{word}--layer-{layer}",
                    f"{word} --term.layer {layer}",
                    paper=paper,
                )
                for name, word, papers in (
                    ("EquiMod", "equimod", (69.51, 68.95)),
                    ("AugSelf", "augself", (68.23, 67.55)),
                    ("E-SSL", "essl", (None, None)),
                    ("STL", "stl", (None, None)),
                    ("Reconstruction", "reconstruction", (None, None)),
                )
                for layer, paper in zip((2, 6), papers, strict=True)
            ),
        ),
        "The paper's layers 3 and 12 of 12 stand beside 2 and 6 of 6. Each term with its own views and weight.",
        MATCHING,
        "terms.json",
    ),
    "crops": Ablation(
        "Whole images, or the crops that are there anyway?",
        NOT_IN_PAPER,
        (
            PLAIN,
            Variant("quarter turns as augmentation", "moco_v3--none--crop-turns", "none --crop-turns"),
            CONTROL._replace(label="whole images, λ = 0"),
            FULL._replace(label="SER on whole images"),
            Variant("SER on whole images, crops turned", "moco_v3--crop-turns", "--crop-turns"),
            Variant("SER on crops", "moco_v3--crops", "ser --term.crops"),
            Variant("SER on turned crops", "moco_v3--crops--crop-turns", "ser --term.crops --crop-turns"),
            Variant(
                "SER on turned crops, area from 0.8",
                "moco_v3--crops--crop-turns--crop-min-0.8",
                "ser --term.crops --crop-turns --crop-min 0.8",
            ),
        ),
        "r = 0.25 throughout: SER reads 16 of 64 images, whole or cropped. Turned: each crop by 0 to 3 quarter turns.",
        MATCHING,
        "terms.json",
    ),
    "channels": Ablation(
        "May channels turn as well?",
        NOT_IN_PAPER,
        (
            PLAIN,
            FULL._replace(label="SER, trivial channels"),
            Variant("SER, regular channels", "moco_v3--channels-regular", "ser --term.channels regular"),
        ),
        "Matching with the term's own action at its layer, and with the plain one at the last.",
        CHANNELS,
        "terms.json",
    ),
}
