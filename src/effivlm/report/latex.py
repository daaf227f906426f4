"""Rows as LaTeX for the package booktabs: one block a model, the best of every quality in bold."""

from collections.abc import Sequence
from typing import Any

from effivlm.report.column import Column
from effivlm.report.columns import columns
from effivlm.report.page.data import is_quality
from effivlm.report.rows import REALISED, Row
from effivlm.report.tables import notes

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(c, c) for c in text)


def table(rows: Sequence[Row], axes: Sequence[str] = REALISED) -> str:
    r"""A ``tabular`` to be read with ``\input``; the columns are those of the Markdown table but
    the model, which heads its rows. Best is the highest number of a model as printed, the original
    apart; ties are all bold.
    """
    shown = [c for c in columns("markdown", rows, axes) if c.key != "model"]
    align = "".join("l" if c.left else "r" for c in shown)
    lines = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines.append(_line([escaped(c.heading("markdown")) for c in shown]))
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        lines += [r"\midrule", rf"\multicolumn{{{len(shown)}}}{{l}}{{{escaped(model)}}} \\"]
        best = [_best(c, mine, rows) for c in shown]
        lines += [
            _line([_cell(c, r, top) for c, top in zip(shown, best, strict=True)]) for r in mine
        ]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines + [f"% Note: {n}." for n in notes(rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _best(column: Column[Any], mine: Sequence[Row], rows: Sequence[Row]) -> str | None:
    """The text of the highest number under a setting, or None where there is nothing to compare."""
    if not is_quality(column, rows):
        return None
    found = [(column.value(r), column.cell(r, "markdown")) for r in mine if r.setting != "none"]
    numbers = [(v, text) for v, text in found if v is not None and v == v]
    return max(numbers)[1] if len(numbers) > 1 else None


def _cell(column: Column[Any], row: Row, best: str | None) -> str:
    text = column.cell(row, "markdown")
    if best is not None and text == best and row.setting != "none":
        return rf"\textbf{{{escaped(text)}}}"
    return escaped(text)
