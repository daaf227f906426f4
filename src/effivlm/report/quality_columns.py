"""Columns of quality beside OP: the difference of scores, what it says to somebody who has to
choose, and what changed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from effivlm.metrics.comparison import MARGIN, Decision, Estimate
from effivlm.report.column import (
    ALL_BUT_TERMINAL,
    CSV,
    WIDE,
    Column,
    Several,
    plain,
)
from effivlm.report.rows import Row


def interval(bounds: tuple[float, float]) -> str:
    """Two ends with one decimal; ``-`` for NaN."""
    low, high = bounds
    return "-" if low != low else f"{low:.1f}-{high:.1f}"


def p_value(value: float) -> str:
    """Three decimals, and no smaller than they can say; ``-`` for NaN."""
    return "-" if value != value else "<.001" if value < 0.001 else f"{value:.3f}"


def _points(x: Estimate) -> str:
    if x.value != x.value:
        return "-"
    return f"{x.value:+.1f}" + (f" [{x.low:+.1f}, {x.high:+.1f}]" if x.low == x.low else "")


def _count(documents: float) -> str:
    """Documents, to two digits; ``-`` where no number of them would do."""
    return f"{float(f'{documents:.2g}'):.0f}" if documents < 1e7 else "-"


def _decision(row: Row) -> Decision:
    return row.comparison.decision


DIFFERENCE = (
    Column(
        "difference_interval",
        "difference",
        lambda r: _decision(r).difference,
        "score minus original score, mean over all tasks, points, with its 95 % interval",
        _points,
        WIDE,
        versus=True,
    ),
    Column(
        "difference",
        "difference",
        lambda r: _decision(r).difference.value,
        "score minus original score, mean over all tasks, points",
        shown=CSV,
    ),
    Column(
        "difference_low",
        "difference low",
        lambda r: _decision(r).difference.low,
        "lower end of the difference's 95 % interval",
        shown=CSV,
    ),
    Column(
        "difference_high",
        "difference high",
        lambda r: _decision(r).difference.high,
        "upper end of the difference's 95 % interval",
        shown=CSV,
    ),
)

DECISION = (
    Column(
        "loses_at_most",
        "loses at most",
        lambda r: _decision(r).at_most,
        "points lost at most, with 95 % confidence (one-sided, this setting looked at alone)",
        versus=True,
    ),
    Column(
        "as_good",
        f"loses < {MARGIN:g}",
        lambda r: _decision(r).as_good,
        f"whether less than {MARGIN:g} points are lost: yes and no are shown with 95 % confidence,"
        " open is neither",
        versus=True,
    ),
    Column(
        "resolves",
        "resolves",
        lambda r: _decision(r).resolves,
        "smallest true difference, in points, that this many documents would show 4 times of 5",
        versus=True,
    ),
    Column(
        "documents_needed",
        "needs",
        lambda r: _decision(r).needed,
        "documents that would show the observed difference 4 times of 5",
        _count,
        ALL_BUT_TERMINAL,
        versus=True,
    ),
    Column(
        "documents_needed_for_margin",
        f"needs for {MARGIN:g}",
        lambda r: _decision(r).needed_for_margin,
        f"documents that would show a difference of {MARGIN:g} points 4 times of 5",
        _count,
        ALL_BUT_TERMINAL,
        versus=True,
    ),
)


def _flips(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
    """Of all tasks, and in the CSV of every task."""
    for kind, what in (
        ("lost", "documents that went from right to wrong, or to a lower score"),
        ("gained", "documents that went from wrong to right, or to a higher score"),
        ("reworded", "documents answered otherwise, equally right or wrong"),
    ):
        yield Column(
            kind,
            kind,
            lambda r, k=kind: getattr(r.comparison.flips, k),
            what,
            plain,
            versus=True,
        )
        for task in dict.fromkeys(t for r in rows for t in r.comparison.tasks):
            yield Column(
                f"{task} {kind}",
                f"{task} {kind}",
                lambda r, t=task, k=kind: _of_task(r, t, k),
                what,
                shown=CSV,
            )


def _of_task(row: Row, task: str, kind: str) -> int | None:
    found = row.comparison.tasks.get(task)
    return getattr(found.flips, kind) if found else None


FLIPS = (Several(_flips),)
