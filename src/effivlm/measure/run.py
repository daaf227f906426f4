"""The measurement on one screen: prompts, warm-up, correctness, interleaved rounds, floors; written
beside the answers.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from effivlm.config import (
    ConfigError,
    Experiment,
    MeasureSpec,
    ModelSpec,
    TaskSpec,
    dump_experiment,
)
from effivlm.experiment import experiment_tasks, sample
from effivlm.families.fitness import check_template
from effivlm.families.loading import Loaded
from effivlm.files.reading import read_json
from effivlm.measure import workloads
from effivlm.measure.busy import Watch, gpu_note
from effivlm.measure.peaks import measured
from effivlm.measure.predict import Predictor
from effivlm.measure.roofline import Peaks
from effivlm.measure.timing import Inputs, Sample, Timer
from effivlm.methods.base import Weights
from effivlm.prompts import load_model, prepare
from effivlm.provenance import environment
from effivlm.records import StoreError, TimingRecord, read_timings
from effivlm.runtime.weights import CompressedWeights
from effivlm.setting import Part, Setting
from effivlm.store import RunStore
from effivlm.tasks.loading import load_tasks
from effivlm.tasks.video import framed
from effivlm.weights_calibration import weights_for

Compressor = Callable[[Part], CompressedWeights]
log = logging.getLogger("effivlm")
TASKS = "tasks"  # the workload that is the experiment's own tasks
Progress = Callable[[str, int, int], None]  # (what, rounds done, rounds in all)


@dataclass(frozen=True)
class Case:
    """A named set of prompts of one length of answer; ``makes`` prepare the model's inputs, one
    after the other.
    """

    name: str
    makes: Sequence[Callable[[], Inputs]]
    new_tokens: int


@dataclass
class Measured:
    """What a measurement did: samples recorded and found from before, settings that could not be
    timed with the reason.
    """

    recorded: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    experiment: Experiment,
    root: Path = Path("runs"),
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Time every setting of an experiment, baseline interleaved, into ``runs/NAME/timings``; goes
    on after an interruption.

    Raises:
        ConfigError: without a ``measure`` section. StoreError: if the folder holds another
            experiment, or half a round.
        LoadError, UnknownName, TaskError: for models, workloads and tasks that cannot be had.
    """
    spec, out = experiment.measure, Measured()
    if spec is None:
        raise ConfigError(
            "the experiment has no section 'measure': add one, such as measure: {workload:"
            " effivlm-bench}"
        )
    if spec.workload != TASKS:
        workloads.workload(spec.workload)  # refused before anything is loaded
    experiment_tasks(experiment)  # refused before anything is loaded
    identity = experiment.model_dump(mode="json")
    with RunStore(root / experiment.name, dump_experiment(experiment), identity) as store:
        for model in experiment.models:
            loaded = load_model(model)
            if spec.workload == TASKS:
                check_template(loaded)
            store.note_environment(environment(str(loaded.model.device), "pil"))
            peaks = measured(loaded.model.device, loaded.model.dtype)

            @functools.cache
            def weights(
                part: Part, loaded: Loaded = loaded, model: ModelSpec = model
            ) -> CompressedWeights:
                return weights_for(loaded, model, part, experiment.calibration, fast=True)

            for case in cases(spec, loaded, experiment.tasks, experiment.seed, model.frames):
                some = experiment.settings_for(model)
                measure_case(store, loaded, some, case, spec, peaks, progress, out, weights)
    return out


def cases(
    spec: MeasureSpec, loaded: Loaded, tasks: Sequence[TaskSpec], seed: int, frames: int = 8
) -> Iterator[Case]:
    """The prompts of a workload: one case per batch size, or one per task."""
    if spec.workload == TASKS:
        for given in tasks:
            for task in load_tasks(given.name, given.data):
                documents = [task.documents[i] for i in sample(task, given, seed)]
                makes = [lambda d=d: prepare(loaded, framed(d.open(), frames)) for d in documents]
                yield Case(task.name, makes, task.max_new_tokens)
        return
    work = workloads.workload(spec.workload)
    for batch in work.batches:
        made = workloads.prompts(
            work,
            loaded.family,
            loaded.model.config,
            batch,
            workloads.image_sizes(loaded.name),
            seed,
        )
        inputs = workloads.on_device(made, loaded)
        label = work.name if work.batches == (1,) else f"{work.name}-b{batch}"
        yield Case(label, [lambda i=inputs: i], work.new_tokens)


def rounds_done(store: RunStore, case: Case, loaded: Loaded) -> tuple[int, set[str]]:
    """Rounds that a folder already holds, and the settings timed in them.

    Raises:
        StoreError: if the last round is not whole (killed while it was written).
    """
    before = [
        t for t in read_timings(store.folder) if t.model == loaded.name and t.workload == case.name
    ]
    settings = {t.setting for t in before}
    count = max((t.sample + 1 for t in before), default=0)
    if len(before) != count * len(settings):
        raise StoreError(
            f"{store.timings(case.name)}: round {count - 1} of {loaded.name} is not whole: delete"
            f" its lines (sample {count - 1}) and run the same command again"
        )
    return count, settings


