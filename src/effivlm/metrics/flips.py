"""What changed, document by document."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from effivlm.metrics.performance import Pair
from effivlm.tasks.scoring import normalise


class Flips(NamedTuple):
    """Documents by what became of their answer.

    Attributes:
        lost: right to wrong (or to a lower score; a failure scores 0). gained: wrong to right (or
            to a higher score). reworded: another answer, equally right or wrong. same: the answer
            itself.
    """

    lost: int
    gained: int
    reworded: int
    same: int

    @classmethod
    def sum(cls, parts: Iterable["Flips"]) -> "Flips":
        """Of several tasks."""
        every = list(parts)
        return cls(*(sum(x[i] for x in every) for i in range(4)))


def flips(pairs: Sequence[Pair]) -> Flips:
    """Counts over scored documents: (under the setting, under the original)."""
    lost = gained = reworded = same = 0
    for mine, base in pairs:
        change = (mine.score or 0.0) - (base.score or 0.0)
        lost += change < 0
        gained += change > 0
        alike = normalise(mine.answer or "") == normalise(base.answer or "")
        same += change == 0 and alike and mine.failed == base.failed
        reworded += change == 0 and not (alike and mine.failed == base.failed)
    return Flips(lost, gained, reworded, same)
