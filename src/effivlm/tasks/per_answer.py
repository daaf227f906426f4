"""Built-in tasks: every answer scored alone by a registered metric, and what they join to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effivlm import registry
from effivlm.metrics.metric import mean, own_score
from effivlm.scores import Answered, Metric
from effivlm.tasks.base import Result, Scorer
from effivlm.tasks.scoring import normalise

_LETTER = re.compile(r"(?:^|[^A-Za-z])[A-J](?:$|[^A-Za-z])")


@dataclass(frozen=True)
class Given:
    """One answer as a metric reads it."""

    answer: str | None
    references: tuple[str, ...]
    score: float | None

    @property
    def failed(self) -> bool:
        """Whether there is no answer."""
        return self.answer is None


class PerAnswer(Scorer):
    """The task's number is what its metric joins documents to; the plain mean stands beside it
    where that is another number.

    Args:
        name: of a registered metric.
    """

    def __init__(self, name: str) -> None:
        self.name, self.metric = name, registry.metrics()[name]
        self.form = self.metric.form
        self.plain = self.metric.values is own_score and self.metric.join is mean
        self.metrics = (Metric(name),) if self.plain else (Metric(name), Metric("mean"))

    def score(self, answers: Sequence[Answered]) -> Result:
        """The metric of every answer, and what they join to."""
        each = [0.0 if a.text is None else self.metric.score(a.text, a.references) for a in answers]
        given = [Given(a.text, a.references, s) for a, s in zip(answers, each, strict=True)]
        values = np.array([self.metric.values(g) for g in given], dtype=np.float64)
        if not len(values):
            return Result([], {})
        total = {self.name: float(self.metric.join(values.mean(0)))}
        beside = {} if self.plain else {"mean": sum(each) / len(each)}
        return Result(list(each), total | beside)


def invalid(text: str, form: str) -> bool:
    """Whether an answer is none that the task's form allows: first word yes or no; a letter."""
    if form == "yes_no":
        return normalise(text).split()[:1] not in (["yes"], ["no"])
    return form == "letter" and not _LETTER.search(text.strip())
