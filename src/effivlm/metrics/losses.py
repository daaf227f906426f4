"""What a setting loses against a margin somebody chose, at a confidence somebody chose, and how
many settings can be said to stay within it at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effivlm.metrics import intervals
from effivlm.metrics.intervals import Spread
from effivlm.metrics.performance import Pair, unscored
from effivlm.metrics.sample import samples_of
from effivlm.metrics.student import quantile

POWER = 0.8  # how often a number of documents that is called enough decides


@dataclass(frozen=True)
class Loss:
    """Mean over tasks of score - original, in points; negative where something is lost.

    Attributes:
        value: as observed. spread: how well it is known, as a share. documents: compared.
    """

    value: float
    spread: Spread
    documents: int

    @property
    def known(self) -> bool:
        """Whether there is an interval: not where a task has one independent document only."""
        return self.spread.error == self.spread.error and self.value == self.value

    def low(self, confidence: float) -> float:
        """One-sided lower end in points; as `intervals.difference` bounds it."""
        reach = quantile(confidence, self.spread.freedom) * self.spread.error
        return min(self.value, 100 * max(-1.0, self.spread.centre - reach))

    def high(self, confidence: float) -> float:
        """One-sided upper end in points."""
        reach = quantile(confidence, self.spread.freedom) * self.spread.error
        return max(self.value, 100 * min(1.0, self.spread.centre + reach))

    def needed(self, drop: float, confidence: float) -> float:
        """Documents, in the same mix, that would show 4 times of 5 on which side of -``drop`` the
        observed value lies, if it is the true one; infinite where it lies on it.
        """
        room = abs(self.value + drop)
        if room < 1e-9:
            return math.inf
        t = quantile(confidence, self.spread.freedom) + quantile(POWER, self.spread.freedom)
        return self.documents * (100 * t * self.spread.error / room) ** 2


def loss_of(pairs: Sequence[Pair]) -> Loss:
    """From the documents that a setting and the original were both asked; tasks whose answers have
    no scores are left out.
    """
    tasks: dict[str, list[Pair]] = {}
    for pair in pairs:
        tasks.setdefault(pair[0].task, []).append(pair)
    scored = {t: p for t, p in tasks.items() if not any(unscored(r) for x in p for r in x)}
    changes = [s.change for s in samples_of(scored).values()]
    value = 100 * intervals.average(changes)
    return Loss(value, intervals.of_changes(changes), sum(map(len, scored.values())))


def within(
    losses: Mapping[str, Sequence[Loss]], drop: float, confidence: float
) -> tuple[dict[str, float], float]:
    """Settings that lose less than ``drop`` points, all statements true together with this
    confidence (Holm's procedure on one-sided bounds).

    Args:
        losses: setting -> its loss on every model; it has to stay within the drop on each.
        drop: in points.
        confidence: of all statements together.

    Returns:
        Setting -> confidence of its own at which it was decided; and the confidence that any of the
        others would have to be shown with.
    """
    left = dict(losses)
    found: dict[str, float] = {}
    while left:
        own = 1 - (1 - confidence) / len(left)
        now = [s for s, each in left.items() if min(x.low(own) for x in each) > -drop]
        if not now:
            return found, own
        for s in now:
            del left[s]
            found[s] = own
    return found, confidence
