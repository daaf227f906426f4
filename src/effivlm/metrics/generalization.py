"""Generalization (OG): how unevenly a setting treats benchmarks; lower is better."""

from collections.abc import Mapping, Sequence

import numpy as np

from effivlm.metrics.performance import MetricError


def generalization(ratios: Sequence[Mapping[str, float]]) -> float:
    """OG = std over benchmarks of the model-averaged ratio, divided by its mean, in percent
    (population deviation).

    Args:
        ratios: per model, score / original score by benchmark.

    Returns:
        NaN where every ratio is 0.

    Raises:
        MetricError: if the models were not asked the same benchmarks, or there are none.
    """
    if not ratios or not ratios[0]:
        raise MetricError("OG needs at least one model and one benchmark")
    different = {t for r in ratios for t in set(r) ^ set(ratios[0])}
    if different:
        raise MetricError(
            "OG averages models over the same benchmarks; not all models have"
            f" {', '.join(sorted(different))}"
        )
    mean = np.array([np.mean([r[t] for r in ratios]) for t in ratios[0]])
    return float(100 * mean.std() / mean.mean()) if mean.mean() else float("nan")
