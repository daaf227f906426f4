"""The columns of a report: one entry each, in `COLUMNS`; every table and legend goes through it.

To add a column, add an entry. `Row.pairs` holds the answers a value can be computed from::

    Column(
        key="tokens",
        title="tokens",
        value=lambda r: fmean(mine.new_tokens for mine, _ in r.pairs),
        help="tokens generated, mean over documents",
    )
"""

from collections.abc import Iterable, Sequence
from typing import Any

from effivlm.metrics.efficiency import Speedup
from effivlm.report.column import (
    CSV,
    EVERYWHERE,
    TABLES,
    WIDE,
    Column,
    Entry,
    Output,
    Several,
    percent,
)
from effivlm.report.quality_columns import DECISION, DIFFERENCE, FLIPS, interval, p_value
from effivlm.report.rows import AXES, COUNTED, REALISED, Row

HEADINGS = {
    "asked": "asked",
    "visual": "visual",
    "visual_mean": "visual mean",
    "prompt_kv": "KV",
    "kv_bytes": "KV bytes",
    "kv_bytes_held": "KV bytes held",
    "prefill_flops": "FLOPs",
    "decode_bytes_per_token": "decode bytes",
}


def _tasks(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
    for task in dict.fromkeys(t for r in rows for t in r.scores):
        yield Column(
            task,
            task,
            lambda r, t=task: r.scores.get(t),
            "the task's own score, percent",
        )


def _chosen(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
    """The chosen cost axes. The share at the last layer says little where a method cuts inside the
    LLM: the terminal shows the mean.
    """
    for axis in axes:
        if check_axis(axis) != "asked":  # a column of its own
            yield Column(
                f"{axis}_share",
                HEADINGS[axis],
                lambda r, a=axis: r.shares[a],
                _retained(axis),
                percent,
                shown=WIDE if axis == "visual" else TABLES,
                short=(
                    HEADINGS[axis].removesuffix(" mean"),
                    lambda share: percent(share).replace(" ", ""),
                ),
            )


def _every(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
    """All cost axes, and what they are shares of."""
    for axis in AXES:
        yield Column(
            f"{axis}_share",
            HEADINGS[axis],
            lambda r, a=axis: r.shares[a],
            _retained(axis),
            shown=CSV,
        )
    for axis in COUNTED:
        help = f"{AXES[axis]}, mean over documents"
        yield Column(axis, HEADINGS[axis], lambda r, a=axis: r.costs[a], help, shown=CSV)


def _retained(axis: str) -> str:
    if axis == "asked":
        return "the share asked for, where it is one"
    return f"share kept, counted in the tensors: {AXES[axis]}"


def _speeds(rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
    """Speed-ups by workload and stage; the workload is named only where there are several."""
    speeds = list(dict.fromkeys(s for r in rows for s in r.speed))
    alone = len({s.rpartition(" ")[0] for s in speeds}) == 1
    for name in speeds:
        title = f"OE {name.rpartition(' ')[2] if alone else name}"
        yield Column(
            name,
            title,
            lambda r, n=name: r.speed.get(n),
            "measured speed-up, median of paired samples with its 95 % interval",
            _speedup,
            shown=TABLES,
            short=(title, lambda speed: _speedup(speed).partition(" ")[0]),
            versus=True,
        )
        for key, attribute, what in (
            ("speedup", "ratio", "measured speed-up, median of paired samples"),
            ("low", "low", "lower end of a speed-up's 95 % interval"),
            ("high", "high", "upper end of a speed-up's 95 % interval"),
            ("pairs", "pairs", "pairs of samples behind a speed-up"),
        ):
            yield Column(
                f"{name} {key}",
                title,
                lambda r, n=name, a=attribute: getattr(r.speed.get(n), a, None),
                what,
                shown=CSV,
            )


def _speedup(speed: Speedup | None) -> str:
    return f"{speed.ratio:.2f}x [{speed.low:.2f}-{speed.high:.2f}]" if speed else "-"


COLUMNS: list[Entry] = [
    Column("model", "model", lambda r: r.model, "the model"),
    Column(
        "setting",
        "setting",
        lambda r: r.setting,
        "the methods applied, with their budgets",
        shown=EVERYWHERE,
        left=True,
    ),
    Column("asked", "asked", lambda r: r.asked, "the budgets as written"),
    Several(_chosen),
    Several(_tasks),
    Column(
        "op",
        "OP",
        lambda r: r.op,
        "root mean square over tasks of score / original score, percent",
        shown=EVERYWHERE,
    ),
    Column(
        "op_interval",
        "95 %",
        lambda r: (r.low, r.high),
        "interval of OP over documents, those that share pictures taken together",
        interval,
        TABLES,
    ),
    Column("op_low", "OP low", lambda r: r.low, "lower end of OP's 95 % interval", shown=CSV),
    Column("op_high", "OP high", lambda r: r.high, "upper end of OP's 95 % interval", shown=CSV),
    *DIFFERENCE,
    Column(
        "ol",
        "OL",
        lambda r: r.ol,
        "agreement with the original model's own answers, percent",
        shown=EVERYWHERE,
    ),
    Column("ol_low", "OL low", lambda r: r.ol_low, "lower end of OL's 95 % interval", shown=CSV),
    Column("ol_high", "OL high", lambda r: r.ol_high, "upper end of OL's 95 % interval", shown=CSV),
    Column(
        "og",
        "OG",
        lambda r: r.og,
        "spread of the ratio over tasks, percent (lower is more even)",
    ),
    *DECISION,
    *FLIPS,
    Several(_every),
    Several(_speeds),
    Column(
        "p",
        "p",
        lambda r: r.p,
        "paired exact sign-flip test against none, Holm-corrected",
        p_value,
        EVERYWHERE,
        versus=True,
    ),
    Column("documents", "documents", lambda r: r.documents, "documents compared", shown=CSV),
    Column("failures", "failures", lambda r: r.failures, "documents without an answer", shown=CSV),
    Column(
        "failed",
        "failed",
        lambda r: f"{r.failures}/{r.documents}",
        "documents without an answer; they score 0",
        shown=TABLES,
        alarm=lambda r: r.failures > 0,
    ),
]


def check_axis(axis: str) -> str:
    """The axis itself.

    Raises:
        KeyError: for an unknown axis.
    """
    if axis not in AXES:
        raise KeyError(f"unknown cost axis {axis!r}: expected one of {', '.join(AXES)}")
    return axis


def columns(
    where: Output, rows: Sequence[Row], axes: Sequence[str] = REALISED
) -> list[Column[Any]]:
    """What an output shows of these rows, with the chosen cost axes.

    Raises:
        KeyError: for an unknown axis.
    """
    every = (c for entry in COLUMNS for c in entry.columns(rows, axes))
    return [c for c in every if where in c.shown]


def legend(
    where: Output, rows: Sequence[Row], axes: Sequence[str] = REALISED
) -> dict[str, list[str]]:
    """Help sentence -> the headings it explains, in their order."""
    out: dict[str, list[str]] = {}
    for c in columns(where, rows, axes):
        out.setdefault(c.help, []).append(c.heading(where))
    return out
