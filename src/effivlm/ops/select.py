"""Choosing indices: ranking with ties by index, greedy diversity and coverage, lattices. Shapes: N
candidates, C features.
"""

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from effivlm.ops.numbers import norms
from effivlm.ops.precision import working

# greedy picks: values this close (times the largest magnitude in play) are equal, so that rounding
# decides nothing
TIE = 1e-6


def ranked(scores: Real[Tensor, "*n N"]) -> Int[Tensor, "*n N"]:
    """Indices by descending score, in float32 (float64 stays), ties by lower index; NaN
    ranks last.
    """
    return torch.argsort(
        working(scores).nan_to_num(nan=-torch.inf), dim=-1, descending=True, stable=True
    )


def places(scores: Real[Tensor, "*n N"]) -> Int[Tensor, "*n N"]:
    """The place of every score in the order of `ranked`, from 0."""
    order = ranked(scores)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def top_k(scores: Real[Tensor, "N"], k: int) -> Int[Tensor, "k"]:
    """Indices of the k highest scores, ascending."""
    return ranked(scores)[:k].sort().values


def top_k_mask(scores: Real[Tensor, "*n N"], k: int) -> Bool[Tensor, "*n N"]:
    """The k highest scores of every row."""
    out = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return out.scatter_(-1, ranked(scores)[..., :k], True)


