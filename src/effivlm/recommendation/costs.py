"""What settings cost, as shares of the original: measured where the run was timed, predicted for a
device that is named, else counted in the tensors; never two kinds beside each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from effivlm.metrics.efficiency import speedup
from effivlm.metrics.performance import MetricError
from effivlm.recommendation.target import RecommendError, Target
from effivlm.records import TimingRecord
from effivlm.report.rows import AXES, Row

Kind = Literal["measured", "predicted", "counted"]
Predict = Callable[[str, Sequence[str], str], Mapping[str, float | str]]
"""Model, settings, attribute of a prediction -> shares of the original, or why there is none."""


@dataclass(frozen=True)
class Cost:
    """A share of the original's cost.

    Attributes:
        share: the dearest over workloads; NaN where unknown. high: upper end of its 95 % interval
            where it was timed, else the share. missing: why it is unknown.
    """

    share: float
    high: float
    missing: str = ""


@dataclass(frozen=True)
class Costs:
    """Of one model's settings. ``how``: in words, for readers."""

    kind: Kind
    how: str
    of: Mapping[str, Cost]


def costs_of(
    rows: Sequence[Row],
    timings: Sequence[TimingRecord],
    target: Target,
    predict: Predict | None = None,
) -> Costs:
    """Costs of one model's settings on the target's axis.

    Args:
        rows: of the model, ``none`` among them.
        timings: of the same model.
        target: names the axis.
        predict: asked where nothing was timed; None: no device was named.

    Raises:
        RecommendError: where the axis was not measured and nothing stands for it.
    """
    model, settings = rows[0].model, [r.setting for r in rows if r.setting != "none"]
    axis = target.axis
    timed = [t for t in timings if _has(t, target)]
    if timed:
        places = ", ".join(dict.fromkeys(t.workload for t in timed))
        found = {s: _measured(s, timed, target) for s in settings}
        return Costs("measured", f"measured: {axis.help} ({places})", found)
    if predict and axis.predicted:
        told = predict(model, settings, axis.predicted)
        found = {s: _told(told[s]) for s in settings}
        return Costs("predicted", f"predicted from shapes, not measured: {axis.help}", found)
    if axis.counted:
        found = {r.setting: _counted(r.shares[axis.counted]) for r in rows if r.setting != "none"}
        how = f"counted in the tensors: {AXES[axis.counted]}"
        stands = f", standing for {axis.help}, which was not measured" if axis.predicted else ""
        return Costs("counted", how + stands, found)
    raise RecommendError(
        f"{model}: {axis.help} was not measured, and counts cannot stand for it: run `effivlm"
        " measure` with the run's experiment, name a device to predict it (--device h200), or ask"
        f" for another target, such as {'kv' if axis.memory else 'ttft'}={target.share:g}x"
    )


def _has(sample: TimingRecord, target: Target) -> bool:
    axis = target.axis
    return axis.stage in sample.seconds or axis.memory in sample.memory


def _measured(setting: str, timings: Sequence[TimingRecord], target: Target) -> Cost:
    """The dearest workload decides: a target is met on all of them."""
    axis, found = target.axis, list[Cost]()
    for workload in dict.fromkeys(t.workload for t in timings):
        mine = [t for t in timings if (t.workload, t.setting) == (workload, setting)]
        base = [t for t in timings if (t.workload, t.setting) == (workload, "none")]
        if not mine:
            return _unknown("it was not timed")
        try:
            speed = speedup(mine, base, axis.stage or "total")  # also the check of correctness
        except MetricError as error:
            return _unknown(str(error))
        if axis.stage:
            found.append(Cost(1 / speed.ratio, 1 / speed.low))
        else:
            peaks = [max(t.memory[axis.memory] for t in each) for each in (mine, base)]
            found.append(Cost(peaks[0] / peaks[1], peaks[0] / peaks[1]))
    return max(found, key=lambda c: c.share)


def _told(share: float | str) -> Cost:
    return _unknown(share) if isinstance(share, str) else Cost(share, share)


def _counted(share: float) -> Cost:
    return Cost(share, share) if share == share else _unknown("its records hold no count")


def _unknown(why: str) -> Cost:
    return Cost(float("nan"), float("nan"), why)


def dearest(costs: Sequence[Cost]) -> Cost:
    """Over several models: what a target has to be met with; unknown where one is."""
    missing = next((c for c in costs if c.missing), None)
    return missing or Cost(max(c.share for c in costs), max(c.high for c in costs))
