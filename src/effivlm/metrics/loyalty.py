"""Loyalty (OL): how often a compressed model says what the original model says, right or wrong."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effivlm.metrics.metric import Array
from effivlm.metrics.performance import Pair, metric_of
from effivlm.records import DocumentRecord

Agreement = Callable[[DocumentRecord, DocumentRecord], float]


def agreement(record: DocumentRecord, original: DocumentRecord) -> float:
    """How much two answers agree, by their metric: 1 for the same words or, for free text, the
    score with the original answer as reference; 0 for a failure.
    """
    if record.answer is None or original.answer is None:
        return 0.0
    return metric_of([original]).agree(record.answer, original.answer)


def loyal_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Those with an answer to be loyal to: a document on which the original itself failed has
    none.
    """
    return [(mine, base) for mine, base in pairs if not base.failed]


def agreements(
    pairs: Mapping[str, Sequence[Pair]], agree: Agreement = agreement
) -> dict[str, Array]:
    """[n] agreement per document of `loyal_pairs`, by task; a failure agrees with nothing (0)."""
    found = {t: [agree(mine, base) for mine, base in loyal_pairs(p)] for t, p in pairs.items()}
    return {t: np.array(a, dtype=np.float64) for t, a in found.items() if a}


def loyalty(agreed: Mapping[str, Array]) -> float:
    """OL in percent: mean over tasks of the mean agreement; NaN without documents."""
    return float(100 * np.mean([a.mean() for a in agreed.values()])) if agreed else float("nan")
