"""Aggregates as the papers define them, so that their printed tables can be computed again.

Each takes scores as printed: task -> score in the benchmark's own unit.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from effivlm.metrics.generalization import generalization
from effivlm.metrics.performance import MetricError, overall, ratios

Scores = Mapping[str, float]
ABILITIES = {  # UniPruneBench's six dimensions, by the benchmarks as it prints them
    "comprehensive": ("MME", "MMBench-CN", "MMBench-EN"),
    "mathematics": ("MathVista", "Math-Vision"),
    "ocr": ("SEED-Bench-2-Plus", "OCRBench"),
    "instruction": ("MIA-Bench",),
    "multidisciplinary": ("ScienceQA",),
    "hallucination": ("POPE", "HallusionBench"),
}


def op(scores: Scores, original: Scores) -> float:
    """EffiVLM-Bench, overall performance (Tables 1 and 4): root mean square over benchmarks of
    score / original score; 1 for the original.

    Raises:
        MetricError: if the benchmarks differ or an original score is 0.
    """
    return overall(scores, original) / 100


def og(models: Sequence[tuple[Scores, Scores]]) -> float:
    """EffiVLM-Bench, overall generalization (Table 2): of every model's (scores, original scores),
    spread over benchmarks of the model-averaged ratio, divided by its mean.

    Raises:
        MetricError: if the models were not asked the same benchmarks.
    """
    return generalization([ratios(scores, original) for scores, original in models]) / 100


def mean_percent(scores: Scores, original: Scores) -> float:
    """Polymorphic (Tables 1 to 3), "Mean %": mean over benchmarks of score / original, percent.

    Raises:
        MetricError: if the benchmarks differ or an original score is 0.
    """
    return float(100 * np.mean(list(ratios(scores, original).values())))


def relative_drop(scores: Scores, original: Scores) -> float:
    """UniPruneBench, relative drop in percent: change of the mean over benchmarks, divided by the
    original's mean; negative where something is lost.

    Raises:
        MetricError: if the benchmarks differ or the original's mean is 0.
    """
    if set(scores) != set(original) or not scores:
        raise MetricError(f"benchmarks differ: {sorted(set(scores) ^ set(original))}")
    before, after = mean(original), mean(scores)
    if before == 0:
        raise MetricError("the original's mean score is 0: its relative drop is undefined")
    return 100 * (after - before) / before


def mean(scores: Scores) -> float:
    """PLPHP's averages, and UniPruneBench's: the plain mean over benchmarks.

    Raises:
        MetricError: without scores.
    """
    if not scores:
        raise MetricError("the mean of no scores is undefined")
    return float(np.mean(list(scores.values())))


def abilities(scores: Scores) -> dict[str, float]:
    """UniPruneBench's mean score of every ability, over those of its benchmarks that are there (not
    all of its tables have all).
    """
    held = {a: {b: scores[b] for b in m if b in scores} for a, m in ABILITIES.items()}
    return {ability: mean(found) for ability, found in held.items() if found}
