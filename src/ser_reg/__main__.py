"""The command line: python -m ser_reg check MODEL, python -m ser_reg report MODEL [MODEL ...]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .backbones import backbone, late_cls
from .check import check
from .errors import SERError, require
from .export import is_timm_name, load_encoder

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all is well, 1 when a check or some model failed, 2 when nothing could be made."""
    try:
        import tyro
    except ImportError:
        print('The command line needs tyro: pip install "ser-reg[cli]"', file=sys.stderr)
        return 2
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            {"check": _check, "report": _report},
            prog="python -m ser_reg",
            description="Soft equivariance for the vision transformer that you already have.",
            args=arguments,
            config=(
                tyro.conf.PositionalRequiredArgs,
                tyro.conf.PositionalMetavarFromFieldName,
                tyro.conf.FlagCreatePairsOff,
            ),
        )
        return code
    except SERError as error:
        print(error, file=sys.stderr)
        return 2


def _check(
    model: str,
    *,
    images: Path | None = None,
    image_size: int | None = None,
    term: str = "ser",
    layer: int = 3,
    batch_size: int = 256,
    ratio: float | None = None,
    world_size: int = 1,
) -> int:
    """Does the term train what it should?

    Does [CLS] join at its layer, does its gradient reach the early layers and nothing else, has the true relation a
    lower loss than a wrong one (or, with heads that have to learn it, another loss), do one process and two agree, and
    is there memory for it?

    Args:
        model: a timm name, to which late_cls is applied; a folder that export_timm wrote, or
            "package.module:function" that returns your model, both as they are
        images: folder with images at any depth in it; by default noise
        image_size: pixels a side; by default what the model was built for
        term: ser, augself, equimod, essl, stl or reconstruction
        layer: blocks ahead of the regularized tokens
        batch_size: images of a rank
        ratio: part of them that goes to the term; by default 0.01 of whole images, all of crops
        world_size: ranks
    """
    encoder = load_encoder(model, pretrained=False)
    trunk = backbone(encoder, f"python -m ser_reg check {model}")
    trunk.check_layer(f"python -m ser_reg check MODEL --layer {layer}", layer)
    if is_timm_name(model) and trunk.has_prefix:
        late_cls(encoder, min(layer, trunk.depth - 1))
    found = check(
        encoder,
        images,
        layer=layer,
        term=term,
        batch_size=batch_size,
        ratio=ratio,
        world_size=world_size,
        image_size=image_size,
    )
    print(found)
    return 0 if found.passed else 1


def _report(
    models: list[str],
    *,
    images: Path | None = None,
    output_dir: Path = Path("report"),
    untrained: bool = False,
    layers: list[int] | None = None,
    image_size: int | None = None,
    max_images: int = 64,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """How equivariant are models, at which layer, and why? One page with pictures.

    Args:
        models: timm names, folders that export_timm wrote, or "package.module:function" that returns your model
        images: folder with images at any depth in it; by default embedded photographs
        output_dir: where report.html goes
        untrained: timm names with random weights, nothing downloaded
        layers: blocks already run; by default 0 to the last
        image_size: pixels a side; by default what each model was built for
        max_images: drawn at random if there are more
        device: such as cuda
        seed: of all that is drawn
    """
    from .report import NamedEncoders, report

    command = "python -m ser_reg report"
    require(models, command, "no model", "at least one", f"{command} vit_small_patch16_224")
    found = report(
        NamedEncoders(models, pretrained=not untrained),
        images,
        output_dir,
        layers=layers,
        image_size=image_size,
        max_images=max_images,
        device=device,
        seed=seed,
        progress=True,
    )
    for name, record in found["models"].items():
        print(f"{name}\n" + "\n".join(f"  {line}" for line in record.get("findings", ["failed"])))
        if "error" in record:
            print(record["error"], file=sys.stderr)
    unreadable = found["images"]["unreadable"]
    if unreadable:
        print(f"{len(unreadable)} files could not be read: {', '.join(unreadable)}")
    print(os.path.join(output_dir, "report.html"))
    return 1 if any("error" in record for record in found["models"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
