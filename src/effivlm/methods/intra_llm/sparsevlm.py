"""SparseVLM: text tokens that match the image rate the visual tokens; the best of those dropped
return as cluster means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import IntraLLM, LayerTokens, Merge, Paper, Room, Selection
from effivlm.methods.schedules import (
    falling,
    geometric,
    preset_or_budget,
    published,
    resample,
    scaled_layers,
    stages,
)
from effivlm.methods.signals import FreedTextSums, InputEmbeds, Signal, TextRank, TextSums
from effivlm.ops.numbers import parts
from effivlm.ops.precision import working
from effivlm.ops.recycle import cluster_means
from effivlm.ops.select import others, ranked, top_k

AT = (3, 7, 16)
COUNTS = {  # kept and clusters together
    "recycle": {
        "192": (309, 204, 113),
        "128": (312, 117, 39),
        "96": (249, 55, 27),
        "64": (82, 32, 18),
    },
    "plus": {
        "192": (300, 200, 118),
        "128": (238, 108, 60),
        "96": (246, 54, 28),
        "64": (66, 34, 20),
    },
}


@dataclass(frozen=True)
class SparseVLM(IntraLLM):
    """Three stages; raters are chosen once, from the input embeddings.

    Attributes:
        variant: ``recycle`` (version 1.5) or ``plus`` (version 2): attention divided by its rotary
            gravity, only the ``heads`` heads that look at the image most, no recycling.
        layers: cuts happen before these; empty: 3-7-16 (the paper's "after 2, 6, 15"), moved in
            proportion for models with 16 layers or fewer.
        preset: a published list (192, 128, 96, 64) instead of a budget; its true mean share is
            higher than its name says, see `effivlm show sparsevlm`.
        heads: see ``plus``. rope_theta: base of the model's rotary frequencies, read by ``plus``
            only.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[Paper] = Paper(
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
        "2410.04417",
        "https://github.com/Gumpest/SparseVLMs @ b9619e6 (v1.5), 26a5f48 (v2)",
        (
            (
                "clusters stand at their centres, in order; the official code appends them after"
                " the kept tokens"
            ),
            "positions are kept; version 1.5 numbers the survivors anew",
            "the count asked for includes the clusters, of which there are at most k / 4",
            "equal densities are ordered by index instead of by noise",
            (
                "with no text token above the mean (a single one), all text rates; with no text,"
                " the last token"
            ),
            (
                "plus: gravity is clamped above zero, and distances are logical positions, also for"
                " multi-axis rotary models"
            ),
            "budgets scale the shape of the 192 list",
        ),
    )
    budget: ClassVar[str] = "optional"
    presets: ClassVar[tuple[str, ...]] = (
        *(f"preset={p}" for p in COUNTS["recycle"]),
        *(f"variant=plus,preset={p}" for p in COUNTS["plus"]),
    )
    variant: Literal["recycle", "plus"] = "recycle"
    layers: tuple[int, ...] = ()
    preset: str = ""
    heads: int = 14
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        """Validate."""
        if self.variant not in COUNTS:
            raise ValueError(
                f"sparsevlm: variant={self.variant!r}: expected one of {', '.join(COUNTS)}"
            )
        if self.preset and self.preset not in COUNTS[self.variant]:
            raise ValueError(
                f"sparsevlm: preset={self.preset!r}: expected one of"
                f" {', '.join(COUNTS[self.variant])}"
            )
        if self.variant != "plus" and (self.heads, self.rope_theta) != (14, 10000.0):
            raise ValueError(
                f"sparsevlm: heads={self.heads} and rope_theta={self.rope_theta:g} are read by"
                " variant=plus only: add it, or leave them out"
            )
        if self.heads < 1 or self.rope_theta <= 0 or any(k < 1 for k in self.layers):
            raise ValueError(
                f"sparsevlm: heads={self.heads}, layers={self.layers},"
                f" rope_theta={self.rope_theta}: expected positive"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Embeddings for the raters, and what those look at."""
        plus = self.variant == "plus"
        return frozenset({InputEmbeds(), FreedTextSums() if plus else TextSums()})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Three stages, or the published counts."""
        at, table = scaled_layers(AT, room.layers, self.layers), COUNTS[self.variant]
        if preset_or_budget(self.name, self.preset, tuple(table), budget):
            return published(self.name, at, resample(table[self.preset], len(at)), room)
        ratios = [k / 576 for k in resample(table["192"], len(at))]
        return stages(self.name, at, ratios, room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Keep by score; version 1.5 clusters the best of what is dropped."""
        if self.variant == "plus":
            return Selection(top_k(self._plus(tokens), k))
        return recycle(tokens, self._scores(tokens), kept_of(len(tokens.visual), k), k)

    def _raters(self, tokens: LayerTokens) -> tuple[int, ...]:
        """[R] indices into ``tokens.text``, chosen at the first stage."""
        memory = tokens.notes.setdefault("raters", {})
        if tokens.image not in memory:
            x = tokens[InputEmbeds()]
            memory[tokens.image] = raters(x[tokens.visual], x[tokens.text])
        return tuple(memory[tokens.image].tolist())

    def _scores(self, tokens: LayerTokens) -> Tensor:
        """[N] attention from the raters, mean over heads."""
        return tokens[TextSums(self._raters(tokens))].mean(0)[tokens.visual]

    def _plus(self, tokens: LayerTokens) -> Tensor:
        """[N] scores of version 2."""
        signal = FreedTextSums(self._raters(tokens), self.rope_theta)
        freed = tokens[signal][:, tokens.visual]
        return freed[ranked(freed.sum(1))[: self.heads]].mean(0)


@dataclass(frozen=True)
class SparseVLMRank(SparseVLM):
    """The first release: the rank of the raters' attention sets the count of every stage, a budget
    only caps it.

    Attributes:
        layers: cuts happen before these; empty: 3-7-16-20, moved in proportion for models with 20
            layers or fewer.
        scale: tokens kept per unit of rank. bias: added to them.
    """

    name: ClassVar[str] = "sparsevlm_rank"
    exact: ClassVar[bool] = False
    presets: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Paper] = Paper(
        SparseVLM.paper.title,
        SparseVLM.paper.arxiv,
        "https://github.com/Gumpest/SparseVLMs @ 91fb6d9 (first release)",
        (
            (
                "keeps scale * rank + bias tokens as that code does; the paper deletes a multiple"
                " of (tokens - rank)"
            ),
            "clusters are capped by the budget; the official code adds them to what the rank keeps",
            *SparseVLM.paper.deviations[:2],
        ),
    )
    scale: float = 13.5
    bias: float = 0.0

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.variant != "recycle" or self.preset:
            raise ValueError("sparsevlm_rank: it has no variants and no published lists")
        if self.scale <= 0:
            raise ValueError(f"sparsevlm_rank: scale={self.scale} must be positive")

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of version 1.5, and the rank of what the raters look at."""
        return super().signals | {TextRank()}

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Four stages that follow the budget, or without one only drop at least a token each."""
        at = scaled_layers((*AT, 20), room.layers, self.layers)
        if budget is not None:
            return geometric(self.name, at, room, budget)
        return falling(at, [max(min(room.n, 1), room.n - 1 - i) for i in range(len(at))], room)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """As version 1.5, with the count of the rank where that is less."""
        rank, scores = int(tokens[TextRank(self._raters(tokens))]), self._scores(tokens)
        kept = max(1, min(int(self.scale * rank + self.bias), len(tokens.visual) - 1))
        clusters = (int(0.3 * (len(tokens.visual) - kept)) + 1) // 10 + 1
        if kept + clusters >= k:
            return recycle(tokens, scores, kept_of(len(tokens.visual), k), k)
        return recycle(tokens, scores, kept, kept + clusters)


def recycle(tokens: LayerTokens, scores: Tensor, kept: int, k: int) -> Selection:
    """Keep the ``kept`` best by score [N]; of the others, the best 30 % become ``k - kept`` cluster
    means.
    """
    best = top_k(scores, kept)
    if kept == k:
        return Selection(best)
    rest = others(best, len(scores))
    members = rest[ranked(scores[rest])[: int(0.3 * len(rest)) + 1]]
    centres, merge = cluster_means(tokens.hidden[tokens.visual], members, k - kept)
    return Selection(torch.cat([best, centres]).sort().values, Merge(*merge))


def raters(visual: Tensor, text: Tensor, block: int = 256) -> Tensor:
    """[R] indices into text [T, D] whose mean match (softmax over text of dot products) exceeds the
    mean; all if none does.

    Args:
        visual: [N, D] input embeddings.
        text: [T, D] input embeddings.
        block: visual tokens matched at a time.
    """
    said = working(text).T
    match = said.new_zeros(len(text))
    for part in parts(visual, block):
        match += (working(part) @ said).softmax(1).sum(0)
    match /= len(visual)
    chosen = (match > match.mean()).nonzero()[:, 0]
    return chosen if len(chosen) else torch.arange(len(text), device=text.device)


def kept_of(n: int, k: int) -> int:
    """Tokens kept as they are, of ``k`` that leave a stage entered by ``n``; the others are
    clusters of what is dropped.

    Dropping q tokens, the official code recycles m = int(0.3 q) + 1 of them into int(m / 10) + 1
    clusters; here at most k / 4. The largest number that fits is returned.
    """
    most = k // 4
    for kept in range(k - 1, k - most - 1, -1):
        if kept + (int(0.3 * (n - kept)) + 1) // 10 + 1 <= k:
            return kept
    return k - most
