"""Is a difference more than chance: an exact sign-flip test over independent units, and Holm's
correction.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from effivlm.metrics.metric import Array
from effivlm.metrics.sample import Units

GRID = 1 << 13  # steps that the sum of all changes is counted in, where they have no common unit


def paired_test(
    differences: Mapping[str, Array], units: Mapping[str, Units] | None = None
) -> float:
    """Two-sided p-value of a sign-flip test on differences of scores, each task weighing the same.

    If the setting changed nothing, the difference of every unit could as well have had the other
    sign. The distribution of the sum over all 2^m patterns is computed whole (as the product of its
    units' characteristic functions), so nothing is drawn, and p is as small as the m units that
    differ allow: 2^(1 - m). With one task of right or wrong answers this is McNemar's exact test.
    Changes without a common unit, such as those of graded scores, are rounded to 1 / `GRID` of
    their sum before anything is compared; the test of rounded changes is exact too.

    Args:
        differences: task -> [n] score under the setting - score under the original.
        units: task -> [n] units flipped together; every document its own if not given.

    Returns:
        The p-value; 1 where nothing differs.
    """
    found = {t: d for t, d in differences.items() if len(d)}
    weighted = np.concatenate([np.zeros(0), *(d / len(d) for d in found.values())])
    if units is not None and found:
        numbers = np.concatenate([units[t] for t in found])
        weighted = np.bincount(np.unique(numbers, return_inverse=True)[1], weights=weighted)
    weighted = weighted[np.abs(weighted) > 1e-12]
    if not len(weighted):
        return 1.0
    whole = _whole(np.abs(weighted), math.lcm(*(len(d) for d in found.values())))
    observed = abs(int((np.sign(weighted).astype(np.int64) * whole).sum()))
    chance = _distribution(whole)
    total = len(chance) - 1
    extreme = np.abs(2 * np.arange(total + 1) - total) >= observed
    return float(min(1.0, max(chance[extreme].sum(), 2.0 ** (1 - len(weighted)))))


def _whole(amounts: Array, common: int) -> NDArray[np.int64]:
    """Amounts as whole numbers: of their common unit, or of `GRID` steps of their sum."""
    scaled = amounts * common
    if scaled.sum() > 8 * GRID or np.abs(scaled - np.round(scaled)).max() > 1e-6:
        scaled = amounts / amounts.sum() * GRID
    whole = np.round(scaled).astype(np.int64)
    return whole // max(1, int(np.gcd.reduce(whole)))


def _distribution(sizes: NDArray[np.int64]) -> Array:
    """[sum + 1] chance of every sum of a random half of ``sizes``."""
    total = int(sizes.sum())
    size, count = np.unique(sizes[sizes > 0], return_counts=True)
    angle = np.pi * np.arange((total + 1) // 2 + 1) / (total + 1)
    spectrum = np.exp(-1j * angle * total)
    for s, c in zip(size, count, strict=True):
        spectrum = spectrum * np.cos(angle * s) ** c
    return np.clip(np.fft.irfft(spectrum, total + 1), 0, None)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: adjusted p-values in the given order; NaN, untested, stays NaN."""
    tested = [i for i, p in enumerate(p_values) if p == p]
    order: list[int] = sorted(tested, key=lambda i: p_values[i])
    out, running = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(tested) - rank) * p_values[i]))
        out[i] = running
    return out
