"""Rows from records: one per model and setting, with every number that tables and figures show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from effivlm.budget import BudgetError, parse_budget
from effivlm.metrics.comparison import Comparison, compare
from effivlm.metrics.efficiency import Speedup, speedup
from effivlm.metrics.generalization import generalization
from effivlm.metrics.guess import blind_guess
from effivlm.metrics.official import with_official
from effivlm.metrics.paired import holm
from effivlm.metrics.performance import Failures, MetricError, Pair, pairs_of
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
        comparison: all numbers of quality, by task too, with intervals.
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
    comparison: Comparison
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
        guesses = _guesses(base)
        rows = [
            _row(pairs_of(mine, base, failures), s, model, guesses, totals)
            for s, mine in [("none", base), *settings.items()]
        ]
        rows = [_timed(row, [t for t in timings if t.model == model], seed) for row in rows]
        tested = [r for r in rows[1:] if r.p == r.p]
        adjusted = dict(zip([r.setting for r in tested], holm([r.p for r in tested]), strict=True))
        out += [rows[0], *(replace(r, p=adjusted.get(r.setting, NAN)) for r in rows[1:])]
    return out


def _guesses(base: Sequence[DocumentRecord]) -> dict[str, float]:
    tasks: dict[str, list[DocumentRecord]] = {}
    for r in base:
        tasks.setdefault(r.task, []).append(r)
    return {t: blind_guess(found) for t, found in tasks.items()}


def _row(
    pairs: Mapping[str, Sequence[Pair]],
    setting: str,
    model: str,
    guesses: Mapping[str, float],
    totals: Totals,
) -> Row:
    if not pairs:
        raise MetricError(
            f"{model} under {setting} has no document in common with 'none': run both on the same"
            " tasks"
        )
    found = with_official(compare(pairs, guesses), _official(pairs, totals))
    flat = [pair for p in pairs.values() for pair in p]
    return Row(
        model=model,
        setting=setting,
        asked=asked_of(setting),
        scores={t: x.score.value for t, x in found.tasks.items()},
        ratios={t: x.ratio for t, x in found.tasks.items() if x.rated},
        op=found.op.value,
        low=found.op.low,
        high=found.op.high,
        ol=found.ol.value,
        ol_low=found.ol.low,
        ol_high=found.ol.high,
        og=found.og,
        shares=_shares(flat, setting),
        costs=_costs(flat),
        p=found.p,
        documents=len(flat),
        failures=sum(x.failed for x, _ in flat),
        speed={},
        comparison=found,
        notes=tuple(f"{model}: {note}" for note in found.notes),
        pairs=tuple(flat),
    )


def _official(
    pairs: Mapping[str, Sequence[Pair]], totals: Totals
) -> dict[str, tuple[float, float]]:
    """Task -> official numbers of setting and original, where they are of exactly these
    documents.
    """
    out: dict[str, tuple[float, float]] = {}
    for task, found in pairs.items():
        both = [totals.get((r.model, r.setting, r.task)) for r in found[0]]
        numbers = [s.headline for s in both if s is not None and s.documents == len(found)]
        if len(numbers) == 2:
            out[task] = numbers[0], numbers[1]
    return out


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
    """Settings that every model was run under, over the tasks that enter OP for all of them; empty
    for one model.
    """
    models = list(dict.fromkeys(r.model for r in rows))
    out: list[Joined] = []
    for setting in (
        dict.fromkeys(r.setting for r in rows if r.setting != "none") if len(models) > 1 else ()
    ):
        mine = [r for r in rows if r.setting == setting]
        tasks = [t for t in mine[0].ratios if all(t in r.ratios for r in mine)]
        if len(mine) == len(models) and tasks:
            ratios = [{t: r.ratios[t] for t in tasks} for r in mine]
            op = _mean([r.op for r in mine])
            out.append(Joined(setting, len(mine), op, generalization(ratios)))
    return out
