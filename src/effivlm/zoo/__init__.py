"""Tiny trained checkpoints that ship with the package."""

from pathlib import Path

from effivlm import registry

HOME = Path(__file__).parent / "checkpoints"


def names() -> list[str]:
    """Checkpoints by name."""
    return sorted(p.parent.name for p in HOME.glob("*/config.json"))


def located(name: str | Path) -> str | Path:
    """The folder of ``zoo:NAME``; any other name as it is.

    Raises:
        UnknownName: with near names.
    """
    text = str(name)
    return checkpoint(text.removeprefix("zoo:")) if text.startswith("zoo:") else name


def checkpoint(name: str) -> Path:
    """The folder of a checkpoint.

    Raises:
        UnknownName: with near names.
    """
    return registry.lookup("zoo checkpoint", name, {n: HOME / n for n in names()})
