"""ExpectedAttention: the attention that coming queries, taken as Gaussian, would pay each key."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import ScoredKV, joined
from effivlm.methods.signals import FutureQueries, Signal
from effivlm.ops.numbers import norms
from effivlm.ops.precision import working
from effivlm.ops.statistics import fold


def expected_scores(future: Tensor, keys: Tensor, sinks: int, how: str = "mean") -> Tensor:
    """[KV, M] expected attention; the first ``sinks`` keys take no part and get 0.

    Args:
        future: [H, d, d + 1] covariance and, last column, mean of coming queries.
        keys: [KV, M, d] post-RoPE.
        sinks: first keys, left out of the softmax.
        how: how query heads of one KV head are joined, see `fold`.
    """
    heads, (groups, length, width) = future.shape[0], keys.shape
    x = working(keys)[:, sinks:].repeat_interleave(heads // groups, 0)  # [H, M - sinks, d]
    mean, cov = future[..., -1:], future[..., :-1]
    logits = (x @ mean)[..., 0] * width**-0.5 + ((x @ cov) * x).sum(-1) / (2 * width)
    out = x.new_zeros(groups, length)
    out[:, sinks:] = fold(logits.softmax(-1), groups, how)
    return out


@dataclass(frozen=True)
class ExpectedAttention(ScoredKV):
    """Mean and covariance of the prompt's queries, moved to the coming positions, give each key's
    expected weight.

    Attributes:
        sinks: first entries, always kept and left out of the statistics. future: positions looked
            ahead.
        epsilon: added to the expected attention. value_norms: weigh by the norm of each value.
        fold: how query heads of one KV head are joined, ``mean`` or ``max``.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[Paper] = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries"
        " Distribution",
        "2510.00636",
        "https://github.com/NVIDIA/kvpress @ 8bb29b9",
        (
            "logits are scaled by 1 / sqrt(d), also for models that scale otherwise",
            "queries are read as they pass, not recomputed",
        ),
    )
    amounts: ClassVar[bool] = True
    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    value_norms: bool = True
    fold: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Validate."""
        if self.sinks < 0 or self.future < 1:
            raise ValueError(
                f"expected_attention: sinks={self.sinks} must be >= 0 and future={self.future} >= 1"
            )
        if self.epsilon and not self.value_norms:
            raise ValueError(
                f"expected_attention: epsilon={self.epsilon} has no effect with value_norms=false:"
                " leave one of them out"
            )

    @property
    def weighs_values(self) -> bool:
        """By their norms, if asked."""
        return self.value_norms

    @property
    def signals(self) -> frozenset[Signal]:
        """Queries to come."""
        return frozenset({FutureQueries(self.sinks, self.future)})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Expected attention, times value norms."""
        sinks = min(self.sinks, cache.length - 1)
        scores = expected_scores(
            cache[FutureQueries(self.sinks, self.future)], cache.keys, sinks, self.fold
        )
        if self.value_norms:
            scores = (scores + self.epsilon) * norms(working(cache.values))
        scores = joined(scores, self.shared)
        return torch.cat([torch.full_like(scores[:, :sinks], torch.inf), scores[:, sinks:]], 1)
