"""FastV: after a shallow decoder layer, keep the visual tokens that receive the most attention there."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from effivlm.budget import Budget
from effivlm.methods.base import Cut, IntraLLM, LayerTokens, Paper, Selection
from effivlm.methods.schedules import single_cut
from effivlm.methods.signals import ColumnSums, LastRow, Signal, TextRows
from effivlm.ops.select import top_k


@dataclass(frozen=True)
class FastV(IntraLLM):
    """Scores are head means of layer ``layer - 1``; the cut happens before ``layer``.

    Attributes:
        layer: first layer that runs on the short sequence (the paper's K).
        rows: ``last`` (every official code path), ``all`` (the paper's text, and EffiVLM-Bench's default) or ``text``
            (EffiVLM-Bench's description). With causal attention ``all`` favours early tokens.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[Paper] = Paper(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
        "2403.06764",
        "https://github.com/pkunlp-icler/FastV @ d165972",
        (
            "ranked once, in prefill; the official evaluation code masks instead and ranks again for every new token",
            "every image is ranked by itself",
        ),
    )
    layer: int = 2
    rows: Literal["last", "all", "text"] = "last"

    def __post_init__(self) -> None:
        """Validate."""
        if self.layer < 1:
            raise ValueError(f"fastv: layer={self.layer} must be at least 1: it ranks by the attention of the layer before")

    @property
    def signals(self) -> frozenset[Signal]:
        """The rows it averages."""
        return frozenset({{"last": LastRow(), "all": ColumnSums(), "text": TextRows()}[self.rows]})

    def schedule(self, layers: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
        """One cut before ``layer``."""
        return single_cut(self.name, self.layer, layers, n, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Highest mean attention."""
        (signal,) = self.signals
        rows = tokens[signal]
        scores = (rows.mean(1) if rows.ndim == 3 else rows).mean(0)
        return Selection(top_k(scores[tokens.visual], k))
