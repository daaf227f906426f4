"""Quantiles of Student's t, for any degrees of freedom."""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
NORMAL = 1e5  # degrees of freedom from which t is the normal distribution to six digits


@lru_cache(maxsize=4096)
def quantile(p: float, freedom: float) -> float:
    """The value that a t variable stays below with probability ``p``.

    Raises:
        ValueError: for a probability outside (0, 1) or no degrees of freedom.
    """
    if not (0 < p < 1 and freedom > 0):
        raise ValueError(f"expected 0 < p < 1 and freedom > 0, got p={p}, freedom={freedom}")
    if freedom >= NORMAL:
        return NormalDist().inv_cdf(p)
    if p < 0.5:
        return -quantile(1 - p, freedom)
    low, high = 0.0, math.pi / 2  # t = sqrt(freedom) tan(angle): a finite range to halve
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _above_half(middle, freedom) < p else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _above_half(angle: float, freedom: float) -> float:
    """P(0 < t < sqrt(freedom) tan(angle)): the integral of cos^(freedom - 1), normalised."""
    log_whole = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    points = angle / 2 * (NODES + 1)
    inside = np.exp((freedom - 1) * np.log(np.cos(points)))
    return float(angle / 2 * (WEIGHTS @ inside) * math.exp(log_whole))
