"""Task scores and overall performance (OP).

OP = sqrt(mean over benchmarks of (score / original score)^2), as EffiVLM-Bench defines it; in
percent of the original.

A failed document has no answer. By default it scores 0 (``failures="zero"``): a setting must not
look better for having crashed on the hard documents. ``failures="exclude"`` leaves out documents
that failed under either setting. Tables show how many failed in both cases.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from effivlm import registry
from effivlm.errors import EffivlmError
from effivlm.metrics.metric import Array, Metric
from effivlm.records import DocumentRecord

Failures = Literal["zero", "exclude"]
Pair = tuple[DocumentRecord, DocumentRecord]


class MetricError(EffivlmError, ValueError):
    """Numbers that cannot be computed from these records."""


def pairs_of(
    records: Sequence[DocumentRecord],
    originals: Sequence[DocumentRecord],
    failures: Failures = "zero",
) -> dict[str, list[Pair]]:
    """Documents that both settings were asked, by task.

    Raises:
        MetricError: if prompt or media of a document differ, or for an unknown treatment of
            failures.
    """
    if failures not in ("zero", "exclude"):
        raise MetricError(f"failures={failures!r}: expected 'zero' or 'exclude'")
    by_document = {(r.task, r.document): r for r in originals}
    out: dict[str, list[Pair]] = {}
    for r in records:
        base = by_document.get((r.task, r.document))
        if base is None or (failures == "exclude" and (r.failed or base.failed)):
            continue
        if r.digest and base.digest and r.digest != base.digest:
            raise MetricError(
                f"{r.task} {r.document}: prompt or image under {r.setting} differs from that under"
                f" {base.setting}: only answers to the same question can be compared; run both"
                " again"
            )
        out.setdefault(r.task, []).append((r, base))
    return out


def metric_of(records: Sequence[DocumentRecord]) -> Metric:
    """The registered metric of a task's records; `exact_match`'s mean where a name is not
    registered here (see `unregistered`).
    """
    known = registry.metrics()
    return known.get(records[0].metric, known["exact_match"])


def score_of(record: DocumentRecord) -> float:
    """A document's score in [0, 1]; 0 for one that failed.

    Raises:
        MetricError: for an answer that was not scored: none is not 0.
    """
    if unscored(record):
        raise MetricError(
            f"{record.task} {record.document} under {record.setting} has an answer but no score:"
            " run `effivlm score` on the run's folder"
        )
    return record.score or 0.0


def unregistered(records: Sequence[DocumentRecord]) -> bool:
    """Whether a task's metric is not registered here: its documents' scores are then averaged."""
    return records[0].metric not in registry.metrics()


def values(records: Sequence[DocumentRecord]) -> Array:
    """[n, c] what a task's score is computed from, by its metric.

    Raises:
        MetricError: without records, or for an answer without a score: none is not 0.
    """
    if not records:
        raise MetricError("a task without records has no score")
    if missing := next((r for r in records if unscored(r)), None):
        raise MetricError(
            f"{missing.task} {missing.document} under {missing.setting} has an answer but no score"
        )
    metric = metric_of(records)
    return np.array([metric.values(r) for r in records], dtype=np.float64)


def unscored(record: DocumentRecord) -> bool:
    """Whether it has an answer that nobody has scored."""
    return record.score is None and not record.failed


def task_score(records: Sequence[DocumentRecord]) -> float:
    """A task's score in [0, 1]; failed documents score 0.

    Raises:
        MetricError: without records, or for an answer without a score.
    """
    found = values(records)
    return float(metric_of(records).join(found.mean(0)))


def ratios(scores: Mapping[str, float], original: Mapping[str, float]) -> dict[str, float]:
    """Score / original score by task.

    Raises:
        MetricError: if the tasks differ or an original score is 0.
    """
    if set(scores) != set(original) or not scores:
        raise MetricError(
            f"tasks differ: {sorted(set(scores) ^ set(original)) or 'none given'}; OP compares the"
            " same tasks"
        )
    zero = [t for t, s in original.items() if s == 0]
    if zero:
        raise MetricError(
            f"the original model scores 0 on {', '.join(zero)}: leave the task out, its ratio is"
            " undefined"
        )
    return {t: scores[t] / original[t] for t in scores}


def overall(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """OP of scores by task, in percent of the original.

    Raises:
        MetricError: if the tasks differ or an original score is 0.
    """
    return float(100 * np.sqrt(np.mean(np.square(list(ratios(scores, original).values())))))