def rounded(scores: Real[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Scores in steps of ``TIE`` times the largest magnitude: equal tokens tie although their
    sums round differently.
    """
    scores = working(scores).nan_to_num()
    step = TIE * scores.abs().max().clamp(min=1e-30)
    return (scores / step).round() * step


def significant(scores: Real[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Scores to about six digits each (steps of ``TIE`` of its own power of two): as `rounded`,
    but however large another score is. For scores without cancellation, whose error is relative.
    """
    mantissa, exponent = torch.frexp(working(scores).nan_to_num())
    return torch.ldexp((mantissa / TIE).round() * TIE, exponent)


def others(keep: Int[Tensor, "k"], n: int) -> Int[Tensor, "{n}-k"]:
    """Indices below n that are not in keep, ascending."""
    out = torch.ones(n, dtype=torch.bool, device=keep.device)
    out[keep] = False
    return out.nonzero()[:, 0]


def first_max(values: Float[Tensor, "N"], tolerance: float = TIE) -> Int[Tensor, "1"]:
    """The lowest index whose value lies within ``tolerance`` of the largest; stays on the
    device.
    """
    return (values >= values.max() - tolerance).int().argmax()[None]


def unit(x: Real[Tensor, "*n C"]) -> Float[Tensor, "*n C"]:
    """Rows of x scaled to length 1, in float32; zero rows stay zero, so that their cosines
    are 0; NaN counts as 0.
    """
    x = working(x).nan_to_num()
    return x / norms(x, keepdim=True).clamp(min=1e-12)


def min_max(x: Real[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Values x moved and scaled to [0, 1], in float32; a constant becomes all ones."""
    x = working(x).nan_to_num()
    span = x.max() - x.min()
    return (
        (x - x.min()) / span if span > 1e-6 * x.abs().max().clamp(min=1e-30) else torch.ones_like(x)
    )


def random_k(n: int, k: int, generator: torch.Generator) -> Int[Tensor, "{k}"]:
    """Distinct indices below n, ascending, uniform over subsets."""
    return torch.randperm(n, generator=generator)[:k].sort().values


def lattice(n: int, k: int) -> Int[Tensor, "k"]:
    """Indices spread evenly over n: ``floor((t + 1/2) * n / k)``."""
    return ((torch.arange(k, dtype=torch.float64) + 0.5) * n / k).floor().long()


def grid_shape(rows: int, columns: int, k: int) -> tuple[int, int]:
    """Grid (a, b), a <= rows, b <= columns, a * b <= k, that loses least: aspect first, then area.

    Both ways of rounding are tried: rows from the aspect and columns from what is left, and the
    other way round. The larger grid wins unless it is less than 5 % larger, then the one closer in
    aspect.
    """
    share = (k / (rows * columns)) ** 0.5
    a = min(rows, max(1, round(rows * share)), k)
    b = min(columns, max(1, round(columns * share)), k)
    options = [(a, max(1, min(columns, k // a))), (max(1, min(rows, k // b)), b)]

    def skew(grid: tuple[int, int]) -> float:
        ratio = grid[0] * columns / (grid[1] * rows)
        return max(ratio, 1 / ratio)

    first, second = sorted(options, key=skew)
    return second if second[0] * second[1] > 1.05 * first[0] * first[1] else first


def max_min(features: Float[Tensor, "N C"], k: int) -> Int[Tensor, "k"]:
    """Indices, ascending, of a greedy max-min-distance subset under cosine distance (DivPrune's
    MMDP heuristic).

    The first pick has the largest distance to its nearest neighbour; each further pick is the
    candidate farthest from everything picked. Keeps one running minimum: O(N k C), never N x N x C;
    the first pick streams over blocks of rows.
    """
    x = unit(features)
    n = len(x)
    nearest = x.new_zeros(n)
    for start in range(0, n if n > 1 else 0, 512):
        rows = 1 - x[start : start + 512] @ x.T
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        nearest[start : start + 512] = rows.amin(1)
    picked: list[Tensor] = []
    distance, value = torch.full_like(nearest, torch.inf), nearest
    for _ in range(k):
        pick = first_max(value)
        picked.append(pick)
        distance = torch.minimum(distance, 1 - x @ x[pick[0]]).index_fill(0, pick, -torch.inf)
        value = distance
    return torch.cat(picked).sort().values


def log_det(
    features: Float[Tensor, "N C"], quality: Real[Tensor, "N"], k: int
) -> Int[Tensor, "{k}"]:
    """Indices in pick order: greedy MAP of the determinantal process with kernel ``quality_i
    cos_ij quality_j``.

    Each pick has the largest residual variance given those picked (incremental Cholesky: O(N k)
    memory). Once no residual exceeds ``TIE`` (the kernel's rank is used up) the rest is filled by
    quality.

    Args:
        features: of the candidates.
        quality: not negative.
        k: picks.
    """
    x, r = unit(features), working(quality)
    residual = r * r
    factors = x.new_zeros(k, len(x))
    picked: list[Tensor] = []
    for t in range(k):
        if float(residual.max()) <= TIE:
            break
        pick = first_max(residual)
        row = r * r[pick] * (x @ x[pick[0]])
        row = row - factors[:t, pick[0]] @ factors[:t]
        factors[t] = row / residual[pick].sqrt()
        residual = (residual - factors[t] ** 2).index_fill(0, pick, -torch.inf)
        picked.append(pick)
    if len(picked) == k:
        return torch.cat(picked)
    left = r.index_fill(0, torch.cat(picked), -torch.inf) if picked else r
    return torch.cat([*picked, ranked(left)[: k - len(picked)]])


def coverage(
    features: Float[Tensor, "N C"], weight: Real[Tensor, "N"], k: int, batch: int = 64
) -> Int[Tensor, "{k}"]:
    """Indices in pick order: greedy facility location, ``gain_j = weight_j * sum_i max(0,
    cos_ij - covered_i)``.

    Gains only shrink, so a stale gain is an upper bound: only the ``batch`` most promising
    candidates are recomputed until the best fresh one beats every stale one. Once everything is
    covered up to rounding, weight fills the rest.

    Args:
        features: of the candidates.
        weight: not negative.
        k: picks.
        batch: candidates recomputed at a time.
    """
    x, w = unit(features), working(weight)
    similarity = x @ x.T
    covered = x.new_zeros(len(x))
    bound = w * similarity.clamp(min=0).sum(1)
    rounding = 1e-7 * len(x)  # of a gain, before its weight
    picked: list[Tensor] = []
    for _ in range(k):
        fresh = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        while True:
            pick = first_max(bound, TIE * float(bound.max()))
            if fresh[pick]:
                break
            stale = ranked(bound.masked_fill(fresh, -torch.inf))[:batch]
            stale = torch.cat([stale, pick])
            bound[stale] = torch.minimum(
                bound[stale], w[stale] * (similarity[stale] - covered).clamp(min=0).sum(1)
            )
            fresh[stale] = True
        if float(bound[pick]) <= rounding * float(w[pick]):
            break
        picked.append(pick)
        covered = torch.maximum(covered, similarity[pick[0]])
        bound[pick] = -torch.inf
    if len(picked) == k:
        return torch.cat(picked)
    left = w.index_fill(0, torch.cat(picked), -torch.inf) if picked else w
    return torch.cat([*picked, ranked(left)[: k - len(picked)]])
