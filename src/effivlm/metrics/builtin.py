"""The metrics that ship: the field's scores of short answers, yes/no questions and free text."""

from typing import Any

import numpy as np

from effivlm.metrics.metric import Array, Metric, Scored
from effivlm.tasks import scoring


def _yes(record: Scored) -> tuple[float, float, float]:
    """(rightly yes, said yes, is yes); a failure counts as the wrong answer."""
    truth = scoring.normalise(record.references[0]) == "yes"
    said = scoring.normalise(record.answer or "").split()[:1] == ["yes"]
    said = not truth if record.failed else said
    return (float(said and truth), float(said), float(truth))


def _f1(means: Array) -> Any:
    """F1 of the yes class; 0 where nothing is yes and nothing was said to be."""
    hit, both = means[..., 0], means[..., 1] + means[..., 2]
    return 2 * hit / np.where(both > 0, both, 1)


def _rouge_agreement(answer: str, original: str) -> float:
    return scoring.rouge_l(answer, [original])


exact_match = Metric(
    "exact_match", "the answer is a reference, but for case and articles", scoring.exact_match
)
vqa_accuracy = Metric(
    "vqa_accuracy", "VQAv2: matches among annotators / 3, at most 1", scoring.vqa_accuracy
)
anls = Metric("anls", "DocVQA: normalised Levenshtein similarity, 0 below a half", scoring.anls)
relaxed_accuracy = Metric(
    "relaxed_accuracy", "ChartQA: numbers within 5 %, else exact match", scoring.relaxed_accuracy
)
yes_no = Metric(
    "yes_no",
    "POPE: F1 of the yes class, read from the first word",
    scoring.yes_no,
    values=_yes,
    join=_f1,
    blind=("yes", "no"),
    form="yes_no",
)
rouge_l = Metric(
    "rouge_l",
    "ROUGE-L F-measure; loyalty is ROUGE-L against the original's answer",
    scoring.rouge_l,
    agree=_rouge_agreement,
)
