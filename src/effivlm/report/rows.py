"""Rows from records: one per model and setting, with every number that tables and figures show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from effivlm.budget import BudgetError, parse_budget
from effivlm.metrics.efficiency import Speedup, speedup
from effivlm.metrics.generalization import generalization
from effivlm.metrics.intervals import bootstrap_mean, bootstrap_overall, holm, paired_test
from effivlm.metrics.loyalty import agreements, loyalty
from effivlm.metrics.performance import (
    Failures,
    MetricError,
    Pair,
    aggregate_of,
    has_scores,
    overall,
    pairs_of,
    ratios,
    score_of,
    task_score,
    values,
)
from effivlm.records import DocumentRecord, TimingRecord
from effivlm.scores import Scores

Totals = Mapping[tuple[str, str, str], Scores]  # by model, setting, task

AXES = {
    "asked": "share asked for",
    "visual": "visual tokens at the last layer",
    "visual_mean": "visual tokens, mean over layers",
    "prompt_kv": "prompt KV entries",
    "kv_bytes": "KV bytes",
    "kv_bytes_held": "KV bytes held, padding of unequal heads included",
    "prefill_flops": "prefill FLOPs",
    "decode_bytes_per_token": "bytes read per decoded token",
}
REALISED = ("visual", "visual_mean", "prompt_kv")
COUNTED = ("kv_bytes", "kv_bytes_held", "prefill_flops", "decode_bytes_per_token")
STAGES = ("ttft", "total")
FEW = 20  # documents of a task below which percentile intervals are too narrow
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One model under one setting.

    Attributes:
        asked: the budgets as written, joined by +. scores: task -> score in percent. ratios: task
            -> score / original.
        op, low, high: OP and its 95 % interval. ol, ol_low, ol_high: loyalty. og: spread over
        tasks. All percent, NaN where
            undefined.
        shares: axis (see `AXES`) -> share of the uncompressed model in [0, 1], mean over documents;
            ``asked`` is NaN unless the setting is one method with a share.
        costs: kv_bytes, kv_bytes_held, prefill_flops, decode_bytes_per_token, mean over documents.
        p: paired test against ``none`` over all documents, Holm-corrected per model.
        documents: compared. failures: of them, without answer.
        speed: "WORKLOAD STAGE" -> measured speed-up, where the run was measured. notes: what could
            not be computed, and why.
        pairs: the documents compared: the record under this setting, and the one under ``none``.
    """

    model: str
    setting: str
    asked: str
    scores: dict[str, float]
    ratios: dict[str, float]
    op: float
    low: float
    high: float
    ol: float
    ol_low: float
    ol_high: float
    og: float
    shares: dict[str, float]
    costs: dict[str, float]
    p: float
    documents: int
    failures: int
    speed: dict[str, Speedup]
    notes: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = field(default=(), repr=False, compare=False)


def rows_of(
    records: Sequence[DocumentRecord],
    timings: Sequence[TimingRecord] = (),
    failures: Failures = "zero",
    seed: int = 0,
    totals: Totals = MappingProxyType({}),
) -> list[Row]:
    """Rows in order of appearance, ``none`` first; only documents that the original was asked too
    are compared. Where ``totals`` holds a task's official number over exactly those, it is shown.

    Raises:
        MetricError: if a model has no records under ``none``, or a setting shares no document with
            it.
    """
    groups: dict[str, dict[str, list[DocumentRecord]]] = {}
    for r in records:
        groups.setdefault(r.model, {}).setdefault(r.setting, []).append(r)
    out: list[Row] = []
    for model, settings in groups.items():
        if "none" not in settings:
            raise MetricError(f"{model} has no records under 'none': nothing to compare with")
        base = settings.pop("none")
        rows = [
            _row(pairs_of(mine, base, failures), s, model, seed, totals)
            for s, mine in [("none", base), *settings.items()]
        ]
        rows = [_timed(row, [t for t in timings if t.model == model], seed) for row in rows]
        tested = [r for r in rows[1:] if not np.isnan(r.p)]
        adjusted = dict(zip([r.setting for r in tested], holm([r.p for r in tested]), strict=True))
        out += [rows[0], *(replace(r, p=adjusted.get(r.setting, NAN)) for r in rows[1:])]
    return out


def _row(
    pairs: Mapping[str, Sequence[Pair]], setting: str, model: str, seed: int, totals: Totals
) -> Row:
    if not pairs:
        raise MetricError(
            f"{model} under {setting} has no document in common with 'none': run both on the same"
            " tasks"
        )
    scores = {t: _score([x for x, _ in p], totals) for t, p in pairs.items()}
    original = {t: _score([y for _, y in p], totals) for t, p in pairs.items()}
    single = {t: p for t, p in pairs.items() if has_scores(p)}
    unrated = [t for t in pairs if original[t] == 0]
    rated = {t: p for t, p in pairs.items() if t not in unrated}
    op, low, high, og, ratio = _quality(rated, scores, original, seed)
    differences = {
        t: np.array([score_of(x) - score_of(y) for x, y in p]) for t, p in single.items()
    }
    agreed = agreements(pairs)
    flat = [pair for p in pairs.values() for pair in p]
    return Row(
        model,
        setting,
        asked_of(setting),
        {t: 100 * s for t, s in scores.items()},
        ratio,
        op,
        low,
        high,
        loyalty(agreed),
        *_loyalty_interval(agreed, seed),
        og,
        _shares(flat, setting),
        _costs(flat),
        paired_test(differences, seed=seed) if differences else NAN,
        len(flat),
        sum(x.failed for x, _ in flat),
        {},
        _remarks(model, pairs, unrated),
        tuple(flat),
    )


