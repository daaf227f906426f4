"""Figures from rows: quality against retained share, a line per method, a panel per model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effivlm.files.writing import appendable
from effivlm.metrics.front import pareto
from effivlm.records import StoreError
from effivlm.report.columns import check_axis
from effivlm.report.rows import AXES, Row

# Okabe-Ito and Tol palettes: told apart under the common colour blindnesses; the marks tell them
# apart without colour
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999933",
    "#882255",
    "#44AA99",
)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
STROKES = ("-", "--", ":", "-.")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
KINDS = ("png", "svg", "pdf")
DOTS = 200  # an inch, of PNGs
DECADE = 8  # spread of shares from which the axis is logarithmic


def trade_off(rows: Sequence[Row], path: Path, axis: str = "prompt_kv") -> list[Path]:
    """Draw OP with intervals against a share of the uncompressed model; ringed points are on the
    Pareto front.

    Settings without a number on the axis (``asked`` of a combination, say) are named in the panel.

    Args:
        rows: to be drawn.
        path: the files', but for the ending.
        axis: see `report.rows.AXES`.

    Returns:
        The files, one of each of `KINDS`; SVG and PDF hold text as text.

    Raises:
        ImportError: naming the extra to install. KeyError: for an unknown axis.
    """
    check_axis(axis)
    models = list(dict.fromkeys(r.model for r in rows))
    methods = list(dict.fromkeys(method_of(r.setting) for r in rows if r.setting != "none"))
    figure = blank((6.4 * len(models) + 2.4, max(5.2, 0.24 * len(methods) + 1)))
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models, strict=True):
        mine = [r for r in rows if r.model == model and r.setting != "none"]
        points = [r for r in mine if r.shares[axis] == r.shares[axis] and r.op == r.op]
        for i, method in enumerate(methods):
            line = sorted(
                (r for r in points if method_of(r.setting) == method), key=lambda r: r.shares[axis]
            )
            if line:
                _line(panel, line, method, i, axis)
        _front(panel, points, axis)
        _frame(panel, model, axis, points, [r.setting for r in mine if r not in points])
    panels[0].set_ylabel("OP (% of the uncompressed model)")
    handles = {
        label: handle
        for p in panels
        for handle, label in zip(*p.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    return saved(figure, path)


def saved(figure: Any, path: Path) -> list[Path]:
    """The figure as a file of each of `KINDS`; without dates, so that equal figures are equal."""
    from matplotlib import rc_context  # pyright: ignore[reportUnknownVariableType]  # as `blank`

    undated: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    out = [path.with_suffix(f".{kind}") for kind in KINDS]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "pdf.fonttype": 42}):
        for file, kind in zip(out, KINDS, strict=True):
            appendable(file, StoreError)
            figure.savefig(file, dpi=DOTS, metadata=undated.get(kind))
            figure.set_layout_engine("none")  # found once, for all
    return out


def blank(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of ``size`` inches, open in type: matplotlib's are partly unknown.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=size, layout="constrained")


def method_of(setting: str) -> str:
    """A setting without its budgets: what one line of the figure joins."""
    parts = [p.strip() for p in setting.split("+")]
    return " + ".join(
        p.partition(":")[0].partition("@")[0] + (":" + p.partition(":")[2] if ":" in p else "")
        for p in parts
    )


def _spread(points: Sequence[Row], axis: str) -> float:
    shares = [r.shares[axis] for r in points if r.shares[axis] > 0]
    return max(shares) / min(shares) if shares else 1.0


def _line(panel: Any, rows: Sequence[Row], method: str, i: int, axis: str) -> None:
    x, y = [100 * r.shares[axis] for r in rows], [r.op for r in rows]
    error = [[max(0.0, r.op - r.low) for r in rows], [max(0.0, r.high - r.op) for r in rows]]
    turn = i // len(COLOURS)  # colours come round again with another stroke and another mark
    look = {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKS[(i + turn) % len(MARKS)],
        "linestyle": STROKES[turn % len(STROKES)],
    }
    panel.errorbar(
        x,
        y,
        yerr=error,
        label=method,
        markersize=5,
        linewidth=1.4,
        elinewidth=0.8,
        capsize=2,
        alpha=0.9,
        **look,
    )


def _front(panel: Any, points: Sequence[Row], axis: str) -> None:
    front = pareto([r.shares[axis] for r in points], [r.op for r in points])
    chosen = [r for r, on in zip(points, front, strict=True) if on]
    panel.scatter(
        [100 * r.shares[axis] for r in chosen],
        [r.op for r in chosen],
        s=120,
        facecolors="none",
        edgecolors="#333333",
        linewidths=1.1,
        zorder=5,
        label="Pareto front",
    )


def _frame(
    panel: Any, model: str, axis: str, points: Sequence[Row], left_out: Sequence[str]
) -> None:
    panel.axhline(100, color="#777777", linewidth=0.9, linestyle=(0, (1, 2)))
    panel.set_title(model, fontsize=11)
    panel.set_xlabel(f"{AXES[axis]} (% of the uncompressed model)")
    panel.grid(alpha=0.25)
    if _spread(points, axis) >= DECADE:
        shares = [100 * r.shares[axis] for r in points]
        panel.set_xscale("log")
        ticks = [t for t in TICKS if 0.7 * min(shares) <= t <= 1.4 * max(shares)]
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.set_xticks([], minor=True)
    if left_out:
        text = f"not on this axis: {', '.join(left_out[:3])}" + (
            f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        )
        panel.text(0.01, 0.01, text, transform=panel.transAxes, fontsize=8, color="#555555")
