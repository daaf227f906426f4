"""Scores of one setting's answers to one task: a file beside the answers that can be rewritten.

    runs/NAME/records/MODEL/SETTING-HASH/TASK.jsonl      answers, raw; only ever added to
    runs/NAME/scores/MODEL/SETTING-HASH/TASK.json        what they score; written whole or not

A file of scores knows how many bytes of answers it was computed from: if answers were added since,
it is out of date, and nothing is read from it.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from effivlm.errors import EffivlmError
from effivlm.files.reading import read_json, reason
from effivlm.files.typed import reader_of
from effivlm.files.writing import make_folder, write_whole

Direction = Literal["higher", "lower"]


class ScoresError(EffivlmError, RuntimeError):
    """A file of scores that cannot be read; it can always be made again."""


@dataclass(frozen=True)
class Answered:
    """What a scorer is given of one document.

    Attributes:
        document: its id. text: as generated; None where it failed. references: accepted answers.
        new_tokens: generated.
    """

    document: str
    text: str | None
    references: tuple[str, ...] = ()
    new_tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """One official number.

    Attributes:
        name: as the benchmark calls it. direction: which way is better. scale: value of a perfect
            score (1, 100, 2000 ...).
    """

    name: str
    direction: Direction = "higher"
    scale: float = 1.0


@dataclass(frozen=True)
class Scores:
    """Scores of one setting on one task.

    Attributes:
        task, version: what was scored. metrics: the first is the headline. total: official numbers
            by metric, in their own scale. each: document -> score in [0, 1], None where the task
            has none for single documents. answers: bytes of answers these were computed from.
        documents, failed, empty, invalid: counts; an invalid answer is one that the task's form
            (yes or no, a letter) does not have. void: why these are no scores, such as failed
            calls of a judge; empty otherwise.
    """

    task: str
    version: str
    metrics: tuple[Metric, ...]
    total: dict[str, float]
    each: dict[str, float | None] = field(repr=False)
    answers: int
    documents: int
    failed: int = 0
    empty: int = 0
    invalid: int = 0
    void: str = ""

    def __post_init__(self) -> None:
        """Refuse what no scorer gives."""
        if not self.metrics or any(not 0 < m.scale < math.inf for m in self.metrics):
            raise ValueError("metrics: expected at least one, of a scale above 0")
        numbers = [*self.total.values(), *(s for s in self.each.values() if s is not None)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("expected finite numbers")

    @property
    def headline(self) -> float:
        """The first metric's value as a share of a perfect score; NaN where void."""
        if self.void or self.metrics[0].name not in self.total:
            return float("nan")
        return self.total[self.metrics[0].name] / self.metrics[0].scale


_read = reader_of(Scores)


def scores_path(records: Path) -> Path:
    """Where the scores of a file of answers are."""
    folder = records.parents[3]
    return (folder / "scores" / records.relative_to(folder / "records")).with_suffix(".json")


def read_scores(records: Path) -> Scores | None:
    """Scores of a file of answers; None where they are missing or out of date.

    Raises:
        ScoresError: for a file that holds something else.
    """
    path = scores_path(records)
    if not path.exists():
        return None
    data = read_json(path, "scores; delete it and run `effivlm score`", ScoresError)
    try:
        found = _read(data)
    except (ValueError, OverflowError) as error:
        raise ScoresError(
            f"{path} holds no scores ({reason(error)}): delete it and run `effivlm score`"
        ) from None
    return found if found.answers == records.stat().st_size else None


def write_scores(records: Path, scores: Scores) -> Path:
    """Write or replace the scores of a file of answers; a killed writer leaves the old ones."""
    path = scores_path(records)
    make_folder(path.parent, ScoresError)
    text = json.dumps(asdict(scores), allow_nan=False) + "\n"
    write_whole(path, text, ScoresError, "the answers are intact; run `effivlm score` again")
    return path
