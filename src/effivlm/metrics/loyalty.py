"""Loyalty (OL): how often a compressed model says what the original model says, right or wrong."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effivlm.metrics.performance import Array, Pair
from effivlm.records import DocumentRecord
from effivlm.tasks.scoring import SCORERS, normalise

Agreement = Callable[[DocumentRecord, DocumentRecord], float]


def agreement(record: DocumentRecord, original: DocumentRecord) -> float:
    """1 for the same normalised answer; for free text, the task's metric with the original answer
    as reference.
    """
    if record.answer is None or original.answer is None:
        return 0.0
    if record.metric == "rouge_l":
        return SCORERS["rouge_l"](record.answer, [original.answer])
    return float(normalise(record.answer) == normalise(original.answer))


def agreements(
    pairs: Mapping[str, Sequence[Pair]], agree: Agreement = agreement
) -> dict[str, Array]:
    """[n] agreement per document, by task.

    A failure of the setting agrees with nothing (0); a document on which the original itself failed
    has no answer to be loyal to and is left out.
    """
    found = {
        t: [agree(mine, base) for mine, base in p if not base.failed] for t, p in pairs.items()
    }
    return {t: np.array(a, dtype=np.float64) for t, a in found.items() if a}


def loyalty(agreed: Mapping[str, Array]) -> float:
    """OL in percent: mean over tasks of the mean agreement; NaN without documents."""
    return float(100 * np.mean([a.mean() for a in agreed.values()])) if agreed else float("nan")
