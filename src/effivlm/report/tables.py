"""Rows as a terminal table, Markdown and CSV; what they show is in `report.columns`."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from effivlm.report.column import plain
from effivlm.report.columns import columns, legend
from effivlm.report.rows import REALISED, Row, joined

WIDEST = 10_000  # columns; what a table would take if it were free


def notes(rows: Sequence[Row]) -> list[str]:
    """What could not be computed, and why."""
    return list(dict.fromkeys(n for r in rows for n in r.notes))


def terminal(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> list[Table]:
    """One rich table per model: what fits a terminal; the Markdown and CSV hold every column. The
    last one's caption explains the columns.
    """
    models = list(dict.fromkeys(r.model for r in rows))
    tables: list[Table] = []
    for model in models:
        mine = [r for r in rows if r.model == model]
        explained = _help(mine, axes) if model == models[-1] else []
        table = Table(
            title=f"{escape(model)}: quality (OP) and shares really kept, in percent of the"
            " uncompressed model",
            caption="\n".join([*map(escape, notes(mine)), *explained]) or None,
            caption_justify="left",
            header_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        shown = columns("terminal", mine, axes)
        for c in shown:
            align = "left" if c.left else "right"
            table.add_column(escape(c.heading("terminal")), justify=align, no_wrap=True)
        for row in mine:
            cells = [escape(c.cell(row, "terminal")) for c in shown]
            table.add_row(*cells, style="bold" if row.setting == "none" else None)
        tables.append(table)
    return tables


def fitting(rows: Sequence[Row], console: Console, axes: Sequence[str] = REALISED) -> list[Any]:
    """The tables of `terminal`; where one is wider than the console its rows as lines of words and
    numbers, so that no number is cut.
    """
    tables = terminal(rows, axes)
    wide = console.options.update(width=WIDEST)
    if all(Measurement.get(console, wide, t).maximum <= console.width for t in tables):
        return tables
    out: list[Any] = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        out.append(Text(f"\n{model}: quality (OP) and shares really kept, in percent", "bold"))
        for row in mine:
            cells = [(c.heading("terminal"), c.cell(row, "terminal")) for c in _shown(mine, axes)]
            said = [f"{name}\u00a0{cell}" for name, cell in cells[1:] if cell]
            out.append(Text(f"{row.setting}\n  " + "  ".join(said)))
        out += [Text(n) for n in notes(mine)]
    return out


def _shown(rows: Sequence[Row], axes: Sequence[str]) -> Sequence[Any]:
    return columns("terminal", rows, axes)


def _help(rows: Sequence[Row], axes: Sequence[str]) -> list[str]:
    found = legend("terminal", rows, axes)
    return [escape(f"{', '.join(names)}: {text}") for text, names in found.items()]


def markdown(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> str:
    """All columns as a Markdown table, then settings over all models, then notes."""
    shown = columns("markdown", rows, axes)
    titles = [c.heading("markdown") for c in shown]
    text = _grid(titles, [[c.cell(r, "markdown") for c in shown] for r in rows])
    over = joined(rows)
    if over:
        cells = [[j.setting, str(j.models), plain(j.op), plain(j.og)] for j in over]
        text += "\n" + _grid(["setting", "models", "mean OP", "OG over models"], cells)
    return text + "".join(f"\nNote: {n}.\n" for n in notes(rows))


def explained(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> str:
    """The columns of `markdown` and of `as_csv` (which has no place for it), as Markdown lists."""
    parts: list[str] = []
    for head, found in (
        ("Columns", legend("markdown", rows, axes)),
        ("Columns of table.csv", legend("csv", rows, axes)),
    ):
        parts.append(f"\n{head}:\n\n")
        for text, names in found.items():
            parts.append("- " + ", ".join(f"`{n}`" for n in names) + f": {text}\n")
    return "".join(parts)


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [titles, ["---"] * len(titles), *lines]
    return (
        "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in every)
        + "\n"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """All numbers with full precision; shares of the uncompressed model end in ``_share``."""
    shown = columns("csv", rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([c.heading("csv") for c in shown])
    writer.writerows([c.value(r) for c in shown] for r in rows)
    return out.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """All numbers of every row, by task too, with intervals; what is undefined is null, and
    ``infinite`` stands for documents that no number of would do.
    """
    return json.dumps([_plain(_record(r)) for r in rows], indent=1, ensure_ascii=False) + "\n"


def _record(row: Row) -> dict[str, Any]:
    found = row.comparison
    tasks = {
        t: asdict(x) | {n: getattr(x, n)._asdict() for n in ("score", "original", "difference")}
        for t, x in found.tasks.items()
    }
    return {
        "model": row.model,
        "setting": row.setting,
        "asked": row.asked,
        "documents": row.documents,
        "failures": row.failures,
        "op": found.op._asdict(),
        "ol": found.ol._asdict(),
        "og": found.og,
        "p": row.p,
        "decision": asdict(found.decision) | {"difference": found.decision.difference._asdict()},
        "flips": found.flips._asdict(),
        "tasks": {t: x | {"flips": found.tasks[t].flips._asdict()} for t, x in tasks.items()},
        "shares": row.shares,
        "costs": row.costs,
        "speed": {name: asdict(x) for name, x in row.speed.items()},
        "notes": row.notes,
    }


def _plain(value: object) -> Any:
    """Plain data that any JSON reader takes: NaN is null there."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast("Sequence[object]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "infinite" if value > 0 else None
    return value
