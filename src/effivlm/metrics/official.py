"""Official numbers of a benchmark, where they are not what its documents' scores join to."""

from collections.abc import Mapping
from dataclasses import replace

from effivlm.metrics.comparison import Comparison, Estimate, TaskComparison
from effivlm.metrics.flips import Flips
from effivlm.metrics.generalization import generalization
from effivlm.metrics.intervals import NAN
from effivlm.metrics.performance import overall


def with_official(found: Comparison, official: Mapping[str, tuple[float, float]]) -> Comparison:
    """A comparison in which official numbers stand in place of those that documents join to.

    They have no interval, and neither has an OP that held or holds one of their tasks; a task whose
    numbers are void (NaN), or whose original scores nothing or is no better than a blind guess,
    does not enter OP.

    Args:
        found: from documents.
        official: task -> numbers of setting and original, as shares of a perfect score.
    """
    other = {
        t: _task(found.tasks.get(t), *n) for t, n in official.items() if not _same(found, t, n)
    }
    if not other:
        return found
    tasks = {**found.tasks, **other}
    rated = [t for t, x in tasks.items() if x.rated]
    moved = any(x.rated or (t in found.tasks and found.tasks[t].rated) for t, x in other.items())
    op = (
        overall(
            {t: tasks[t].score.value for t in rated}, {t: tasks[t].original.value for t in rated}
        )
        if rated
        else NAN
    )
    noted = "official numbers that single documents do not join to have no interval"
    return replace(
        found,
        tasks=tasks,
        op=Estimate(op, NAN, NAN) if moved else found.op,
        og=generalization([{t: tasks[t].ratio for t in rated}]) if rated else NAN,
        notes=(*found.notes, f"{noted}: {', '.join(sorted(other))}"),
    )


def _same(found: Comparison, task: str, numbers: tuple[float, float]) -> bool:
    if task not in found.tasks:
        return False
    ours = found.tasks[task].score.value, found.tasks[task].original.value
    return all(abs(a - 100 * b) < 1e-7 for a, b in zip(ours, numbers, strict=True))


def _task(old: TaskComparison | None, mine: float, base: float) -> TaskComparison:
    known = base > 0 and mine == mine
    rated = known and (old is None or old.rated)  # no better than a blind guess stays so
    unknown = TaskComparison(
        documents=0,
        units=0,
        score=Estimate(100 * mine, NAN, NAN),
        original=Estimate(100 * base, NAN, NAN),
        difference=Estimate(100 * (mine - base), NAN, NAN),
        guess=NAN,
        rated=rated,
        ratio=mine / base if rated else NAN,
        p=NAN,
        flips=Flips(0, 0, 0, 0),
    )
    if old is None:
        return unknown
    return replace(unknown, documents=old.documents, units=old.units, p=old.p, flips=old.flips)