def measure_case(
    store: RunStore,
    loaded: Loaded,
    settings: Sequence[Setting],
    case: Case,
    spec: MeasureSpec,
    peaks: Peaks,
    progress: Progress,
    out: Measured,
    weights: Compressor | None = None,
) -> None:
    """Time one case on a loaded model and write its samples, floors and predictions into a run's
    folder.
    """
    start, known = rounds_done(store, case, loaded)
    out.found += start * len(known)
    if start >= spec.repeats:
        return
    settings = [
        s for s in settings if not known or str(s) in known
    ]  # rounds of one file hold the same settings
    timers, first = warmed(loaded, settings, case, spec.warmup, out, weights)
    if "none" not in map(
        str, timers
    ):  # already noted: without the original there is nothing to compare with
        return
    what = f"{loaded.name}, {case.name}"
    for number, rounds in enumerate(interleaved(timers, case, spec, start), start=start):
        for setting, (timed, busy) in rounds.items():
            store.append(
                store.timings(case.name),
                record_of(loaded, setting, case, number, timed, busy, first[setting][1]),
            )
        out.recorded += len(rounds)
        progress(what, number + 1, spec.repeats)
    peaks = peaks.best(
        measured(loaded.model.device, loaded.model.dtype)
    )  # a busy machine measures too little
    saved = {s: t.saved for s, t in timers.items()}
    note_floors(store.timings(case.name).with_suffix(".json"), loaded, case, first, peaks, saved)


def warmed(
    loaded: Loaded,
    settings: Sequence[Setting],
    case: Case,
    warmup: int,
    out: Measured,
    weights: Compressor | None = None,
) -> tuple[dict[Setting, Timer], dict[Setting, tuple[Sample, bool]]]:
    """Timers that have run, each with its first sample and whether that was correct; what cannot
    run is noted and left out.
    """
    timers: dict[Setting, Timer] = {}
    first: dict[Setting, tuple[Sample, bool]] = {}
    for setting in settings:
        try:
            parts = setting.stage(Weights)
            timer = Timer(loaded.model, setting, weights(parts[0]) if weights and parts else None)
            timed = timer.once(case.makes[0], case.new_tokens)
            right = timer.correct(case.makes[0], timed)
            for i in range(warmup):
                timer.once(case.makes[i % len(case.makes)], case.new_tokens)
        except Exception as error:  # one setting that fails must not cost the others
            log.error("%s under %s cannot be timed", case.name, setting, exc_info=error)
            out.failed[f"{loaded.name}, {case.name}, {setting}"] = (
                f"{type(error).__name__}: {error}"
            )
            continue
        if not right:
            log.error(
                "%s under %s is not what model.generate computes: no speed-up will be shown",
                case.name,
                setting,
            )
        timers[setting], first[setting] = timer, (timed, right)
    return timers, first


def interleaved(
    timers: dict[Setting, Timer], case: Case, spec: MeasureSpec, start: int = 0
) -> Iterator[dict[Setting, tuple[Sample, str]]]:
    """Rounds in which every setting runs once on the same prompt, in alternating order; whole
    rounds only.

    Ends after ``spec.repeats`` rounds, or (from two rounds on) once the slowest setting was timed
    for ``spec.seconds``.
    """
    spent = dict.fromkeys(timers, 0.0)
    for number in range(start, spec.repeats):
        order = list(timers) if number % 2 == 0 else list(timers)[::-1]
        make, found = case.makes[number % len(case.makes)], {}
        for setting in order:
            watch = Watch()
            timed = timers[setting].once(make, case.new_tokens)
            notes = (watch.note(), gpu_note(timers[setting].device))
            found[setting] = timed, "; ".join(n for n in notes if n)
            spent[setting] += timed.seconds["total"]
        yield {s: found[s] for s in timers}
        if number > start and max(spent.values(), default=0.0) >= spec.seconds:
            return


def record_of(
    loaded: Loaded, setting: Setting, case: Case, number: int, timed: Sample, busy: str, right: bool
) -> TimingRecord:
    """A timed sample as it is stored."""
    return TimingRecord(
        loaded.name,
        str(setting),
        case.name,
        number,
        timed.seconds,
        timed.memory,
        sum(map(len, timed.tokens)),
        busy,
        right,
    )


def note_floors(
    path: Path,
    loaded: Loaded,
    case: Case,
    first: dict[Setting, tuple[Sample, bool]],
    peaks: Peaks,
    saved: dict[Setting, int],
) -> None:
    """Write the floor of every stage, what was predicted from budgets alone, and what each layer's
    cache held.
    """
    inputs = case.makes[0]()
    size = torch.empty(0, dtype=loaded.model.dtype).element_size()
    predictor = Predictor(loaded.model, loaded.family, inputs, case.new_tokens, size)
    table: dict[str, Any] = {}
    if path.exists():
        table = read_json(path, "the floors that `effivlm measure` wrote", StoreError)
    rows = {}
    for setting, (timed, _) in first.items():
        row: dict[str, Any] = {
            "account": timed.account.as_dict(),
            "kv_bytes_per_layer": timed.kv_per_layer,
        }
        try:
            told = predictor.predict(setting, peaks)
            row["predicted"] = asdict(told) | {"ttft": told.ttft, "total": told.total}
        except ValueError as error:  # a method with a rule of its own
            row["predicted"] = {"error": str(error)}
        rows[str(setting)] = row | {
            "floor": predictor.floors(timed.account, setting, peaks, saved[setting])
        }
    table[loaded.name] = {
        "peaks": asdict(peaks),
        "settings": rows,
        "new_tokens": case.new_tokens,
        "prompts": len(case.makes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
