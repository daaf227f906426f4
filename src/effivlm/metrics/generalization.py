"""Generalization (OG): how unevenly a setting treats benchmarks; lower is better."""

from collections.abc import Mapping, Sequence

import numpy as np


def generalization(ratios: Sequence[Mapping[str, float]]) -> float:
    """OG = std over benchmarks of the model-averaged ratio, divided by its mean, in percent (population deviation).

    Args:
        ratios: per model, score / original score by benchmark.
    """
    tasks = list(ratios[0])
    mean = np.array([np.mean([r[t] for r in ratios]) for t in tasks])
    return float(100 * mean.std() / mean.mean()) if mean.mean() else float("nan")
