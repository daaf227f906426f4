"""Offline searches for methods that are fitted to a model: VTW's layer and FitPrune's deletions.

Both take plain tensors, so that whoever runs the model decides how to get them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.ops.select import others


# ---------------------------------------------------------------------------------------------- VTW
@dataclass(frozen=True)
class Withdrawal:
    """Result of `withdrawal_layer`.

    Attributes:
        layer: first layer that can do without visual tokens, or None if none can.
        divergence: layer -> mean divergence.
    """

    layer: int | None
    divergence: Mapping[int, float]


def withdrawal_divergence(full: Tensor, withdrawn: Tensor) -> float:
    """KL(withdrawn || full) of next-token distributions in nats; the withdrawn one is the
    reference, as in the official code.

    Args:
        full: [V] logits at the last prompt token.
        withdrawn: [V] logits of the prompt with visual tokens withdrawn.
    """
    p, q = withdrawn.double().log_softmax(-1), full.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def withdrawal_layer(
    samples: Iterable[tuple[Tensor, Mapping[int, Tensor]]], eta: float = 0.003
) -> Withdrawal:
    """VTW's search: the first layer whose mean divergence over samples is at most ``eta``.

    Args:
        samples: per prompt, the full model's logits [V] at the last prompt token, and those [V]
            with visual tokens withdrawn before each candidate layer. The official search uses 20
            prompts and layers from 5 on.
        eta: in nats; the paper's values are 0.003 (LLaVA-1.5-7B), 0.0005 (13B), 0.0001
            (LLaVA-1.6-7B).

    Raises:
        ValueError: without samples, or where samples cover different layers.
    """
    total: dict[int, float] = {}
    count = 0
    for full, branches in samples:
        if count and set(branches) != set(total):
            raise ValueError(
                f"sample {count} covers layers {sorted(branches)}, the ones before {sorted(total)}"
            )
        for layer, withdrawn in branches.items():
            total[layer] = total.get(layer, 0.0) + withdrawal_divergence(full, withdrawn)
        count += 1
    if not count:
        raise ValueError("the search for a withdrawal layer needs at least one sample")
    mean = {layer: value / count for layer, value in sorted(total.items())}
    return Withdrawal(next((layer for layer, value in mean.items() if value <= eta), None), mean)


# ----------------------------------------------------------------------------------------- FitPrune
@dataclass(frozen=True)
class Shape:
    """Widths of a decoder, for the cost of a visual token: model width D and feed-forward width m
    (three matrices).
    """

    width: int
    feed_forward: int

    def cost(self, n: int) -> float:
        """Multiply-adds of one layer for ``n`` tokens: 4 n D^2 + 2 n^2 D + 3 n D m."""
        return (
            4.0 * n * self.width**2
            + 2.0 * n**2 * self.width
            + 3.0 * n * self.width * self.feed_forward
        )


Statistics = tuple[
    Tensor, Tensor
]  # [N] attention received from text, and from visual rows, of one layer of one prompt


def fit_deletions(
    samples: Sequence[Sequence[Statistics]], reduction: float, shape: Shape
) -> tuple[int, ...]:
    """FitPrune's fitting: how many tokens each layer deletes so that both attention distributions
    stay close.

    For a tolerance alpha, a layer may delete the tokens that are, by both criteria, in the longest
    ascending prefix that leaves at least ``(1 - alpha)`` of the layer's full mass. The smallest
    alpha (to 0.01, by bisection) that saves ``reduction`` of the visual tokens' cost is taken for
    every prompt; counts are means over prompts, rounded down.

    Deviation: statistics are those of the unpruned model; the official search recomputes them on
    the pruned prompt.

    Args:
        samples: per prompt, per layer, the two statistics (`HeadMaxSums`) of the unpruned model; N
            may differ by prompt.
        reduction: share of the cost to save, in (0, 1).
        shape: the decoder's widths.

    Raises:
        ValueError: without samples, or for a reduction outside (0, 1).
    """
    if not samples:
        raise ValueError("fitting deletions needs at least one sample")
    if not 0 < reduction < 1:
        raise ValueError(f"reduction={reduction} must be a share between 0 and 1, such as 0.6")
    per_prompt = [_fit_one(layers, reduction, shape) for layers in samples]
    return tuple(sum(column) // len(column) for column in zip(*per_prompt, strict=True))


def tokens_left(deletions: Sequence[int], n: int, scale: int = 576) -> tuple[int, ...]:
    """Tokens left after each layer, per ``scale`` tokens: the ``left`` field of the FitPrune
    method.
    """
    out, now = [], n
    for d in deletions:
        now -= d
        out.append(max(1, math.floor(now * scale / n)))
    return tuple(out)


def _fit_one(layers: Sequence[Statistics], reduction: float, shape: Shape) -> list[int]:
    low, high = 0.0, 1.0
    best = _delete(layers, high, reduction, shape)[0]
    while high - low > 0.01:
        alpha = (low + high) / 2
        counts, reached = _delete(layers, alpha, reduction, shape)
        if reached:
            high, best = alpha, counts
        else:
            low = alpha
    return best


def _delete(
    layers: Sequence[Statistics], alpha: float, reduction: float, shape: Shape
) -> tuple[list[int], bool]:
    """Deletions per layer under a tolerance, and whether they save enough; deleting stops once they
    do.
    """
    n = len(layers[0][0])
    limit = (1 - reduction) * len(layers) * shape.cost(n)
    alive, spent, counts, reached = torch.arange(n), 0.0, [], False
    for done, statistics in enumerate(layers, start=1):
        gone = torch.empty(0, dtype=torch.long)
        if not reached:
            a, b = (_prefix(s[alive], float(s.sum()), alpha) for s in statistics)
            gone = a[torch.isin(a, b)]
        gone = gone[: max(0, len(alive) - 1)]
        counts.append(len(gone))
        alive = alive[others(gone, len(alive))]
        spent += shape.cost(len(alive))
        reached = reached or spent + (len(layers) - done) * shape.cost(len(alive)) <= limit
    return counts, reached


def _prefix(values: Tensor, mass: float, alpha: float) -> Tensor:
    """Indices of the lowest values [n] whose removal leaves at least ``(1 - alpha) * mass``,
    ascending by value.
    """
    order = torch.argsort(values.double(), stable=True)
    left = values.double().sum() - values.double()[order].cumsum(0)
    return order[: int((left >= (1 - alpha) * mass).sum())]
