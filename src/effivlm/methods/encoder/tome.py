"""ToMe: in every encoder block, merge the most similar pairs of a bipartite split, by their keys."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import BlockTokens, Cut, EncoderReducer, Merge, Paper, Selection
from effivlm.ops.select import ranked, unit


def bipartite(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r merges of one step: even-indexed sources and the odd-indexed targets they go to.

    Args:
        metric: [N, d], compared by cosine. r: at most floor(N / 2) merges.

    Returns:
        sources [r], targets [r], indices into N; each source is merged once, targets may repeat.
    """
    x = unit(metric)
    similarity = x[::2] @ x[1::2].T
    best, partner = similarity.max(1)
    chosen = ranked(best)[:r]
    return 2 * chosen, 2 * partner[chosen] + 1


@dataclass(frozen=True)
class ToMe(EncoderReducer):
    """Token merging with sizes and proportional attention.

    The budget is met by merging about the same number of tokens before every block from ``start`` on.

    Attributes:
        start: first block before which tokens are merged. prop_attn: add log(size) to attention logits.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[Paper] = Paper(
        "Token Merging: Your ViT But Faster",
        "2210.09461",
        "https://github.com/facebookresearch/ToMe @ af95e4b",
        (
            "merges between blocks; the original merges between attention and MLP of the same block",
            "whole merge groups (2x2 patches where the projector takes those) are merged as one",
            "the number of merges follows the budget instead of a constant r; raster order is kept",
        ),
    )
    start: int = 1
    prop_attn: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        if self.start < 1:
            raise ValueError(f"tome: start={self.start} must be at least 1: it reads the keys of the block before")

    @property
    def proportional_attention(self) -> bool:
        """As the original for models that were not trained with merging."""
        return self.prop_attn

    def encoder_schedule(self, blocks: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
        """Equal steps down to the budget, at most halving at each (a bipartite step cannot merge more)."""
        assert budget is not None
        target, steps = budget.count(n), blocks - self.start
        cuts, now = [], n
        for i in range(steps):
            want = n - math.ceil((n - target) * (i + 1) / steps) if i + 1 < steps else target
            now = max(want, now - now // 2, target)
            cuts.append(Cut(self.start + i, now))
        if now > target:
            cuts = self._halving(blocks, n, target)
        return tuple(cuts)

    def _halving(self, blocks: int, n: int, target: int) -> list[Cut]:
        """As fast as a bipartite step allows."""
        cuts, now = [], n
        for block in range(self.start, blocks):
            now = max(target, now - now // 2)
            cuts.append(Cut(block, now))
        return cuts

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """Merge ``G - k`` sources into their targets, weighted by size; repeats the step where one cannot merge enough."""
        n = len(tokens.states)
        owner, metric, alive = torch.arange(n, device=tokens.keys.device), tokens.keys, torch.arange(n, device=tokens.keys.device)
        while len(alive) > k:
            sources, targets = bipartite(metric[alive], min(len(alive) - k, len(alive) // 2))
            owner[alive[sources]] = alive[targets]
            owner = owner[owner]
            gone = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
            gone[sources] = False
            alive = alive[gone]
        total = torch.zeros(n, device=owner.device).index_add_(0, owner, tokens.sizes)
        return Selection(alive, Merge(owner, torch.arange(n, device=owner.device), tokens.sizes / total[owner]))
