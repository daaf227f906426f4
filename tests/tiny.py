"""Tiny models with random weights, one per family, and prompts for them; they are part of the package's contract."""

from effivlm.contract.twin import generate
from effivlm.families.tiny import FAMILIES, batch, build, prompt, randomise

__all__ = ["FAMILIES", "batch", "build", "generate", "prompt", "randomise"]
