"""One self-contained HTML page: figures and tables, from rows only."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from effivlm.report.column import Column
from effivlm.report.columns import columns, legend
from effivlm.report.rows import Row, joined
from effivlm.report.tables import notes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 1400px; padding: 0 1rem; color: #222; background: #fff; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #444; }
       td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.none td { font-weight: 600; background: #f5f5f5; } td.failed { color: #b00020; font-weight:
       600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } code { background: #f2f2f2;
       padding: 1px 4px; }
"""


def page(
    title: str, rows: Sequence[Row], figures: Sequence[Path], environment: dict[str, Any]
) -> str:
    """The page as text; pictures are inside it."""
    shown = columns("html", rows)
    titles = "".join(f"<th>{html.escape(c.heading('html'))}</th>" for c in shown)
    body = "".join(_row(r, shown) for r in rows)
    remarks = "".join(f"<p>Note: {html.escape(n)}.</p>" for n in notes(rows))
    facts = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(_plain(v))}</td></tr>"
        for k, v in environment.items()
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    parts = [
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>',
        *(_figure(f) for f in figures),
        f'{_legend(rows)}<div class="scroll"><table><thead><tr>{titles}</tr></thead>',
        f"<tbody>{body}</tbody></table></div>",
        _joined(rows) + remarks,
        '<h2>Environment</h2><div class="scroll">',
        f"<table><tbody>{facts}</tbody></table></div></body></html>\n",
    ]
    return "".join(parts)


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></figure>'
    )


def _legend(rows: Sequence[Row]) -> str:
    parts: list[str] = []
    for text, names in legend("html", rows).items():
        titles = ", ".join(f"<b>{html.escape(n)}</b>" for n in names)
        parts.append(f"{titles}: {html.escape(text)}.")
    return f"<p>{' '.join(parts)}</p>"


def _row(row: Row, shown: Sequence[Column[Any]]) -> str:
    marked = (
        (' class="failed"' if c.alarm(row) else "", html.escape(c.cell(row, "html"))) for c in shown
    )
    inside = "".join(f"<td{mark}>{text}</td>" for mark, text in marked)
    mark = ' class="none"' if row.setting == "none" else ""
    return f"<tr{mark}>{inside}</tr>"


def _joined(rows: Sequence[Row]) -> str:
    over = joined(rows)
    if not over:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(j.setting)}</td><td>{j.models}</td>"
        f"<td>{j.op:.1f}</td><td>{j.og:.1f}</td></tr>"
        for j in over
    )
    head = "<tr><th>setting</th><th>models</th><th>mean OP</th><th>OG over models</th></tr>"
    return f"<h2>Over all models</h2><table><thead>{head}</thead><tbody>{lines}</tbody></table>"


def _plain(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{k} {v}" for k, v in cast("dict[str, Any]", value).items())
