"""StreamingLLM: keep the first few entries (attention sinks) and the most recent ones; looks at
nothing.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVCache, LayerCache, Paper


@dataclass(frozen=True)
class StreamingLLM(KVCache):
    """Sinks and recent entries.

    Attributes:
        sinks: entries kept at the start.
        variant: ``paper``; ``effivlm`` keeps the first 90 % of the budget and the last 10 %, as
            EffiVLM-Bench's code does.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[Paper] = Paper(
        "Efficient Streaming Language Models with Attention Sinks",
        "2309.17453",
        "https://github.com/mit-han-lab/streaming-llm",
        (
            (
                "keys keep their original positions; the official code rotates them to their slot"
                " at every step"
            ),
            "once, after prefill",
        ),
    )
    sinks: int = 4
    variant: Literal["paper", "effivlm"] = "paper"

    def __post_init__(self) -> None:
        """Validate."""
        if self.sinks < 0:
            raise ValueError(f"streaming_llm: sinks={self.sinks} must be at least 0")
        if self.variant == "effivlm" and self.sinks != StreamingLLM.sinks:
            raise ValueError(
                f"streaming_llm: sinks={self.sinks} has no effect with variant=effivlm, whose sinks"
                " are 90 % of the budget: leave one of them out"
            )

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Nothing to score."""
        return torch.zeros(cache.keys.shape[:2], device=cache.keys.device)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """First and last."""
        last = (
            max(1, int(0.1 * k + 1e-9)) if self.variant == "effivlm" else k - min(self.sinks, k - 1)
        )
        keep = torch.zeros(cache.length, dtype=torch.bool, device=scores.device)
        keep[: k - last] = True
        keep[cache.length - last :] = True
        return Entries(keep.expand(len(scores), -1))
