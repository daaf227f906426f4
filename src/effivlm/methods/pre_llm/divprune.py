"""DivPrune: keep the subset whose members are farthest apart. Greedy max-min diversity of the
projected tokens; no attention.
"""

from dataclasses import dataclass

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.ops.select import max_min


@dataclass(frozen=True)
class DivPrune(PreLLM):
    """Greedy max-min selection under cosine distance; a running minimum makes it O(N k D)."""

    name = "divprune"
    paper = Paper(
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        "2503.02175",
        "vbdi/divprune @ 799e2d9",
        (
            (
                "picked tokens are excluded; the official code can return the same token again"
                " among near-duplicates"
            ),
            (
                "cosines in float32 with zero vectors at cosine 0; distances within 1e-6 are ties,"
                " the lower index wins"
            ),
            (
                "per tile or image; the official LLaVA code prunes image 0 only and lets newline"
                " tokens compete"
            ),
            "floor(keep * N) tokens; the official code rounds half to even",
        ),
    )

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep the max-min subset."""
        return Selection(max_min(tokens.embeds, k))
