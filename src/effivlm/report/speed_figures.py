"""Figures of speed: where the time goes, how much is saved, and what it costs in quality where that
was measured too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effivlm.metrics.efficiency import Speedup, speedup
from effivlm.metrics.performance import MetricError
from effivlm.records import TimingRecord
from effivlm.report.figures import blank
from effivlm.report.rows import Row

STAGES = {
    "media": "#999933",
    "vision": "#56B4E9",
    "method": "#D55E00",
    "prefill": "#0072B2",
    "decode": "#BBBBBB",
}
Groups = Mapping[str, Sequence[TimingRecord]]


def stages_and_speedups(groups: Groups, title: str, path: Path) -> None:
    """Write a PNG: stacked medians of the stages, and paired speed-ups of TTFT and total with their
    intervals.

    Args:
        groups: setting -> samples of one model and workload, ``none`` among them.
        title: above the figure.
        path: of the PNG.

    Raises:
        ImportError: naming the extra to install.
    """
    figure = blank((11, 0.42 * len(groups) + 1.8))
    bars, points = figure.subplots(1, 2, sharey=True)
    places = {s: -i for i, s in enumerate(groups)}
    left = dict.fromkeys(groups, 0.0)
    for stage, colour in STAGES.items():
        widths = [
            1000 * float(np.median([t.seconds.get(stage, 0.0) for t in mine]))
            for mine in groups.values()
        ]
        bars.barh(
            list(places.values()),
            widths,
            left=list(left.values()),
            color=colour,
            label=stage,
            height=0.7,
        )
        left = {s: x + w for (s, x), w in zip(left.items(), widths, strict=True)}
    bars.set_yticks(list(places.values()), list(places))
    bars.set_xlabel("milliseconds, median")
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=9)
    for stage, mark, shift in (("ttft", "o", 0.12), ("total", "s", -0.12)):
        _ratios(points, groups, places, stage, mark, shift)
    points.axvline(1, color="#777777", linewidth=0.9)
    points.set_xlabel("speed-up, 95 % interval")
    points.legend(frameon=False, fontsize=9)
    points.grid(axis="x", alpha=0.25)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _ratios(
    panel: Any, groups: Groups, places: Mapping[str, int], stage: str, mark: str, shift: float
) -> None:
    found: dict[str, Speedup | None] = {}
    for setting, mine in groups.items():
        try:
            found[setting] = speedup(mine, groups["none"], stage) if setting != "none" else None
        except MetricError:  # the table says why
            continue
    rows = [(places[s] + shift, r) for s, r in found.items() if r is not None]
    error = [
        [max(0.0, r.ratio - r.low) for _, r in rows],
        [max(0.0, r.high - r.ratio) for _, r in rows],
    ]
    panel.errorbar(
        [r.ratio for _, r in rows],
        [y for y, _ in rows],
        xerr=error,
        fmt=mark,
        color="#333333",
        markerfacecolor="#333333" if stage == "total" else "white",
        markersize=5,
        capsize=2,
        label=stage,
    )


def quality_against_speed(
    rows: Sequence[Row], workload: str, path: Path, stage: str = "total"
) -> bool:
    """Write a PNG of OP against the measured speed-up, both with intervals; False where no setting
    has both.

    Raises:
        ImportError: naming the extra to install.
    """
    name = f"{workload} {stage}"
    both = [r for r in rows if r.setting != "none" and name in r.speed and r.op == r.op]
    if not both:
        return False
    figure = blank((7.5, 5))
    panel = figure.subplots()
    for r in both:
        s = r.speed[name]
        panel.errorbar(
            [s.ratio],
            [r.op],
            xerr=[[max(0.0, s.ratio - s.low)], [max(0.0, s.high - s.ratio)]],
            yerr=[[max(0.0, r.op - r.low)], [max(0.0, r.high - r.op)]],
            fmt="o",
            color="#0072B2",
            elinewidth=0.8,
            capsize=2,
        )
        panel.annotate(
            r.setting, (s.ratio, r.op), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    panel.axhline(100, color="#777777", linewidth=0.9, linestyle=(0, (1, 2)))
    panel.axvline(1, color="#777777", linewidth=0.9, linestyle=(0, (1, 2)))
    panel.set_xlabel(f"measured speed-up of {workload}, {stage}")
    panel.set_ylabel("OP (% of the uncompressed model)")
    panel.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return True
