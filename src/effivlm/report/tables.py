"""Rows as a terminal table, Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from effivlm.report.rows import AXES, COUNTED, Row, joined

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
REALISED = ("visual", "visual_mean", "prompt_kv")


@dataclass(frozen=True)
class Column:
    """A column: its title and one row's cell. ``short``: title and cell in the terminal, or None
    where it is left out.
    """

    title: str
    cell: Callable[[Row], str]
    short: tuple[str, Callable[[Row], str]] | None = None


def _always(title: str, cell: Callable[[Row], str]) -> Column:
    return Column(title, cell, (title, cell))


def columns(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> list[Column]:
    """What a table shows, with the chosen cost axes.

    Raises:
        KeyError: for an unknown axis.
    """
    for axis in axes:
        check_axis(axis)
    tasks = dict.fromkeys(t for r in rows for t in r.scores)
    speeds = dict.fromkeys(s for r in rows for s in r.speed)
    return [
        Column("model", lambda r: r.model),
        _always("setting", lambda r: r.setting),
        Column("asked", lambda r: r.asked),
        *(_share(a) for a in axes if a != "asked"),
        *(Column(t, lambda r, t=t: _number(r.scores.get(t))) for t in tasks),
        _always("OP", lambda r: _number(r.op)),
        _always("95 %", lambda r: _interval(r.low, r.high)),
        _always("OL", lambda r: _number(r.ol)),
        Column("OG", lambda r: _number(r.og)),
        *(_oe(s, speeds) for s in speeds),
        _always(
            "p", lambda r: "" if r.setting == "none" else "<.001" if r.p < 0.001 else f"{r.p:.3f}"
        ),
        _always("failed", lambda r: f"{r.failures}/{r.documents}"),
    ]


def _share(axis: str) -> Column:
    def cell(row: Row) -> str:
        return _percent(row.shares[axis])

    def short(row: Row) -> str:
        return cell(row).replace(" ", "")

    # the share at the last layer says little where a method cuts inside the LLM: the terminal shows
    # the mean
    return Column(
        HEADINGS[axis],
        cell,
        None if axis == "visual" else (HEADINGS[axis].removesuffix(" mean"), short),
    )


def _oe(speed: str, speeds: dict[str, None]) -> Column:
    title = f"OE {_short(speed, speeds)}"
    return Column(
        title, lambda r: _speed(r, speed), (title, lambda r: _speed(r, speed).partition(" ")[0])
    )


def check_axis(axis: str) -> str:
    """The axis itself.

    Raises:
        KeyError: for an unknown axis.
    """
    if axis not in AXES:
        raise KeyError(f"unknown cost axis {axis!r}: expected one of {', '.join(AXES)}")
    return axis


def _short(speed: str, speeds: dict[str, None]) -> str:
    """The workload is named only where there are several."""
    workload, _, stage = speed.rpartition(" ")
    return stage if len({s.rpartition(" ")[0] for s in speeds}) == 1 else f"{workload} {stage}"


def _number(value: float | None) -> str:
    return "" if value is None else "-" if value != value else f"{value:.1f}"


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f} %"


def _interval(low: float, high: float) -> str:
    return "-" if low != low else f"{low:.1f}-{high:.1f}"


def _speed(row: Row, name: str) -> str:
    if row.setting == "none" or name not in row.speed:
        return "" if row.setting == "none" else "-"
    s = row.speed[name]
    return f"{s.ratio:.2f}x [{s.low:.2f}-{s.high:.2f}]"


def notes(rows: Sequence[Row]) -> list[str]:
    """What could not be computed, and why."""
    return list(dict.fromkeys(n for r in rows for n in r.notes))


def terminal(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> list[Table]:
    """One rich table per model: what fits a terminal; the Markdown and CSV hold every column."""
    tables: list[Table] = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        title = (
            f"{model}: quality (OP) and shares really kept, in percent of the uncompressed model"
        )
        caption = "\n".join(notes(mine)) or None
        table = Table(
            title=title,
            caption=caption,
            header_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        shown = [c.short for c in columns(mine, axes) if c.short]
        for title, _ in shown:
            table.add_column(title, justify="left" if title == "setting" else "right", no_wrap=True)
        for row in mine:
            table.add_row(
                *(cell(row) for _, cell in shown), style="bold" if row.setting == "none" else None
            )
        tables.append(table)
    return tables


def markdown(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> str:
    """All columns as a Markdown table, then settings over all models, then notes."""
    shown = columns(rows, axes)
    text = _grid([c.title for c in shown], [[c.cell(r) for c in shown] for r in rows])
    over = joined(rows)
    if over:
        cells = [[j.setting, str(j.models), _number(j.op), _number(j.og)] for j in over]
        text += "\n" + _grid(["setting", "models", "mean OP", "OG over models"], cells)
    return text + "".join(f"\nNote: {n}.\n" for n in notes(rows))


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [titles, ["---"] * len(titles), *lines]
    return (
        "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in every)
        + "\n"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """All numbers with full precision; shares of the uncompressed model end in ``_share``."""
    tasks = list(dict.fromkeys(t for r in rows for t in r.scores))
    speeds = list(dict.fromkeys(s for r in rows for s in r.speed))
    quality = ["op", "low", "high", "ol", "ol_low", "ol_high", "og"]
    timed = [f"{s} {x}" for s in speeds for x in ("speedup", "low", "high", "pairs")]
    titles = [
        "model",
        "setting",
        "asked",
        *tasks,
        "op",
        "op_low",
        "op_high",
        *quality[3:],
        *(f"{a}_share" for a in AXES),
        *COUNTED,
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*titles, *timed, "p", "documents", "failures"])
    for r in rows:
        first = [
            r.model,
            r.setting,
            r.asked,
            *(r.scores.get(t, "") for t in tasks),
            *(getattr(r, q) for q in quality),
        ]
        costs = [*(r.shares[a] for a in AXES), *(r.costs[k] for k in COUNTED)]
        speed = [
            x
            for s in map(r.speed.get, speeds)
            for x in ((s.ratio, s.low, s.high, s.pairs) if s else ("",) * 4)
        ]
        writer.writerow([*first, *costs, *speed, r.p, r.documents, r.failures])
    return out.getvalue()
