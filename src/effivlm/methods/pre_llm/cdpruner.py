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
    """Determinantal selection with kernel ``relevance_i cos(y_i, y_j) relevance_j``.

    Relevance is a mean of cosines, one per text token, as the official code's is one per segment of
    the question: that is the cosine with the mean of *unit* vectors, so that every token counts
    alike, whatever the length of its embedding. The length of that mean cancels in the scaling to
    [0, 1], so the unit of the mean gives the same.
    """

    name = "cdpruner"
    paper = Paper(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in"
        " MLLMs",
        "2506.10967",
        "Theia-4869/CDPruner @ 9541616",
        (
            (
                "relevance is the mean cosine of projected tokens with the LLM's input embeddings"
                " of the prompt's text, without the markers around images; the official code uses"
                " CLIP's text tower on the question, and negates the cosine, as its authors advise"
                " for CLIP"
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
    """[N] in [0, 1]: mean cosine of visual [N, D] with the tokens of text [T, D] (the mean of their
    unit vectors), scaled to span the range; ones if there is no text.
    """
    if len(text) == 0:
        return torch.ones(len(visual), device=visual.device)
    return min_max(rounded(unit(visual) @ unit(text).mean(0)))
