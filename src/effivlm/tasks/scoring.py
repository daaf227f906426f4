"""Scores of single answers, in [0, 1]; `metrics.builtin` registers them."""

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised reference."""
    return float(normalise(answer) in {normalise(r) for r in references})


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQAv2: min(1, matches / 3), averaged over leaving out one annotator at a time."""
    given, marks = normalise(answer), [normalise(r) for r in references]
    if len(marks) < 2:
        return float(given in marks)
    scores = [
        min(1.0, sum(m == given for j, m in enumerate(marks) if j != i) / 3)
        for i in range(len(marks))
    ]
    return sum(scores) / len(scores)


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (DocVQA): 1 - distance / length, 0 where the
    distance is half or more.
    """
    return max(
        _similarity(answer.strip().lower(), r.strip().lower(), threshold) for r in references
    )


def _similarity(a: str, b: str, threshold: float) -> float:
    if not a and not b:
        return 1.0
    share = levenshtein(a, b) / max(len(a), len(b))
    return 1 - share if share < threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """Edits (insert, delete, replace) that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """ChartQA: numbers within 5 %, anything else by exact match."""
    return max(_relaxed(answer, r) for r in references)


def _relaxed(answer: str, reference: str) -> float:
    a, b = _number(answer), _number(reference)
    if a is None or b is None:
        return exact_match(answer, [reference])
    return float(a == b) if b == 0 else float(abs(a - b) / abs(b) <= 0.05)


def _number(text: str) -> float | None:
    try:
        return float(text.strip().rstrip("%").replace(",", ""))
    except ValueError:
        return None


def yes_no(answer: str, references: Sequence[str]) -> float:
    """1 if the first word says the same as the reference."""
    words = normalise(answer).split()
    return float(bool(words) and words[0] == normalise(references[0]))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure by the rouge-score package.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise ImportError(
            "the metric rouge_l needs the package rouge-score: pip install rouge-score"
        ) from None
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return max(scorer.score(r, answer)["rougeL"].fmeasure for r in references)
