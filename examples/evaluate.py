"""Judge an encoder: k-NN, linear and non-linear classifiers, fine-tuning, what it knows of turns and flips, t-SNE.

    python examples/evaluate.py knn --model out/moco_v3/encoder --data /data/imagenet
    python examples/evaluate.py linear --model vit_small_patch16_224 --data hf:uoft-cs/cifar10
    python examples/evaluate.py shift --model out/moco_v3/encoder --folders /data/imagenet-r /data/imagenet-sketch
    accelerate launch examples/evaluate.py finetune --model out/moco_v3/encoder --data /data/imagenet

Each subcommand writes OUTPUT_DIR/SUBCOMMAND.json. Features are computed once and kept in OUTPUT_DIR/features, which
all subcommands share; what was stopped goes on where it was. Any number of processes gives the same features.

The protocols are those of the SER paper (Sections 4.1, 4.2, Appendix A.2); what it leaves open is said at each.
3DIEBench is judged as the paper does, by a linear classifier trained on its renderings: `linear --data` with these.
"""

from __future__ import annotations

import sys
from functools import reduce
from operator import or_

import pretraining  # isort: split  # noqa: F401  # sets how threads wait, ahead of torch
import tyro
from accelerate import PartialState
from evaluation.base import Judgement
from evaluation.equivariance import Equivariance
from evaluation.finetune import Finetune
from evaluation.knn import Knn
from evaluation.linear import Linear
from evaluation.mlp import Mlp
from evaluation.probe import Probe
from evaluation.shift import Shift
from evaluation.tsne import Tsne

from ser_reg.errors import SERError

__all__ = ["JUDGEMENTS", "main"]

# One line makes a subcommand of a judgement, under the name of its class.
JUDGEMENTS: tuple[type[Judgement], ...] = (
    Knn,
    Linear,
    Mlp,
    Finetune,
    Probe,
    Equivariance,
    Shift,
    Tsne,
)


def main(arguments: list[str] | None = None) -> None:
    """One judgement from the command line."""
    judgement: Judgement = tyro.cli(reduce(or_, JUDGEMENTS), args=arguments)
    try:
        judgement.run()
    finally:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except SERError as error:
        sys.exit(str(error))
