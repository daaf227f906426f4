"""Documents as independent units: the clusters of a comparison, and what each says of a score.

Documents that depend on each other (one picture, five questions) are one unit. A unit's
*pseudo-value* of a score is the score plus what leaving the unit out takes from it, times the
number of the other units: for a mean over equal units, the unit's own mean. Intervals are computed
from pseudo-values, whatever the metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effivlm.metrics.loyalty import agreement, loyal_pairs
from effivlm.metrics.metric import Array, Join, mean
from effivlm.metrics.performance import Pair, metric_of, values

Units = NDArray[np.intp]


@dataclass(frozen=True)
class Part:
    """What the units of one task say, one value a unit.

    Attributes:
        values: [m] pseudo-values. units: [m] numbers of the units; tasks that share pictures share
            numbers.
    """

    values: Array
    units: Units


def cluster_of(pair: Pair) -> tuple[str, str]:
    """What a document is drawn together with; its own name where nothing is."""
    mine, base = pair
    shared = mine.cluster or base.cluster
    return ("", shared) if shared else (base.task, base.document)


def units_of(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Units]:
    """[n] number of every document's unit, by task; one picture has one number in all tasks."""
    known: dict[tuple[str, str], int] = {}
    return {
        t: np.array([known.setdefault(cluster_of(x), len(known)) for x in p], dtype=np.intp)
        for t, p in pairs.items()
    }


def pseudo_values(rows: Array, units: Units, join: Join = mean) -> Part:
    """Pseudo-values of ``join`` of the means of ``rows``.

    Args:
        rows: [n, c] numbers of documents.
        units: [n] their units.
        join: from means [..., c] to the score [...].
    """
    numbers, member, sizes = np.unique(units, return_inverse=True, return_counts=True)
    sums = np.stack(
        [np.bincount(member, weights=column, minlength=len(numbers)) for column in rows.T], axis=1
    )
    score = float(join(rows.mean(0)))
    if len(numbers) == 1:
        return Part(np.full(1, score), numbers)
    without = (rows.sum(0) - sums) / (len(rows) - sizes)[:, None]
    step = (len(numbers) - 1) * (score - np.asarray(join(without), dtype=np.float64))
    return Part(score + step - step.mean(), numbers)


@dataclass(frozen=True)
class Sample:
    """One task under one setting and under the original, by units.

    Attributes:
        mine, base: scores. documents: how many.
    """

    mine: Part
    base: Part
    documents: int

    @property
    def change(self) -> Part:
        """The setting minus the original."""
        return Part(self.mine.values - self.base.values, self.mine.units)


def samples_of(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Sample]:
    """Samples of scored documents, by task."""
    return {t: _sample(pairs[t], units) for t, units in units_of(pairs).items()}


def _sample(pairs: Sequence[Pair], units: Units) -> Sample:
    mine, base = [x for x, _ in pairs], [y for _, y in pairs]
    join = metric_of(base).join
    return Sample(
        pseudo_values(values(mine), units, join),
        pseudo_values(values(base), units, join),
        len(pairs),
    )


def agreed_of(pairs: Sequence[Pair], units: Units) -> Part | None:
    """Agreement with the original's answers, by units."""
    kept = [not base.failed for _, base in pairs]
    agreed = [[agreement(x, y)] for x, y in loyal_pairs(pairs)]
    return pseudo_values(np.array(agreed), units[kept]) if agreed else None
