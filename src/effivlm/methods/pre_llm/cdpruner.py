"""CDPruner: keep the subset that is diverse among what the instruction is about: greedy MAP of a
conditional DPP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import Signal, TextEmbeds
from effivlm.ops.select import log_det, min_max, rounded, unit


@dataclass(frozen=True)
class CDPruner(PreLLM):
    """Determinantal selection with kernel ``relevance_i cos(y_i, y_j) relevance_j``."""

    name = "cdpruner"
    paper = Paper(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in"
        " MLLMs",
        "2506.10967",
        "Theia-4869/CDPruner @ 9541616",
        (
            (
                "relevance is the mean cosine of projected tokens with the LLM's input embeddings"
                " of the prompt's text; the official code uses CLIP's text tower on the question,"
                " and negates the cosine, as its authors advise for CLIP"
            ),
            (
                "relevance is scaled per tile or image, not over everything in the batch; a"
                " constant one counts as uniform"
            ),
            (
                "when the kernel's rank is used up the rest is filled by relevance; the official"
                " code returns repeated tokens there"
            ),
            "residual variances within 1e-6 are ties, the lower index wins",
        ),
    )

    @property
    def signals(self) -> frozenset[Signal]:
        """Embeddings of the prompt's text."""
        return frozenset({TextEmbeds()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Greedy MAP of the determinantal process."""
        quality = relevance(tokens.embeds, tokens[TextEmbeds()])
        return Selection(log_det(tokens.embeds, quality, k).sort().values)


def relevance(visual: Tensor, text: Tensor) -> Tensor:
    """[N] in [0, 1]: mean cosine of visual [N, D] with text [T, D], scaled to span the range; ones
    if there is no text.
    """
    if len(text) == 0:
        return torch.ones(len(visual), device=visual.device)
    return min_max(rounded(unit(visual) @ unit(text).mean(0)))
