"""Where a result comes from: commit, versions, device."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("effivlm", "torch", "transformers", "tokenizers", "pillow", "numpy")


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str, image_backend: str) -> dict[str, Any]:
    """Commit, dirty flag, versions, device, image back end, date."""
    commit, dirty = commit_of(Path(__file__))
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {n: v for n in PACKAGES if (v := package_version(n))},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": device,
        "image_backend": image_backend,
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit_of(file: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the repository that tracks a file.

    Returns:
        (None, None) without git, and where the file merely lies inside someone else's repository (a
        virtual environment).
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    return _git(file.parent, "rev-parse", "HEAD"), bool(
        _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    )


def _git(folder: Path, *args: str) -> str | None:
    command = ["git", "-C", str(folder), *args]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
