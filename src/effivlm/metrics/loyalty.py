"""Loyalty (OL): how often a compressed model says what the original model says, right or wrong."""

from collections.abc import Sequence

from effivlm.records import DocumentRecord
from effivlm.tasks.scoring import SCORERS, normalise


def agreement(record: DocumentRecord, original: DocumentRecord) -> float:
    """1 for the same normalised answer; for free text, the task's metric with the original answer as reference."""
    if record.answer is None or original.answer is None:
        return 0.0
    if record.metric == "rouge_l":
        return SCORERS["rouge_l"](record.answer, [original.answer])
    return float(normalise(record.answer) == normalise(original.answer))


def loyalty(records: Sequence[DocumentRecord], originals: Sequence[DocumentRecord]) -> float:
    """OL in percent: mean over tasks of the mean agreement, over documents both answered."""
    by_document = {(r.task, r.document): r for r in originals}
    tasks: dict[str, list[float]] = {}
    for r in records:
        if (r.task, r.document) in by_document:
            tasks.setdefault(r.task, []).append(agreement(r, by_document[r.task, r.document]))
    means = [sum(v) / len(v) for v in tasks.values()]
    return 100 * sum(means) / len(means) if means else float("nan")
