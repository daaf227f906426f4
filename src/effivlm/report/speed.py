"""Speed tables from timed samples: stages, paired speed-ups with intervals, shares of the floor,
published ratios.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effivlm.files.reading import mapping, read_json
from effivlm.files.writing import write_whole
from effivlm.metrics.efficiency import Speedup, speedup
from effivlm.metrics.performance import MetricError
from effivlm.records import StoreError, TimingRecord, read_run, read_timings
from effivlm.reference import published
from effivlm.report.rows import rows_of
from effivlm.report.speed_figures import quality_against_speed, stages_and_speedups

log = logging.getLogger("effivlm")

INTACT = "the samples are intact; free space and run the same command again"
STAGES = ("media", "vision", "method", "prefill", "ttft", "decode_per_token", "total")
PUBLISHED = {"uniprunebench": ("UniPruneBench", 4), "polymorphic": ("Polymorphic", 4)}
Floors = Mapping[str, Any]  # model -> {"peaks", "settings": {setting: {"floor", "predicted", ...}}}


def write_speed(folder: Path) -> list[Path]:
    """Write ``report/speed_WORKLOAD.md`` and figures for every workload a run was measured on.

    Returns:
        The files written, tables first; figures are left out, with a warning, where matplotlib is
        missing.

    Raises:
        StoreError: if the run was never measured.
    """
    timings = read_timings(folder)
    if not timings:
        raise StoreError(
            f"{folder} holds no timings: run `effivlm measure` with its experiment first"
        )
    (folder / "report").mkdir(exist_ok=True)
    paths: list[Path] = []
    for workload in dict.fromkeys(t.workload for t in timings):
        beside = folder / "timings" / f"{workload}.json"
        floors: Floors = read_floors(beside)
        paths.append(folder / "report" / f"speed_{workload}.md")
        text = markdown([t for t in timings if t.workload == workload], floors)
        write_whole(paths[-1], text, StoreError, INTACT)
    try:
        return paths + _figures(folder, timings)
    except ImportError as error:
        log.warning("%s (the tables are written)", error)
        return paths


def read_floors(path: Path) -> Floors:
    """The floors beside timed samples; none where they are damaged, which is logged."""
    if not path.exists():
        return {}
    try:
        found = read_json(path, "the floors that `effivlm measure` wrote", StoreError)
    except StoreError as error:
        log.warning("%s: shares of the floor are left out", error)
        return {}
    return mapping(found)


def _figures(folder: Path, timings: Sequence[TimingRecord]) -> list[Path]:
    out: list[Path] = []
    answered = any((folder / "records").rglob("*.jsonl"))
    rows = rows_of(read_run(folder), timings) if answered else []
    for model, workload in dict.fromkeys((t.model, t.workload) for t in timings):
        mine = [t for t in timings if (t.model, t.workload) == (model, workload)]
        groups = {
            s: [t for t in mine if t.setting == s] for s in dict.fromkeys(t.setting for t in mine)
        }
        out.append(folder / "report" / f"speed_{workload}_{model}.png")
        stages_and_speedups(groups, f"{model}, {workload}", out[-1])
        picture = folder / "report" / f"quality_speed_{workload}_{model}.png"
        if quality_against_speed([r for r in rows if r.model == model], workload, picture):
            out.append(picture)
    return out


def markdown(timings: Sequence[TimingRecord], floors: Floors) -> str:
    """The tables of one workload, a section per model."""
    workload = timings[0].workload
    text = f"# Speed: {workload}\n"
    for model in dict.fromkeys(t.model for t in timings):
        mine = [t for t in timings if t.model == model]
        groups = {
            s: [t for t in mine if t.setting == s] for s in dict.fromkeys(t.setting for t in mine)
        }
        base = groups.get("none", [])
        facts = floors.get(model, {})
        text += f"\n## {model}\n\n{_about(mine, facts)}\n\n" + _table(*_stages(groups, base))
        if facts:
            text += "\n" + _table(*_limits(groups, base, facts["settings"]))
        text += "".join(f"\nNote: {n}.\n" for n in [*_notes(groups, base), *_beyond(groups, facts)])
    return text + _published(workload)


def _about(samples: Sequence[TimingRecord], facts: Mapping[str, Any]) -> str:
    rounds, busy = len({t.sample for t in samples}), sum(bool(t.busy) for t in samples)
    text = (
        f"{rounds} rounds, settings interleaved. Medians and quartiles; speed-ups are medians of"
        " pairs with 95 % intervals."
    )
    if busy:
        some = sorted(t.busy for t in samples if t.busy)[busy // 2]
        text += (
            f" The machine was not quiet in {busy} of {len(samples)} samples (such as: {some}):"
            " read ratios, not times."
        )
    if facts:
        p = facts["peaks"]
        text += (
            f" Floor at {p['flops'] / 1e12:.3g} TFLOP/s and {p['bandwidth'] / 1e9:.3g} GB/s"
            f" ({p['name']}); {facts['new_tokens']} new tokens."
        )
    return text


def _stages(
    groups: Mapping[str, Sequence[TimingRecord]], base: Sequence[TimingRecord]
) -> tuple[list[str], list[list[str]]]:
    shown = [s for s in STAGES if any(t.seconds.get(s) for g in groups.values() for t in g)]
    titles = [
        "setting",
        *(f"{s.replace('_', ' ')} ms" for s in shown),
        "TTFT speed-up",
        "total speed-up",
        "new tokens/s",
        "KV MiB",
        "peak MiB",
    ]
    lines: list[list[str]] = []
    for setting, mine in groups.items():
        ratios = [
            _ratio(_speedup(mine, base, s)) if setting != "none" else "" for s in ("ttft", "total")
        ]
        rate = np.median([t.new_tokens / t.seconds["total"] for t in mine])
        peak = max(t.memory.get("allocated", t.memory.get("resident", 0)) for t in mine)
        lines.append(
            [
                setting,
                *(_spread(mine, s) for s in shown),
                *ratios,
                f"{rate:.3g}",
                _mib(mine[0].memory.get("kv", 0)),
                _mib(peak),
            ]
        )
    return titles, lines


def _limits(
    groups: Mapping[str, Sequence[TimingRecord]],
    base: Sequence[TimingRecord],
    facts: Mapping[str, Any],
) -> tuple[list[str], list[list[str]]]:
    titles = [
        "setting",
        "prefill: floor / time",
        "TTFT: floor / time",
        "decode: floor / time",
        "method: share of TTFT",
        "TTFT speed-up predicted",
        "measured",
        "error",
        "total speed-up predicted",
        "measured",
        "error",
    ]
    whole = facts.get("none", {}).get("predicted", {})
    lines: list[list[str]] = []
    for setting, mine in groups.items():
        floor, told = facts[setting]["floor"], facts[setting]["predicted"]
        shares = [
            _share(floor[s], _median(mine, s)) for s in ("prefill", "ttft", "decode_per_token")
        ]
        cells = [setting, *shares, f"{100 * _median(mine, 'method') / _median(mine, 'ttft'):.1f} %"]
        for stage in ("ttft", "total"):
            got = _speedup(mine, base, stage)
            if setting == "none" or got is None or "error" in told or not whole:
                cells += ["", "", ""]
                continue
            guess = whole[stage] / told[stage]
            cells += [
                f"{guess:.2f}x",
                f"{got.ratio:.2f}x",
                f"{100 * (got.ratio / guess - 1):+.0f} %",
            ]
        lines.append(cells)
    return titles, lines


def _notes(groups: Mapping[str, Sequence[TimingRecord]], base: Sequence[TimingRecord]) -> list[str]:
    out: list[str] = []
    for setting, mine in groups.items():
        try:
            speedup(mine, base, "total")
        except MetricError as error:
            out.append(f"{setting}: no speed-up: {error}")
    return out


def _beyond(groups: Mapping[str, Sequence[TimingRecord]], facts: Mapping[str, Any]) -> list[str]:
    """Nothing is faster than its floor: then the peaks are wrong."""
    for setting, mine in groups.items() if facts else ():
        if any(
            facts["settings"][setting]["floor"][s] > _median(mine, s)
            for s in ("ttft", "decode_per_token")
        ):
            return [
                "some times are below their floor: the device's peaks were measured while it was"
                " busy; read no share of it"
            ]
    return []


def _published(workload: str) -> str:
    """What the workload's source printed, as ratios to its own original."""
    if workload not in PUBLISHED:
        return ""
    source, table = PUBLISHED[workload]
    rows = [r for r in published(source, table) if "time" in r.metric or r.metric.endswith("_ms")]
    lines: list[list[str]] = []
    for r in rows:
        base = next(
            (
                b.value
                for b in rows
                if b.model == r.model and b.method == "Vanilla" and b.metric == r.metric
            ),
            0.0,
        )
        if r.method != "Vanilla" and r.value and base and not r.metric.startswith("method"):
            lines.append([r.model, r.method, r.setting, r.metric, f"{base / r.value:.2f}x"])
    titles = ["model", "method", "setting", "of", "published speed-up"]
    return f"\n## Published: {source}, Table {table}\n\n" + _table(titles, lines)


def _speedup(
    mine: Sequence[TimingRecord], base: Sequence[TimingRecord], stage: str
) -> Speedup | None:
    try:
        return speedup(mine, base, stage)
    except MetricError:  # said once, in the notes
        return None


def _median(samples: Sequence[TimingRecord], stage: str) -> float:
    found = [t.seconds[stage] for t in samples if stage in t.seconds]
    return float(np.median(found)) if found else float("nan")


def _spread(samples: Sequence[TimingRecord], stage: str) -> str:
    found = [1000 * t.seconds[stage] for t in samples if stage in t.seconds]
    if not found:
        return "-"
    low, middle, high = np.percentile(found, [25, 50, 75])
    return f"{middle:.4g} [{low:.3g}-{high:.3g}]"


def _share(floor: float, measured: float) -> str:
    return f"{100 * floor / measured:.1f} %" if measured == measured and measured else "-"


def _ratio(s: Speedup | None) -> str:
    return "-" if s is None else f"{s.ratio:.2f}x [{s.low:.2f}-{s.high:.2f}]"


def _mib(count: int) -> str:
    return f"{count / 2**20:.3g}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [titles, ["---"] * len(titles), *lines]
    return (
        "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in every)
        + "\n"
    )
