"""What a metric is: how an answer is scored, how documents join into a task's number, and when two
answers agree. `effivlm list metrics` shows all of them.

To add one, make a `Metric` in a module of this package, or in a package of your own that names it
in the entry point group ``effivlm.metrics``::

    starts_right = Metric(
        name="starts_right",
        help="the first word is that of a reference",
        score=lambda answer, references: float(
            answer.split()[:1] in [r.split()[:1] for r in references]
        ),
    )
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from effivlm.tasks.scoring import normalise

Array = NDArray[np.float64]
Score = Callable[[str, Sequence[str]], float]
Join = Callable[[Array], Any]  # means over documents [..., c] -> the task's score [...]


class Scored(Protocol):
    """One answer with its score: a record, or what a scorer is given."""

    @property
    def answer(self) -> str | None:
        """The text, None where the document failed."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Accepted answers."""
        ...

    @property
    def score(self) -> float | None:
        """In [0, 1], or None."""
        ...

    @property
    def failed(self) -> bool:
        """Whether there is no answer."""
        ...


def own_score(record: Scored) -> tuple[float, ...]:
    """The document's score; 0 where it failed."""
    return (0.0 if record.score is None else record.score,)


def mean(means: Array) -> Any:
    """The first mean."""
    return means[..., 0]


def same_words(answer: str, original: str) -> float:
    """1 for the same answer but for case, punctuation and articles."""
    return float(normalise(answer) == normalise(original))


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: what ``task.yaml`` and records call it. help: one line. score: (answer, references) ->
            a document's score in [0, 1].
        values: what a document adds to its task's number: c numbers of a record, failures included.
        join: the task's number in [0, 1] from the means of these over documents, for any leading
            axes; a smooth function, so that intervals can be computed from it.
        agree: (answer, the original model's answer) -> agreement in [0, 1], right or wrong.
        blind: answers that need no look at the picture, beside the references that occur most.
        form: ``yes_no`` where anything but a first word of yes or no is counted as invalid.
    """

    name: str
    help: str
    score: Score
    values: Callable[[Scored], tuple[float, ...]] = own_score
    join: Join = mean
    agree: Callable[[str, str], float] = same_words
    blind: tuple[str, ...] = ()
    form: Literal["free", "yes_no", "letter"] = "free"
