"""The command line: python -m ser_reg check MODEL, python -m ser_reg report MODEL [MODEL ...]."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine stalls spinning threads

from .check import check
from .encoders import load_encoder
from .errors import SERError
from .vit import late_cls

__all__ = ["main"]

MODEL = 'a timm name, a folder that export_timm wrote, or "package.module:function" that returns your model'


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all is well, 1 when a check or some model failed, 2 when nothing could be made."""
    parser = argparse.ArgumentParser(prog="python -m ser_reg", description="Soft equivariance for a timm ViT.")
    commands = parser.add_subparsers(required=True)
    _add_check(commands.add_parser("check", help="does the term train what it should?", description=check.__doc__))
    _add_report(commands.add_parser("report", help="how equivariant are models, at which layer, and why?"))
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except SERError as error:
        print(error, file=sys.stderr)
        return 2


def _add_check(command: argparse.ArgumentParser) -> None:
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("model", help=MODEL)
    command.add_argument("--layer", type=int, default=3, help="blocks ahead of the regularized tokens (default 3)")
    command.add_argument("--batch-size", type=int, default=256, help="images of a rank (default 256)")
    command.add_argument("--ratio", type=float, default=0.01, help="part of them that goes to the term (default 0.01)")
    command.add_argument("--world-size", type=int, default=1, help="ranks (default 1)")
    command.set_defaults(run=_check)


def _check(given: argparse.Namespace) -> int:
    vit = late_cls(load_encoder(given.model, pretrained=False), given.layer)
    found = check(vit, layer=given.layer, batch_size=given.batch_size, ratio=given.ratio, world_size=given.world_size)
    print(found)
    return 0 if found.passed else 1


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)
    command.add_argument("--images", metavar="FOLDER", help="images at any depth in it (default: embedded photographs)")
    command.add_argument("--output-dir", default="report", help="where report.html goes (default report)")
    command.add_argument("--untrained", action="store_true", help="timm names with random weights, nothing downloaded")
    command.add_argument("--layers", type=int, nargs="+", help="blocks already run (default 0 to the last)")
    command.add_argument("--image-size", type=int, help="pixels a side (default what each model was built for)")
    command.add_argument("--max-images", type=int, default=64, help="drawn at random if there are more (default 64)")
    command.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    command.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> int:
    from .report import NamedEncoders, report

    found = report(
        NamedEncoders(given.models, pretrained=not given.untrained),
        given.images,
        given.output_dir,
        layers=given.layers,
        image_size=given.image_size,
        max_images=given.max_images,
        device=given.device,
        seed=given.seed,
        progress=True,
    )
    for name, record in found["models"].items():
        print(f"{name}\n" + "\n".join(f"  {line}" for line in record.get("findings", ["failed"])))
        if "error" in record:
            print(record["error"], file=sys.stderr)
    if found["images"]["unreadable"]:
        print(
            f"{len(found['images']['unreadable'])} files could not be read: {', '.join(found['images']['unreadable'])}"
        )
    print(os.path.join(given.output_dir, "report.html"))
    return 1 if any("error" in record for record in found["models"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
