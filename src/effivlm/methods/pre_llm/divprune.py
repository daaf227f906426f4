"""DivPrune: keep the subset of tokens whose smallest pairwise distance is largest (greedy max-min diversity)."""

from dataclasses import dataclass
from typing import ClassVar

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.ops.select import max_min


@dataclass(frozen=True)
class DivPrune(PreLLM):
    """Cosine distance between LLM embeddings; the first pick is the token farthest from its nearest neighbour."""

    name: ClassVar[str] = "divprune"
    paper: ClassVar[Paper] = Paper(
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        "2503.02175",
        "https://github.com/vbdi/divprune @ 799e2d9",
        (
            "picked tokens are excluded from later picks (the official code can pick duplicates twice)",
            "every image is its own problem; newline tokens are left out of it",
            "the count is floored like everywhere here, not rounded half to even",
        ),
    )

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Greedy max-min over the embeddings."""
        return Selection(max_min(tokens.embeds, k))
