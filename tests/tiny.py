"""Tiny models with random weights, one per family, and prompts for them; they are part of the package's contract."""

import pytest

from effivlm.contract.twin import generate
from effivlm.families.tiny import FAMILIES, batch, build, prompt, randomise

# In `make test` every method meets every one of these; the others meet a few, and all in `make contract`.
WHOLE = ["gemma3", "internvl", "llava", "qwen2_vl", "qwen3_vl"]
FEW = ("downsample", "tome", "divprune", "fastv", "snapkv")  # one of each stage


def grid(family, *methods):
    """Marks of a case: whether it waits for `make contract`."""
    done = family in WHOLE or (methods and all(m in FEW for m in methods))
    return () if done else (pytest.mark.grid,)


EACH = [pytest.param(name, marks=grid(name)) for name in FAMILIES]

__all__ = [
    "EACH",
    "FAMILIES",
    "FEW",
    "WHOLE",
    "batch",
    "build",
    "generate",
    "grid",
    "prompt",
    "randomise",
]
