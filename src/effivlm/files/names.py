"""Names as file names: the one place where a text that is not ours becomes part of a path."""

import hashlib
from pathlib import Path

LONGEST = 100  # bytes; file systems take 255, and suffixes are added


def file_name(name: str) -> str:
    """One component of a path that stays in its folder: the name itself where it can be one, else
    what can be kept of it and a hash, so that different names stay different.
    """
    kept = "".join("_" if _foreign(c) else c for c in name)
    while len(kept.encode()) > LONGEST - 20:
        kept = kept[: len(kept) - 1 - (len(kept.encode()) - LONGEST + 20) // 4]
    if kept.startswith(".") or not kept:
        kept = "_" + kept[1:]
    if kept == name:
        return name
    mark = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:12]
    return f"{kept}-{mark}"


def label_of(model: str | Path) -> str:
    """What tables and records call a model: the last name of its folder or hub id."""
    path = Path(str(model).removeprefix("zoo:"))
    return path.name if path.name not in ("", "..") else path.resolve().name


def _foreign(character: str) -> bool:
    return character in "/\\:" or not character.isprintable()
