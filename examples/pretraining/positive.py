"""The check that groups of settings share: sizes are positive."""

from __future__ import annotations

from ser_reg.errors import require

__all__ = ["require_positive"]


def require_positive(script: str, settings: object, **typical: int) -> None:
    """Raise a SERError unless these sizes, by name, are positive or None; the remedy types typical ones."""
    sizes = {name: getattr(settings, name) for name in typical}
    wrong = {name: size for name, size in sizes.items() if size is not None and size < 1}
    given = ", ".join(f"{name}={size}" for name, size in wrong.items())
    flags = " ".join(f"--{name.replace('_', '-')} {typical[name]}" for name in wrong)
    require(not wrong, script, given, "positive numbers", f"python examples/{script} {flags}")
