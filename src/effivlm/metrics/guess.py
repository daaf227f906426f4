"""What can be said without looking: the score of the best single answer to a whole task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from effivlm.metrics.performance import metric_of, task_score
from effivlm.records import DocumentRecord
from effivlm.tasks.scoring import normalise

TRIED = 5  # commonest references that are tried as the answer to everything


def blind_guess(records: Sequence[DocumentRecord]) -> float:
    """The score in [0, 1] of saying the same to every document of a task, chosen with hindsight
    among the references that occur at least twice and the metric's own blind answers.

    A lower bound of what can be said without looking: questions are not in the records, so a guess
    by kind of question is not tried.
    """
    metric = metric_of(records)
    words: dict[str, str] = {}  # normalised -> as written first
    counted: Counter[str] = Counter()
    for r in records:
        said = {normalise(x): x for x in r.references}
        words = said | words
        counted.update(said.keys())
    tried = [words[w] for w, n in counted.most_common(TRIED) if n > 1]
    return max((_always(answer, records) for answer in [*tried, *metric.blind]), default=0.0)


def _always(answer: str, records: Sequence[DocumentRecord]) -> float:
    score = metric_of(records).score
    return task_score(
        [replace(r, answer=answer, score=score(answer, r.references), error=None) for r in records]
    )
