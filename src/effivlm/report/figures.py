"""Figures from rows: quality against retained share, a line per method, a panel per model."""

from collections.abc import Sequence
from pathlib import Path

from effivlm.metrics.intervals import pareto
from effivlm.report.tables import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
AXES = {
    "visual_mean": "visual tokens retained, mean over layers (%)",
    "visual": "visual tokens retained at the last layer (%)",
    "prompt_kv": "prompt KV entries retained (%)",
}


def trade_off(rows: Sequence[Row], path: Path, axis: str = "prompt_kv") -> None:
    """Write a PNG of OP with intervals against a realised share; ringed points are on the Pareto front.

    Raises:
        ImportError: naming the extra to install. KeyError: for an unknown axis.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'effivlm[plot]'") from None
    models = list(dict.fromkeys(r.model for r in rows))
    figure = Figure(figsize=(7.2 * len(models), 5.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    methods = list(dict.fromkeys(method_of(r.setting) for r in rows if r.setting != "none"))
    for panel, model in zip(panels, models, strict=True):
        mine = [r for r in rows if r.model == model]
        for i, method in enumerate(methods):
            _line(panel, sorted((r for r in mine if method_of(r.setting) == method), key=lambda r: getattr(r, axis)), method, i, axis)
        _frame(panel, mine, model, axis)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def method_of(setting: str) -> str:
    """A setting without its budgets: what one line of the figure joins."""
    parts = [p.strip() for p in setting.split("+")]
    return " + ".join(p.partition("@")[0] + (":" + p.partition(":")[2] if ":" in p else "") for p in parts)


def _line(panel: object, rows: Sequence[Row], method: str, i: int, axis: str) -> None:
    x = [100 * getattr(r, axis) for r in rows]
    y = [r.op for r in rows]
    error = [[max(0.0, r.op - r.low) for r in rows], [max(0.0, r.high - r.op) for r in rows]]
    panel.errorbar(x, y, yerr=error, label=method, color=COLOURS[i % len(COLOURS)], marker=MARKS[i % len(MARKS)],  # type: ignore[attr-defined]
                   linestyle="-" if i < len(COLOURS) else "--", markersize=5, linewidth=1.4, elinewidth=0.7, capsize=2)  # fmt: skip


def _frame(panel: object, rows: Sequence[Row], model: str, axis: str) -> None:
    points = [r for r in rows if r.setting != "none"]
    front = pareto([getattr(r, axis) for r in points], [r.op for r in points])
    chosen = [r for r, on in zip(points, front, strict=True) if on]
    panel.scatter([100 * getattr(r, axis) for r in chosen], [r.op for r in chosen], s=110, facecolors="none",  # type: ignore[attr-defined]
                  edgecolors="#444444", linewidths=1.0, zorder=5, label="Pareto front")  # fmt: skip
    panel.axhline(100, color="#888888", linewidth=0.8, linestyle=":")  # type: ignore[attr-defined]
    panel.set_title(model)  # type: ignore[attr-defined]
    panel.set_xlabel(AXES[axis])  # type: ignore[attr-defined]
    panel.set_ylabel("OP (% of the uncompressed model)")  # type: ignore[attr-defined]
    panel.grid(alpha=0.25)  # type: ignore[attr-defined]
