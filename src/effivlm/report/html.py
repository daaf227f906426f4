"""One self-contained HTML page: tables and figures, from records only."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effivlm.report.tables import Row, cells, header

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #444; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
tr.none td { font-weight: 600; background: #f5f5f5; }
img { max-width: 100%; } code { background: #f2f2f2; padding: 1px 4px; }
"""
EXPLAIN = """<p><b>OP</b>: root mean square over tasks of score / original score, percent, with a 95 % bootstrap interval over documents.
<b>OL</b>: agreement with the original model's own answers. <b>OG</b>: spread of the ratio over tasks (lower is more even).
<b>visual</b>, <b>visual mean</b>, <b>KV</b>: shares really retained, counted in the tensors. <b>p</b>: paired sign-flip test against
<code>none</code>, Holm-corrected. Failed documents score 0.</p>"""


def page(title: str, rows: Sequence[Row], figures: Sequence[Path], environment: dict[str, Any]) -> str:
    """The page as text."""
    titles = header(rows)
    tasks = titles[2 : titles.index("OP")]
    head = "".join(f"<th>{html.escape(t)}</th>" for t in titles)
    body = "".join(_row(r, tasks) for r in rows)
    pictures = "".join(f'<img alt="{html.escape(f.stem)}" src="data:image/png;base64,{base64.b64encode(f.read_bytes()).decode()}">' for f in figures)
    facts = ", ".join(f"{k}: {v}" for k, v in environment.items())
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
            f"<h1>{html.escape(title)}</h1>{pictures}{EXPLAIN}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p><small>{html.escape(facts)}</small></p></html>\n")  # fmt: skip


def _row(row: Row, tasks: Sequence[str]) -> str:
    mark = ' class="none"' if row.setting == "none" else ""
    return f"<tr{mark}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row, tasks)) + "</tr>"
