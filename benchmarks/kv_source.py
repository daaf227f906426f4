"""One layer's cache of random keys and values, its signals computed as the runtime does: shared by
the kv_* scripts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from effivlm.methods.base import KVCache, LayerCache
from effivlm.methods.signals import (
    ColumnSums,
    FutureQueries,
    LastRow,
    PostVisionRows,
    Signal,
    ThresholdCounts,
    ValueOutputNorms,
    WindowRows,
)
from effivlm.ops import statistics


class Layer:
    """Queries and keys of one layer, peaked enough for layers to differ; a third of the prompt is
    one image.
    """

    def __init__(
        self, length: int, heads: int, groups: int, width: int, number: int = 0, layers: int = 1
    ) -> None:
        g = torch.Generator().manual_seed(1000 * number + length)
        self.q = torch.randn(heads, length, width, generator=g) * (0.5 + 2 * number / layers)
        self.k = torch.randn(groups, length, width, generator=g)
        self.v = torch.randn(groups, length, width, generator=g)
        self.image = torch.full((length,), -1)
        self.image[length // 6 : length // 2] = 0
        self.number, self.layers, self.length = number, layers, length
        self.memo: dict[Signal, Tensor] = {}

    def rows(self, start: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Arguments of the row-restricted statistics, for the rows from ``start`` on."""
        at = torch.arange(max(0, start), self.length)
        return self.q[:, at], self.k, at, self.q.shape[-1] ** -0.5

    def compute(self, signal: Signal) -> Tensor:
        """A signal's tensor, computed anew."""
        after = max(self.length // 2, self.length - 256)  # a question of at most 256 tokens
        table: dict[type[Signal], Callable[[Signal], Tensor]] = {
            ColumnSums: lambda s: statistics.column_sums(self.q, self.k, self.q.shape[-1] ** -0.5),
            WindowRows: lambda s: statistics.row_sums(
                *self.rows(self.length - getattr(s, "size", 1))
            ),
            LastRow: lambda s: statistics.row_probabilities(*self.rows(self.length - 1))[:, 0],
            PostVisionRows: lambda s: statistics.row_sums(*self.rows(after)),
            ThresholdCounts: lambda s: statistics.threshold_share(
                *self.rows(after), getattr(s, "p", 0.01)
            ),
            ValueOutputNorms: lambda s: self.v.abs().sum(-1),
            FutureQueries: lambda s: _moments(self.q, getattr(s, "sinks", 4)),
        }
        return table[type(signal)](signal)

    def read(self, signal: Signal) -> Tensor:
        """A signal's tensor, computed once."""
        if signal not in self.memo:
            self.memo[signal] = self.compute(signal)
        return self.memo[signal]

    def cache(self, method: KVCache, fresh: bool = False) -> LayerCache:
        """What a method is given; ``fresh`` computes its signals anew."""
        source = self.compute if fresh else self.read
        return LayerCache(
            source,
            method.signals,
            self.number,
            {},
            self.k,
            self.v,
            self.image,
            torch.arange(self.length),
            self.number,
            self.layers,
        )


def _moments(q: Tensor, sinks: int) -> Tensor:
    """[H, d, d + 1] covariance and mean of queries; positions play no part in what these scripts
    measure.
    """
    x = q[:, min(sinks, q.shape[1] - 1) :]
    centred = x - x.mean(1, keepdim=True)
    return torch.cat([centred.transpose(1, 2) @ centred / x.shape[1], x.mean(1)[..., None]], -1)
