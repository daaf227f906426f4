"""Which weights of a matrix go, and what the others become: magnitude, Wanda, SparseGPT and
EcoFLAP's shares.

Shapes: a weight is [O, I] (outputs, inputs); masks are bool, True where a weight is pruned. Ratios
are shares that are pruned, as in the papers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.ops.grid import Grid, encode, fit
from effivlm.ops.numbers import cholesky
from effivlm.ops.precision import working


def n_of_m_mask(score: Tensor, n: int, m: int) -> Tensor:
    """The ``n`` lowest scores of every run of ``m`` inputs of a row; ``m`` divides I."""
    rows, columns = score.shape
    runs = score.reshape(rows, columns // m, m)
    lowest = runs.argsort(dim=-1, stable=True)[..., :n]
    return torch.zeros_like(runs, dtype=torch.bool).scatter(-1, lowest, True).reshape(rows, columns)


def magnitude_mask(
    weight: Tensor,
    sparsity_ratio: float,
    prune_n: int = 0,
    prune_m: int = 0,
    official: bool = False,
) -> Tensor:
    """The smallest weights of the whole matrix, ``int(ratio * O * I)`` of them, or n of every m.

    Args:
        weight: [O, I].
        sparsity_ratio: share pruned; not read with ``prune_n``.
        prune_n: prune this many of every ``prune_m`` inputs; 0: anywhere.
        prune_m: see ``prune_n``.
        official: the threshold itself goes too (Wanda's repository: one weight more).
    """
    score = working(weight).abs()
    if prune_n:
        return n_of_m_mask(score, prune_n, prune_m)
    flat = score.flatten()
    order = flat.argsort(stable=True)
    count = int(flat.numel() * sparsity_ratio)
    if official:
        return score <= flat[order[count]]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, order[:count], True).view_as(score)


def scaler_row(x: Tensor) -> Tensor:
    """[I] Wanda's statistic of inputs x [S, T, I]: over S samples, the mean of the sum over T
    tokens of squares.
    """
    return working(x).pow(2).sum(1).mean(0)


def wanda_mask(
    weight: Tensor,
    scaler_row: Tensor,
    sparsity_ratio: float,
    prune_n: int = 0,
    prune_m: int = 0,
    use_variant: bool = False,
) -> Tensor:
    """Wanda: the lowest |W| * sqrt(scaler_row) of every row, ``int(I * ratio)`` of them.

    Args:
        weight: [O, I].
        scaler_row: [I] see `scaler_row`.
        sparsity_ratio: share pruned; not read with ``prune_n``.
        prune_n: prune this many of every ``prune_m`` inputs; 0: anywhere in the row.
        prune_m: see ``prune_n``.
        use_variant: rows lose the same share of their summed score, not of their weights; the share
            pruned of the matrix is then ``sparsity_ratio`` within what the bisection reaches.
    """
    score = working(weight).abs() * scaler_row.sqrt()
    if prune_n:
        return n_of_m_mask(score, prune_n, prune_m)
    if use_variant:
        return _equal_mass(score, sparsity_ratio)
    lowest = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity_ratio)]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, lowest, True)


def _equal_mass(score: Tensor, ratio: float) -> Tensor:
    """Prune the same share alpha of every row's mass; alpha by bisection in [0, 0.8]."""
    ascending = score.sort(dim=1, stable=True).values
    mass, total = ascending.cumsum(1), score.sum(1, keepdim=True)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        last = (mass <= total * alpha).sum(1, keepdim=True) - 1
        mask = score <= ascending.gather(1, last % score.shape[1])
        share = float(mask.float().mean())
        if abs(share - ratio) <= 0.001 or high - low < 0.001:
            return mask
        low, high = (low, alpha) if share > ratio else (alpha, high)
        alpha = (low + high) / 2


def hessian(x: Tensor) -> Tensor:
    """[I, I] ``2 / S * sum of X^T X`` over samples of x [S, T, I] (SparseGPT, GPTQ)."""
    flat = working(x).flatten(0, 1)
    return flat.T @ flat * (2 / len(x))


@dataclass(frozen=True)
class Factor:
    """What a sweep over columns compensates with.

    Attributes:
        upper: [I, I] upper triangular U with ``U^T U`` the inverse of the damped Hessian.
        dead: [I] bool, inputs that are always 0.
    """

    upper: Tensor
    dead: Tensor


def inverse_factor(hessian: Tensor, percdamp: float = 0.01) -> Factor:
    """The factor of a Hessian [I, I] with ``percdamp`` of its mean diagonal added to the diagonal.

    Raises:
        ArithmeticError: if it is not positive definite, damped.
    """
    h = working(hessian).clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h.diagonal().add_(percdamp * h.diagonal().mean())
    inverse = torch.cholesky_inverse(cholesky(h))
    return Factor(cholesky(inverse, upper=True), dead)


@dataclass(frozen=True)
class Swept:
    """A weight [O, I] after SparseGPT, what was pruned of it [O, I], and the loss of every row [O].

    Attributes:
        weight: float32, or float64 if it was given so. pruned: bool. loss: see above.
    """

    weight: Tensor
    pruned: Tensor
    loss: Tensor


def sparsegpt(
    weight: Tensor,
    factor: Factor,
    sparsity: float,
    prune_n: int = 0,
    prune_m: int = 0,
    blocksize: int = 128,
    quantizer: Grid | None = None,
) -> Swept:
    """SparseGPT: prune block by block of columns, and move what is lost onto later columns.

    Args:
        weight: [O, I].
        factor: of the Hessian of its inputs.
        sparsity: share pruned of every block, by one threshold over all its rows; not read with
            ``prune_n``.
        prune_n: prune this many of every ``prune_m`` inputs of a row; 0: anywhere.
        prune_m: see ``prune_n``; divides ``blocksize``.
        blocksize: columns whose mask is chosen together.
        quantizer: round what stays to this grid (whole rows), in the same sweep.
    """
    w = working(weight).clone()
    scale, zero = fit(w, quantizer) if quantizer else (w, w)
    w[:, factor.dead] = 0
    pruned = torch.zeros_like(w, dtype=torch.bool)
    loss = w.new_zeros(len(w))
    for a in range(0, w.shape[1], blocksize):
        b = min(a + blocksize, w.shape[1])
        block, u = w[:, a:b].clone(), factor.upper[a:b, a:b]
        d, errors, mask = u.diagonal(), torch.zeros_like(block), pruned[:, a:b]
        if not prune_n:
            score = (block / d).pow(2)
            mask |= score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for j in range(b - a):
            if prune_n and j % prune_m == 0:
                run = slice(j, j + prune_m)
                mask[:, run] = n_of_m_mask((block[:, run] / d[run]).pow(2), prune_n, prune_m)
            new = torch.where(mask[:, j], 0.0, block[:, j])
            if quantizer:
                new = (encode(new, scale, zero, quantizer) - zero) * scale
            error = (block[:, j] - new) / d[j]
            loss += error.pow(2)
            block[:, j:] -= error[:, None] * u[j, j:]
            block[:, j], errors[:, j] = new, error
        w[:, a:b] = block
        w[:, b:] -= errors @ factor.upper[a:b, b:]
    return Swept(w, pruned, loss / 2)


def ecoflap_ratios(
    scores: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    max_sparsity: float | None = None,
) -> dict[str, float]:
    """EcoFLAP's share pruned of every group of weights; the mean over all weights is ``sparsity``.

    Every group keeps ``1 - max_sparsity``; what is left of the budget is shared in proportion to
    the scores, up to a group's size, the excess again; by size where no scored group has room.

    Args:
        scores: importance of every group, at least 0.
        sizes: its number of weights.
        sparsity: share pruned over all.
        max_sparsity: of a group; None: ``sparsity + 0.1``.
    """
    most = min(1.0, sparsity + 0.1) if max_sparsity is None else max_sparsity
    if most < sparsity:
        raise ValueError(f"max_sparsity={most} is below the sparsity {sparsity} asked for")
    kept = {g: (1 - most) * n for g, n in sizes.items()}
    total = sum(sizes.values())
    left = (1 - sparsity) * total - sum(kept.values())
    while left > 1e-9 * total:
        room = [g for g in sizes if kept[g] < sizes[g]]
        parts = {g: scores[g] for g in room if scores[g] > 0} or {g: sizes[g] for g in room}
        mass = sum(parts.values())
        for g, part in parts.items():
            kept[g] = min(float(sizes[g]), kept[g] + left * part / mass)
        left = (1 - sparsity) * total - sum(kept.values())
    return {g: 1 - kept[g] / sizes[g] for g in sizes}
