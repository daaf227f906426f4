"""Clustering of tokens by density peaks, and nearest neighbours. Shapes: M tokens, C features, c
clusters.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from effivlm.ops.numbers import parts
from effivlm.ops.precision import working, working_dtype
from effivlm.ops.select import others, ranked, unit


class Clusters(NamedTuple):
    """Result of `dpc_knn`.

    Attributes:
        centres: token indices by descending ``density * delta``, ties by lower index.
        assign: cluster number (index into ``centres``) of every token.
        density: 0 where it underflows; nothing is ordered by it.
        delta: distance to the nearest denser token (the largest distance for the densest).
    """

    centres: Int[Tensor, "c"]
    assign: Int[Tensor, "M"]
    density: Float[Tensor, "M"]
    delta: Float[Tensor, "M"]


def dpc_knn(x: Float[Tensor, "M C"], count: int, k: int = 5) -> Clusters:
    """Density-peak clustering with k nearest neighbours; distances are Euclidean over ``sqrt(C)``,
    float32, O(M^2) memory.

    The neighbours of a token include itself. Where official codes add random noise to break ties of
    density, equal densities here are ordered by index (a token is never its own or a later equal's
    denser neighbour). Where theirs compare ``exp(-d^2)``, which is 0 once neighbours lie 10 apart,
    here exponents are compared: the same order wherever theirs has one.

    Args:
        x: rows.
        count: clusters wanted, clamped to M.
        k: neighbours, clamped to M.
    """
    x = working(x).nan_to_num()
    m = len(x)
    count = min(count, m)
    distance = distances(x) / x.shape[1] ** 0.5
    near = distance.topk(min(max(k, 1), m), largest=False).values
    exponent = -(near.double() ** 2).mean(1).to(near.dtype)
    order = ranked(exponent)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(m, device=x.device)
    denser = rank[None, :] < rank[:, None]
    delta = distance.masked_fill(~denser, torch.inf).amin(1)
    delta[order[0]] = distance.max()
    centres = ranked(exponent.double() + delta.double().log())[:count]
    assign = distance[:, centres].argmin(1)
    assign[centres] = torch.arange(count, device=x.device)
    return Clusters(centres, assign, exponent.exp(), delta)


def distances(x: Float[Tensor, "M C"]) -> Float[Tensor, "M M"]:
    """Euclidean distances of rows x; by one float64 product, so that copies
    are at distance 0.
    """
    wide = x.double()
    square = (wide * wide).sum(1)
    total = square[:, None] + square
    apart = torch.addmm(total, wide, wide.T, alpha=-2.0)
    apart = torch.minimum(apart, apart.T)  # both ways alike to the last bit: pairs may tie
    return apart.masked_fill_(apart <= 1e-12 * total, 0.0).sqrt_().to(working_dtype(x))


def nearest_kept(
    x: Float[Tensor, "M C"], keep: Int[Tensor, "k"], block: int = 1024
) -> tuple[Int[Tensor, "M-k"], Int[Tensor, "M-k"]]:
    """Every token not kept, with the kept token most similar to it by cosine (ties: the first
    kept).

    Args:
        x: rows.
        keep: ascending.
        block: rows compared at a time.

    Returns:
        (dropped, ascending; heir, an element of ``keep`` for each).
    """
    dropped = others(keep, len(x))
    rows = unit(x)
    kept = rows[keep].T
    heirs = [(rows[part] @ kept).argmax(1) for part in parts(dropped, block)]
    return dropped, keep[torch.cat(heirs)] if heirs else dropped
