"""Task scores and overall performance (OP). Failed documents score 0; tables show how many failed.

OP = sqrt(mean over benchmarks of (score / original score)^2), as EffiVLM-Bench defines it; in percent of the original.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from effivlm.records import DocumentRecord

Aggregate = Callable[[NDArray[np.float64]], float]  # rows of per-document values [n, c] -> the task's score


class MetricError(ValueError):
    """Numbers that cannot be computed from these records."""


def values(records: Sequence[DocumentRecord]) -> NDArray[np.float64]:
    """[n, c] what a task's score is computed from: the score, or, for yes/no, (answered yes, is yes) as 0 and 1."""
    if records and records[0].metric == "yes_no":
        return np.array([_yes_no(r) for r in records], dtype=np.float64)
    return np.array([[r.score or 0.0] for r in records], dtype=np.float64)


def _yes_no(record: DocumentRecord) -> tuple[float, float]:
    truth = record.references[0].strip().lower().startswith("yes")
    if record.failed:
        return (float(not truth), float(truth))  # a failure counts as the wrong answer
    return (float((record.answer or "").strip().lower().startswith("yes")), float(truth))


def aggregate_of(metric: str) -> Aggregate:
    """How a metric joins its documents: F1 of the yes class for yes/no, else the mean."""
    return _f1 if metric == "yes_no" else _mean


def _mean(rows: NDArray[np.float64]) -> float:
    return float(rows[:, 0].mean())


def _f1(rows: NDArray[np.float64]) -> float:
    hit = float((rows[:, 0] * rows[:, 1]).sum())
    wrong = float(np.abs(rows[:, 0] - rows[:, 1]).sum())
    return 2 * hit / (2 * hit + wrong) if hit + wrong > 0 else 0.0


def task_score(records: Sequence[DocumentRecord]) -> float:
    """A task's score in [0, 1].

    Raises:
        MetricError: without records.
    """
    if not records:
        raise MetricError("a task without records has no score")
    return aggregate_of(records[0].metric)(values(records))


def overall(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """OP of scores by task, in percent; tasks on which the original scores 0 cannot be compared.

    Raises:
        MetricError: if the tasks differ or an original score is 0.
    """
    if set(scores) != set(original) or not scores:
        raise MetricError(f"tasks differ: {sorted(set(scores) ^ set(original)) or 'none given'}; OP compares the same tasks")
    zero = [t for t, s in original.items() if s == 0]
    if zero:
        raise MetricError(f"the original model scores 0 on {', '.join(zero)}: leave the task out, its ratio is undefined")
    ratios = np.array([scores[t] / original[t] for t in scores])
    return float(100 * np.sqrt((ratios**2).mean()))
