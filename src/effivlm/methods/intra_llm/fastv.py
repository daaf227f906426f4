"""FastV: after a shallow decoder layer, keep the visual tokens that receive the most attention
there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import ImageTokens, IntraLLM, LayerTokens, Paper, PreLLM, Room, Selection
from effivlm.methods.schedules import single_cut
from effivlm.methods.signals import ColumnSums, LastRow, Saliency, Signal, TextSums
from effivlm.ops.numbers import floats, whole
from effivlm.ops.precision import working
from effivlm.ops.select import top_k

_SIGNALS: dict[str, Signal] = {"last": LastRow(), "all": ColumnSums(), "text": TextSums()}


@dataclass(frozen=True)
class FastV(IntraLLM):
    """Scores are head means of layer ``layer - 1``; the cut happens before ``layer``.

    Attributes:
        layer: first layer that runs on the short sequence (the paper's K).
        rows: ``last`` (every official code path), ``all`` (the paper's text, and EffiVLM-Bench's
            default) or ``text`` (EffiVLM-Bench's description). With causal attention ``all``
            favours early tokens.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[Paper] = Paper(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large"
        " Vision-Language Models",
        "2403.06764",
        "https://github.com/pkunlp-icler/FastV @ d165972",
        (
            (
                "ranked once, in prefill; the official evaluation code masks instead and ranks"
                " again for every new token"
            ),
            "every image is ranked by itself",
            (
                "the count is floor(share * n), at least 1; official codes round half to even and"
                " may keep none"
            ),
        ),
    )
    layer: int = 2
    rows: Literal["last", "all", "text"] = "last"

    def __post_init__(self) -> None:
        """Validate."""
        if self.layer < 1:
            raise ValueError(
                f"{self.name}: layer={self.layer} must be at least 1: it reads the attention of the"
                " layer before"
            )
        if self.rows not in _SIGNALS:
            raise ValueError(
                f"{self.name}: rows={self.rows!r}: expected one of {', '.join(_SIGNALS)}"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """The rows it averages."""
        return frozenset({_SIGNALS[self.rows]})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """One cut before ``layer``."""
        return single_cut(self.name, self.layer, room, budget)

    def scores(self, tokens: LayerTokens) -> Tensor:
        """[N] attention summed over the chosen rows, mean over heads."""
        return tokens[_SIGNALS[self.rows]].mean(0)[tokens.visual]

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Highest mean attention."""
        return Selection(top_k(self.scores(tokens), k))


@dataclass(frozen=True)
class FastVSink(FastV, PreLLM):
    """FastV without, or with, the vision encoder's attention sinks: the ablations A1 and A2 of
    EffiVLM-Bench 5.3.

    Attributes:
        sinks: ``drop`` (A1: FastV among the tokens that are no sinks) or ``keep`` (A2: sinks first,
            FastV fills up).
        share: sinks, as a share of an image's tokens.
    """

    name: ClassVar[str] = "fastv_sink"
    paper: ClassVar[Paper] = Paper(
        "EffiVLM-Bench: A Comprehensive Benchmark for Evaluating Training-Free Acceleration in"
        " Large Vision-Language Models",
        "2506.00479",
        "EffiVLM-Bench @ ab3ee18 (the ablations are not released)",
        (
            (
                "section 5.3 does not say how sinks are found: here, by the highest attention in"
                " the encoder's feature block"
            ),
            "where A1 leaves fewer than k tokens, sinks fill up by FastV's score",
            "tokens that are no patches (row ends) are never sinks",
        ),
    )
    observes: ClassVar[bool] = True
    rows: Literal["last", "all", "text"] = "all"
    sinks: Literal["drop", "keep"] = "drop"
    share: float = 0.1

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.sinks not in ("drop", "keep"):
            raise ValueError(f"fastv_sink: sinks={self.sinks!r}: expected drop or keep")
        if not 0 < self.share < 1:
            raise ValueError(f"fastv_sink: share={self.share} must lie between 0 and 1")

    @property
    def signals(self) -> frozenset[Signal]:
        """FastV's rows and the encoder's saliency."""
        return super().signals | {Saliency()}

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Everything enters the LLM; there FastV's cut."""
        return room.lengths if room.stage is PreLLM else super().counts(room, budget)

    def observe_image(self, tokens: ImageTokens) -> None:
        """Remember every patch's saliency by its position in the prompt."""
        saliency = floats(working(tokens[Saliency()]))
        pairs = zip(whole(tokens.position), saliency, strict=True)
        tokens.notes.setdefault("saliency", {}).update(pairs)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Rank by attention, sinks before or after everything else."""
        known = tokens.notes.get("saliency", {})
        place = whole(tokens.position[tokens.visual])
        saliency = torch.tensor([known.get(p, -1.0) for p in place], device=tokens.visual.device)
        count = math.ceil(self.share * len(place) - 1e-9)
        return Selection(with_sinks(self.scores(tokens), saliency, k, count, self.sinks == "keep"))


def with_sinks(scores: Tensor, saliency: Tensor, k: int, count: int, keep: bool) -> Tensor:
    """[k] indices, ascending: the ``count`` most salient tokens first (by saliency) or last, the
    others by score [N].
    """
    sink = torch.zeros_like(scores, dtype=torch.bool)
    sink[top_k(saliency, count)] = True
    if keep:
        first = torch.where(sink, saliency, -torch.inf)
        chosen = top_k(first, min(k, count))
        rest = scores.masked_fill(sink, -torch.inf)
        return torch.cat([chosen, top_k(rest, max(0, k - count))]).sort().values
    ranking = torch.argsort(
        working(scores).nan_to_num(nan=-torch.inf), descending=True, stable=True
    )
    ranking = torch.cat([ranking[~sink[ranking]], ranking[sink[ranking]]])
    return ranking[:k].sort().values
