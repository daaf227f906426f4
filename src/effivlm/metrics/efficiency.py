"""Efficiency (OE): measured speed-ups and memory ratios from paired samples; unpaired runs are
refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effivlm.metrics.intervals import Interval, bootstrap
from effivlm.metrics.metric import Array
from effivlm.metrics.performance import MetricError
from effivlm.records import TimingRecord


@dataclass(frozen=True)
class Speedup:
    """Original / setting of one stage: 2 means half the time.

    Attributes:
        ratio: median over pairs of the pair's ratio. low, high: its 95 % bootstrap interval over
            pairs. pairs: how many.
        median, quartiles: seconds under the setting. original: median seconds under the original.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    median: float
    quartiles: Interval
    original: float


def speedup(
    timings: Sequence[TimingRecord], originals: Sequence[TimingRecord], stage: str, seed: int = 0
) -> Speedup:
    """The paired speed-up of one stage.

    Args:
        timings: all samples of one model, workload and setting.
        originals: those of ``none``, interleaved with them.
        stage: a key of `TimingRecord.seconds`.
        seed: of the bootstrap.

    Raises:
        MetricError: for fewer than two pairs, samples without a partner, another model or workload,
            a stage that was not timed or took no time, or a setting whose correctness check failed
            (its speed says nothing).
    """
    pairs = _paired(timings, originals)
    wrong = sorted({mine.setting for mine, _ in pairs if not mine.correct})
    if wrong:
        raise MetricError(
            f"{wrong[0]} failed its correctness check: no speed-up is reported for wrong answers"
        )
    mine, base = _seconds([a for a, _ in pairs], stage), _seconds([b for _, b in pairs], stage)
    if not mine.all():
        raise MetricError(
            f"{stage} took no time under {pairs[0][0].setting}: its speed-up is undefined"
        )
    low, high = bootstrap(
        lambda picks: np.median((base / mine)[picks], axis=-1), len(pairs), seed=seed
    )
    first, third = np.percentile(mine, [25, 75])
    return Speedup(
        float(np.median(base / mine)),
        low,
        high,
        len(pairs),
        float(np.median(mine)),
        (float(first), float(third)),
        float(np.median(base)),
    )


def _paired(
    timings: Sequence[TimingRecord], originals: Sequence[TimingRecord]
) -> list[tuple[TimingRecord, TimingRecord]]:
    kinds = {(r.model, r.workload) for r in (*timings, *originals)}
    if len(kinds) != 1:
        raise MetricError(
            f"a speed-up compares one model on one workload, got {sorted(kinds) or 'no samples'}"
        )
    mine, base = {r.sample: r for r in timings}, {r.sample: r for r in originals}
    if len(mine) != len(timings) or len(base) != len(originals):
        raise MetricError(
            "a sample number occurs twice: samples of two measurements cannot be mixed; measure"
            " again into a new run"
        )
    alone = sorted(set(mine) ^ set(base))
    if alone:
        counts = f"{len(mine)} of the setting, {len(base)} of the original"
        some = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
        raise MetricError(
            f"unpaired samples {some} ({counts}): time baseline and setting alternately, sample by"
            " sample"
        )
    if len(mine) < 2:
        raise MetricError(f"{len(mine)} pair of samples: a ratio with an interval needs at least 2")
    return [(mine[i], base[i]) for i in sorted(mine)]


def _seconds(records: Sequence[TimingRecord], stage: str) -> Array:
    missing = [r.sample for r in records if stage not in r.seconds]
    if missing:
        known = ", ".join(dict.fromkeys(s for r in records for s in r.seconds))
        raise MetricError(
            f"{records[0].setting}: sample {missing[0]} has no time of {stage!r}: expected one of"
            f" {known}"
        )
    return np.array([r.seconds[stage] for r in records], dtype=np.float64)
