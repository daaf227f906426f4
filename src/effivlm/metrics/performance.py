"""Task scores and overall performance (OP).

OP = sqrt(mean over benchmarks of (score / original score)^2), as EffiVLM-Bench defines it; in
percent of the original.

A failed document has no answer. By default it scores 0 (``failures="zero"``): a setting must not
look better for having crashed on the hard documents. ``failures="exclude"`` leaves out documents
that failed under either setting. Tables show how many failed in both cases.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effivlm.errors import EffivlmError
from effivlm.records import DocumentRecord
from effivlm.tasks.scoring import normalise

Array = NDArray[np.float64]
Aggregate = Callable[[Array], Any]  # per-document values [..., n, c] -> the task's score [...]
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


def values(records: Sequence[DocumentRecord]) -> Array:
    """[n, c] what a task's score is computed from: the score, or, for yes/no, (answered yes, is
    yes) as 0 and 1.
    """
    if records and records[0].metric == "yes_no":
        return np.array([_yes_no(r) for r in records], dtype=np.float64)
    return np.array([[score_of(r)] for r in records], dtype=np.float64)


def score_of(record: DocumentRecord) -> float:
    """A document's score in [0, 1]; 0 for one that failed.

    Raises:
        MetricError: for an answer that was not scored: a missing score is no zero.
    """
    if record.failed:
        return 0.0
    if record.score is None:
        raise MetricError(
            f"{record.task} {record.document} under {record.setting} has no score: run"
            " `effivlm score` on the run's folder"
        )
    return record.score


def has_scores(pairs: Sequence[Pair]) -> bool:
    """Whether every document has a score of its own under both settings."""
    return all(r.failed or r.score is not None for pair in pairs for r in pair)


def _yes_no(record: DocumentRecord) -> tuple[float, float]:
    truth = normalise(record.references[0]) == "yes"
    if record.failed:
        return (float(not truth), float(truth))  # a failure counts as the wrong answer
    return (float(normalise(record.answer or "").split()[:1] == ["yes"]), float(truth))


def aggregate_of(metric: str) -> Aggregate:
    """How a metric joins its documents: F1 of the yes class for yes/no, else the mean."""
    return _f1 if metric == "yes_no" else _mean


def _mean(rows: Array) -> Array:
    return rows[..., 0].mean(-1)


def _f1(rows: Array) -> Array:
    said, truth = rows[..., 0], rows[..., 1]
    hit, wrong = (said * truth).sum(-1), np.abs(said - truth).sum(-1)
    return (
        2 * hit / np.maximum(2 * hit + wrong, 1)
    )  # counts: below 1 only where nothing is yes, and hit is 0 then


def task_score(records: Sequence[DocumentRecord]) -> float:
    """A task's score in [0, 1]; failed documents score 0.

    Raises:
        MetricError: without records.
    """
    if not records:
        raise MetricError("a task without records has no score")
    return float(aggregate_of(records[0].metric)(values(records)))


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
