"""File patterns of a split: "train-{0000..0146}.tar", "{split}-*.parquet"."""

from __future__ import annotations

import glob
import os

from braceexpand import braceexpand

from ser_reg.errors import SERError, require

__all__ = ["files_of"]


def files_of(pattern: str, split: str, kind: str) -> list[str]:
    """The files of a split, in order.

    Args:
        pattern: path with braces (``{0000..0146}``, ``{a,b}``) and globs. A literal ``{split}`` stands for "train" or
            "val"; without it, the files are training data.
        split: "train" or "val".
        kind: what stands before the colon in ``--data``.

    Raises:
        SERError: "val" of a pattern without ``{split}``, unbalanced braces, or a file that is not there.
    """
    call = f"open_source({f'{kind}:{pattern}'!r}, {split!r})"
    ending = os.path.splitext(pattern)[1] or (".tar" if kind == "wds" else ".parquet")
    example = f"--data '{kind}:{os.path.dirname(pattern)}/{{split}}-{{0000..0003}}{ending}'"
    expected = "{split} in it, which stands for train or val"
    require(split != "val" or "{split}" in pattern, call, "a pattern of training files alone", expected, example)
    try:
        paths = list(braceexpand(os.path.expanduser(pattern.replace("{split}", split))))
    except ValueError as error:  # unbalanced braces
        raise SERError(call, str(error), "a pattern of paths", example) from error
    files, missing = [], []
    for path in paths:
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.isfile(path)
        files += found
        missing += [] if found else [path]
    first = next(iter(missing), "")
    given = f"{len(missing)} of {len(paths)} not there, the first {first!r}"
    require(not missing, call, given, "files that are all there", f"ls '{os.path.dirname(first) or '.'}'")
    return files
