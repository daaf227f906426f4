"""Scores of single answers, in [0, 1], and how a built-in task joins them into one number."""

import re
import string
from collections.abc import Callable, Sequence

from effivlm.scores import Answered, Metric
from effivlm.tasks.base import Result, Scorer

Score = Callable[[str, Sequence[str]], float]
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
            "the metric rouge_l needs the package rouge-score: pip install 'effivlm[score]'"
        ) from None
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return max(scorer.score(r, answer)["rougeL"].fmeasure for r in references)


SCORERS: dict[str, Score] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "yes_no": yes_no,
    "rouge_l": rouge_l,
}


class PerAnswer(Scorer):
    """A built-in metric: every answer scored alone; the task's number is their mean, and for yes/no
    questions first the F1 of yes.

    Args:
        name: one of `SCORERS`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.metric = name, SCORERS[name]
        self.form = "yes_no" if name == "yes_no" else "free"
        self.metrics = (Metric("f1"), Metric("accuracy")) if name == "yes_no" else (Metric(name),)

    def score(self, answers: Sequence[Answered]) -> Result:
        """The metric of every answer, and their mean; of yes/no questions F1 and accuracy."""
        each = [0.0 if a.text is None else self.metric(a.text, a.references) for a in answers]
        mean = sum(each) / max(len(each), 1)
        total = {self.name: mean} if self.name != "yes_no" else _yes_no(answers, each)
        return Result(list(each), total)


def _yes_no(answers: Sequence[Answered], each: Sequence[float]) -> dict[str, float]:
    hit = wrong = 0.0
    for answer, right in zip(answers, each, strict=True):
        hit += bool(right) and normalise(answer.references[0]) == "yes"
        wrong += not right and (_is_yes(answer) or normalise(answer.references[0]) == "yes")
    mean = sum(each) / max(len(each), 1)
    return {"f1": 2 * hit / max(2 * hit + wrong, 1), "accuracy": mean}


def _is_yes(answer: Answered) -> bool:
    """Whether it says yes; a failed document says the wrong thing."""
    if answer.text is None:
        return normalise(answer.references[0]) != "yes"
    return normalise(answer.text).split()[:1] == ["yes"]


_LETTER = re.compile(r"(?:^|[^A-Za-z])[A-J](?:$|[^A-Za-z])")


def invalid(text: str, form: str) -> bool:
    """Whether an answer is none that the task's form allows: first word yes or no; a letter."""
    if form == "yes_no":
        return normalise(text).split()[:1] not in (["yes"], ["no"])
    return form == "letter" and not _LETTER.search(text.strip())