def _remarks(
    model: str, pairs: Mapping[str, Sequence[Pair]], unrated: Sequence[str]
) -> tuple[str, ...]:
    few = sorted(t for t, p in pairs.items() if len(p) < FEW)
    out = (
        [
            f"{model}: OP and OG leave out {', '.join(sorted(unrated))}: the original model scores"
            " 0 there"
        ]
        if unrated
        else []
    )
    if few:
        counts = ", ".join(f"{t} {len(pairs[t])}" for t in few)
        out.append(
            f"{model}: intervals are too narrow where tasks have fewer than {FEW} documents"
            f" ({counts})"
        )
    return tuple(out)


def _quality(
    rated: Mapping[str, Sequence[Pair]],
    scores: Mapping[str, float],
    original: Mapping[str, float],
    seed: int,
) -> tuple[float, float, float, float, dict[str, float]]:
    if not rated:
        return NAN, NAN, NAN, NAN, {}
    mine, base = {t: scores[t] for t in rated}, {t: original[t] for t in rated}
    low = high = NAN  # official numbers that no documents' scores join to cannot be resampled
    if all(_joins(p, scores[t], original[t]) for t, p in rated.items()):
        low, high = bootstrap_overall(
            {t: values([x for x, _ in p]) for t, p in rated.items()},
            {t: values([y for _, y in p]) for t, p in rated.items()},
            {t: aggregate_of(p[0][0].metric) for t, p in rated.items()},
            seed=seed,
        )
    ratio = ratios(mine, base)
    return overall(mine, base), low, high, generalization([ratio]), ratio


def _score(records: Sequence[DocumentRecord], totals: Totals) -> float:
    """A task's score: the official one, where it is of exactly these documents."""
    first = records[0]
    official = totals.get((first.model, first.setting, first.task))
    if official is None or official.documents != len(records):
        return task_score(records)
    return official.headline


def _joins(pairs: Sequence[Pair], score: float, original: float) -> bool:
    """Whether a task's numbers are those that its documents' scores join to."""
    if not has_scores(pairs):
        return False
    joined = [task_score([pair[i] for pair in pairs]) for i in (0, 1)]
    return bool(np.allclose(joined, [score, original], rtol=0, atol=1e-9))


def _loyalty_interval(agreed: Mapping[str, np.ndarray], seed: int) -> tuple[float, float]:
    """Interval of loyalty, in percent."""
    low, high = bootstrap_mean(agreed, seed=seed) if agreed else (NAN, NAN)
    return 100 * low, 100 * high


def asked_of(setting: str) -> str:
    """The budgets of a setting as written, joined by +; empty without one."""
    parts = [part.partition(":")[0] for part in setting.split("+")]
    return " + ".join(p.partition("@")[2].strip() for p in parts if "@" in p)


def _shares(pairs: Sequence[Pair], setting: str) -> dict[str, float]:
    mine = [x.cost for x, y in pairs if x.cost and y.cost]
    base = [y.cost for x, y in pairs if x.cost and y.cost]
    out = {"asked": 1.0 if setting == "none" else _asked_share(setting)}
    out |= {k: _mean([c["realised"][k] for c in mine if "realised" in c]) for k in REALISED}
    for k in COUNTED:
        whole = _mean([c[k] for c in base if k in c])
        out[k] = _mean([c[k] for c in mine if k in c]) / whole if whole else NAN
    return out


def _asked_share(setting: str) -> float:
    """NaN for counts of tokens and for several methods: their shares are of different things."""
    try:
        share = parse_budget(asked_of(setting), "visual").share if "+" not in setting else None
    except BudgetError:
        share = None
    return NAN if share is None else share


def _costs(pairs: Sequence[Pair]) -> dict[str, float]:
    return {k: _mean([x.cost[k] for x, _ in pairs if x.cost and k in x.cost]) for k in COUNTED}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else NAN


def _timed(row: Row, timings: Sequence[TimingRecord], seed: int) -> Row:
    """The row with its speed-ups; one that cannot be computed is a note that says why."""
    speed, notes = dict(row.speed), list(row.notes)
    for workload in dict.fromkeys(t.workload for t in timings):
        mine = [t for t in timings if t.workload == workload and t.setting == row.setting]
        base = [t for t in timings if t.workload == workload and t.setting == "none"]
        for stage in STAGES if mine else ():
            try:
                speed[f"{workload} {stage}"] = speedup(mine, base, stage, seed)
            except MetricError as error:
                notes.append(
                    f"{row.model}, {row.setting}, {workload}: no speed-up ({stage}): {error}"
                )
    return replace(row, speed=speed, notes=tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class Joined:
    """A setting over all models: mean OP and the OG of model-averaged ratios, as EffiVLM-Bench
    defines it; percent.
    """

    setting: str
    models: int
    op: float
    og: float


def joined(rows: Sequence[Row]) -> list[Joined]:
    """Settings that every model was run under, on the same tasks; empty for one model."""
    models = list(dict.fromkeys(r.model for r in rows))
    out: list[Joined] = []
    for setting in (
        dict.fromkeys(r.setting for r in rows if r.setting != "none") if len(models) > 1 else ()
    ):
        mine = [r for r in rows if r.setting == setting]
        if len(mine) == len(models) and all(
            r.ratios and set(r.ratios) == set(mine[0].ratios) for r in mine
        ):
            out.append(
                Joined(
                    setting,
                    len(mine),
                    _mean([r.op for r in mine]),
                    generalization([r.ratios for r in mine]),
                )
            )
    return out
