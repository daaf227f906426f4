"""What the page is given: rows, columns and axes as plain data, for JSON.

Columns come from the list that every table goes through (`report.columns`), so what is added there
is on the page, as a column and, where it is a number, as an axis.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from effivlm import outline
from effivlm.metrics.efficiency import Speedup
from effivlm.report.column import Column
from effivlm.report.columns import columns
from effivlm.report.figures import method_of
from effivlm.report.rows import AXES, COUNTED, Row, joined
from effivlm.report.tables import notes

STAGE_NAMES = {
    "processing": "in the processor",
    "pre_encoder": "before the encoder",
    "encoder": "in the encoder",
    "pre_llm": "before the LLM",
    "intra_llm": "in the LLM",
    "kv_cache": "KV cache",
}
COMBINED, OTHER = "combined", "other"
# numbers that are no quality, whatever column they stand in
NO_QUALITY = {*COUNTED, *(f"{a}_share" for a in AXES), "p", "og", "documents", "failures"}
HIDDEN = ("asked", "og")  # columns that the page shows when asked


def page_data(title: str, rows: Sequence[Row], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the documents."""
    stages = {n: s for n, (s, _) in outline.methods().items()}
    tasks = {t for r in rows for t in r.scores}  # last: they are many, and OP sums them up
    shown = sorted(columns("html", rows), key=lambda c: c.key in tasks)
    alone = len({r.model for r in rows}) == 1
    csv = columns("csv", rows)
    qualities = {c.key: c for c in csv if is_quality(c, rows)}
    return {
        "title": title,
        "environment": {k: words(v) for k, v in environment.items()},
        "notes": notes(rows),
        "columns": [_column(c, alone) for c in shown],
        "rows": [_row(r, shown, stages, csv, qualities) for r in rows],
        "costs": _costs(rows),
        "qualities": {key: f"{c.title}: {c.help}" for key, c in qualities.items()},
        "joined": [
            {"setting": j.setting, "models": j.models, "op": j.op, "og": j.og} for j in joined(rows)
        ],
    }


def _column(column: Column[Any], one_model: bool) -> dict[str, Any]:
    hidden = column.key in HIDDEN or (one_model and column.key == "model")
    return {
        "key": column.key,
        "title": column.heading("html"),
        "help": column.help,
        "left": column.left or column.key in ("model", "setting"),
        "hidden": hidden,
    }


def _row(
    row: Row,
    shown: Sequence[Column[Any]],
    stages: Mapping[str, Sequence[str]],
    csv: Sequence[Column[Any]],
    qualities: Mapping[str, Column[Any]],
) -> dict[str, Any]:
    bounds = {c.key: c for c in csv}
    measures: dict[str, list[Any]] = {f"{a}_share": [100 * row.shares[a]] for a in AXES}
    measures |= {
        f"time {name}": [100 / s.ratio, 100 / s.high, 100 / s.low]
        for name, s in row.speed.items()
        if s.ratio and s.high and s.low
    }
    for key, column in qualities.items():
        ends = [bounds[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in bounds]
        measures[key] = [c.value(row) for c in (column, *ends)]
    return {
        "model": row.model,
        "setting": row.setting,
        "method": "none" if row.setting == "none" else method_of(row.setting),
        "stages": stages_of(row.setting, stages),
        "cells": [_cell(c, row) for c in shown],
        "measures": measures,
    }


def _cell(column: Column[Any], row: Row) -> dict[str, Any]:
    """Text, a number to sort by, the ends of an interval, and whether it is an alarm."""
    text, value = column.cell(row, "html"), column.value(row)
    out: dict[str, Any] = {"text": text}
    if isinstance(value, Speedup):
        out |= {"value": value.ratio, "low": value.low, "high": value.high}
    elif isinstance(value, int | float):
        out["value"] = value
    elif isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) == 2:
        out |= dict(zip(("low", "high"), cast("tuple[float, float]", value), strict=True))
        out["value"] = out["low"]
    if column.alarm(row):
        out["alarm"] = True
    return out


def is_quality(column: Column[Any], rows: Sequence[Row]) -> bool:
    """Whether a column holds numbers of which more is better."""
    if column.key in NO_QUALITY or column.key.endswith(("_low", "_high")):
        return False
    if any(column.key.startswith(f"{name} ") for r in rows for name in r.speed):
        return False
    return all(isinstance(column.value(r), float | None) for r in rows) and any(
        column.value(r) is not None for r in rows
    )


def _costs(rows: Sequence[Row]) -> dict[str, str]:
    out = {f"{axis}_share": f"{what}, % of the original" for axis, what in AXES.items()}
    for name in dict.fromkeys(n for r in rows for n in r.speed):
        out[f"time {name}"] = f"measured time, % of the original: {name}"
    return out


def stages_of(setting: str, stages: Mapping[str, Sequence[str]]) -> list[str]:
    """Where a setting acts, in words; ``combined`` beside them where it has several parts."""
    if setting == "none":
        return []
    parts = setting.split(" + ")
    names = [re.split(r"[@:(]", part.strip())[0] for part in parts]
    found = [STAGE_NAMES[s] for n in names for s in stages.get(n, ())] or [OTHER]
    return list(dict.fromkeys(found + ([COMBINED] if len(parts) > 1 else [])))


def words(value: Any) -> str:
    """A fact of the environment on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in cast("dict[str, Any]", value).items())
    if isinstance(value, list):
        return "; ".join(words(v) for v in cast("list[Any]", value))
    return str(value)


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: no tag can begin in it, and NaN is null."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return round(data, 4) if math.isfinite(data) else None
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in cast("dict[str, Any]", data).items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in cast("Sequence[Any]", data)]
    return data
