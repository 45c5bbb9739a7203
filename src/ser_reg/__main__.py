"""The command line: python -m ser_reg check MODEL."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine stalls spinning threads

from torch import nn

from .check import check
from .errors import SERError
from .vit import create, late_cls

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all is well, 1 when a check failed, 2 when it could not be made."""
    parser = argparse.ArgumentParser(prog="python -m ser_reg", description="Soft equivariance for a timm ViT.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="does the term train what it should?", description=check.__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("model", help='a timm name, or "package.module:function" that returns your model')
    command.add_argument("--layer", type=int, default=3, help="blocks ahead of the regularized tokens (default 3)")
    command.add_argument("--batch-size", type=int, default=256, help="images of a rank (default 256)")
    command.add_argument("--ratio", type=float, default=0.01, help="part of them that goes to the term (default 0.01)")
    command.add_argument("--world-size", type=int, default=1, help="ranks (default 1)")
    given = parser.parse_args(arguments)
    try:
        vit = late_cls(_model(given.model), given.layer)
        report = check(
            vit, layer=given.layer, batch_size=given.batch_size, ratio=given.ratio, world_size=given.world_size
        )
    except SERError as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 0 if report.passed else 1


def _model(name: str) -> nn.Module:
    if ":" not in name:
        return create(name)
    module, function = name.split(":", 1)
    sys.path.insert(0, os.getcwd())
    try:
        model: nn.Module = getattr(importlib.import_module(module), function)()
        return model
    except (ImportError, AttributeError) as error:
        raise SERError(
            f"python -m ser_reg check {name}",
            str(error),
            'a timm name, or "package.module:function" from here',
            "python -m ser_reg check vit_small_patch16_224",
        ) from error


if __name__ == "__main__":
    sys.exit(main())
