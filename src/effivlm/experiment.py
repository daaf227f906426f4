"""The whole run on one screen: load, plan, answer every document under every setting, record,
report.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from effivlm import __version__
from effivlm.config import (
    CalibrationSpec,
    ConfigError,
    Experiment,
    ModelSpec,
    TaskSpec,
    dump_experiment,
)
from effivlm.evaluation import score_file
from effivlm.evidence import Evidence
from effivlm.families.fitness import check_length, check_template
from effivlm.families.loading import Loaded
from effivlm.measure.roofline import TextShape
from effivlm.methods.base import Weights
from effivlm.prompts import load_model, prepare, stop_ids, tiles_of
from effivlm.provenance import environment
from effivlm.records import DocumentRecord, content_hash
from effivlm.runtime.account import Account
from effivlm.runtime.plan import Outcome, Plan
from effivlm.runtime.weights import CompressedWeights
from effivlm.setting import Part, Setting
from effivlm.store import RunStore
from effivlm.tasks.base import Document, Task
from effivlm.tasks.loading import load_task, load_tasks
from effivlm.tasks.video import framed
from effivlm.weights_calibration import identity, weights_for

log = logging.getLogger("effivlm")
Progress = Callable[[str, int, int], None]  # (what, documents done, documents in all)


@dataclass(frozen=True)
class Summary:
    """What a run did: answers recorded now, found from before, and failed (of all)."""

    recorded: int
    found: int
    failed: int


def run(
    experiment: Experiment,
    root: Path = Path("runs"),
    progress: Progress = lambda what, done, total: None,
    retry_failed: bool = False,
) -> Summary:
    """Answer every document of every task under every setting; what a folder already holds is not
    done again, failures only with ``retry_failed``.

    Raises:
        StoreError, LoadError, TaskError, Unsupported: before anything runs, where it can be known.
    """
    if not experiment.tasks:
        raise ConfigError(
            "this experiment has no tasks, so it can be measured but not run: use `effivlm"
            " measure`, or add tasks"
        )
    if unable := [spec.name for spec in experiment.models if spec.random_weights]:
        raise ConfigError(
            f"random weights of {', '.join(unable)} have no tokenizer and answer nothing: use"
            " `effivlm measure`"
        )
    tasks = experiment_tasks(experiment)
    counts = {"recorded": 0, "found": 0, "failed": 0}
    with RunStore(
        root / experiment.name,
        dump_experiment(experiment),
        experiment.model_dump(mode="json", exclude={"keep"}),
    ) as store:
        for spec in experiment.models:
            loaded = load_model(spec)
            check_template(loaded)
            store.note_environment(environment(str(loaded.model.device), "pil"))
            settings = experiment.settings_for(spec)
            given = (experiment.width, retry_failed, experiment.calibration, experiment.keep)
            runner = Runner(store, spec, loaded, settings, *given)
            chosen = [(task, sample(task, t, experiment.seed)) for t, task in tasks]
            total = sum(len(numbers) for _, numbers in chosen)
            work = [(task, number) for task, numbers in chosen for number in numbers]
            for done, answered in enumerate(runner.all(work)):
                progress(loaded.name, done % total, total)
                for kind, number in answered.items():
                    counts[kind] += number
            for task, _ in chosen:
                runner.score(task)
            progress(loaded.name, total, total)
    return Summary(**counts)


def experiment_tasks(experiment: Experiment) -> list[tuple[TaskSpec, Task]]:
    """The tasks of an experiment, suites resolved.

    Raises:
        ConfigError: if a task is named twice. UnknownName, TaskError: for one that is not there,
            also the one to calibrate on.
    """
    if experiment.calibration is not None:
        load_task(experiment.calibration.task)  # known now, not after hours
    tasks = [
        (spec, t)
        for spec in experiment.tasks
        for t in load_tasks(spec.name, spec.data, experiment.judge)
    ]
    names = [task.name for _, task in tasks]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(
            f"{', '.join(twice)} would be asked twice: suites overlap, or two folders name their"
            " task alike; leave one out"
        )
    return tasks


def sample(task: Task, spec: TaskSpec, seed: int) -> Sequence[int]:
    """Numbers of the documents to ask, in the task's order; the same for every model and setting.

    Documents of one cluster are drawn together: at most as many as asked for, at least one cluster.
    """
    whole = range(len(task.documents))
    if spec.documents is None or spec.documents >= len(whole):
        return whole
    draw = random.Random(f"{seed}:{task.name}")
    if not task.clusters:
        return sorted(draw.sample(whole, spec.documents))
    members: dict[str, list[int]] = {}
    for number, cluster in enumerate(task.clusters):
        members.setdefault(cluster, []).append(number)
    chosen: list[int] = []
    for cluster in draw.sample(sorted(members), len(members)):
        if not chosen or len(chosen) + len(members[cluster]) <= spec.documents:
            chosen += members[cluster]
    return sorted(chosen)


class Asked(NamedTuple):
    """What records say of a question: its digest, and the cluster it belongs to."""

    digest: str
    cluster: str


def by_weights(settings: Sequence[Setting]) -> dict[tuple[Part, ...], list[Setting]]:
    """Settings by the weights they ask for, the original ones first."""
    groups: dict[tuple[Part, ...], list[Setting]] = {(): []}
    for setting in settings:
        groups.setdefault(setting.stage(Weights), []).append(setting)
    return {parts: some for parts, some in groups.items() if some}


class Runner:
    """Answers documents for one model; keeps one plan per set of settings still to do."""

    def __init__(
        self,
        store: RunStore,
        spec: ModelSpec,
        loaded: Loaded,
        settings: list[Setting],
        width: int,
        retry_failed: bool = False,
        calibration: CalibrationSpec | None = None,
        keep: bool = False,
    ) -> None:
        self.retry_failed, self.calibration = retry_failed, calibration
        self.keep, self.evidence = keep, Evidence(store.folder)
        self.weights: CompressedWeights | None = None
        parts = {part for setting in settings for part in setting.stage(Weights)}
        self.identities = {part: identity(calibration, part, spec) for part in parts}
        self.store, self.loaded, self.width, self.settings = store, loaded, width, settings
        self.spec, self.shape = spec, TextShape.of(loaded.model.get_decoder().config)
        self.plans: dict[tuple[Setting, ...], Plan] = {}
        self.plan(tuple(settings))  # refuses what the family cannot do before anything runs
        self.done: dict[Path, dict[str, bool]] = {}

    def plan(self, settings: tuple[Setting, ...]) -> Plan:
        """The sharing plan of some settings."""
        if settings not in self.plans:
            self.plans[settings] = Plan(self.loaded.model, settings, self.width, self.keep)
        return self.plans[settings]

    def path(self, setting: Setting, task: Task) -> Path:
        """Where answers go: the hash covers all that can change them."""
        model = self.spec.model_dump(exclude={"device", "without"})
        identity_of: dict[str, Any] = {
            "model": model,
            "setting": str(setting),
            "fields": repr(setting),
            "task": [task.name, task.version],
            "limit": task.max_new_tokens,
            "version": __version__,
        }
        for part in setting.stage(Weights):
            identity_of["weights"] = self.identities[part]
        return self.store.path(self.loaded.name, content_hash(identity_of), task.name)

    def all(self, work: Sequence[tuple[Task, int]]) -> Iterator[dict[str, int]]:
        """Ask every document (by its number) under every setting, weights by weights: those that no
        setting still needs are not made. Counts of every document, one weights part after the
        other.
        """
        for parts, some in by_weights(self.settings).items():
            with ExitStack() as stack:
                if parts and any(self._todo(t, t.documents[n], some) for t, n in work):
                    found = weights_for(self.loaded, self.spec, parts[0], self.calibration)
                    self.weights = stack.enter_context(found)
                for task, number in work:
                    yield self.answer(task, task.documents[number], some)
            self.weights = None

    def _todo(self, task: Task, document: Document, some: Sequence[Setting]) -> bool:
        return any(document.id not in self._before(self.path(s, task)) for s in some)

    def answer(
        self, task: Task, document: Document, some: Sequence[Setting] | None = None
    ) -> dict[str, int]:
        """Ask one document under every setting (or ``some``) that has not answered it; a failure is
        a record, never an empty answer.
        """
        counts = {"recorded": 0, "found": 0, "failed": 0}
        todo = []
        for setting in self.settings if some is None else some:
            before = self._before(self.path(setting, task))
            if document.id in before:
                counts["found"] += 1
                counts["failed"] += before[document.id]
            else:
                todo.append(setting)
        for outcome, asked in self._outcomes(task, document, tuple(todo)):
            record = self._record(task, document, outcome, asked)
            self.store.append(self.path(outcome.setting, task), record)
            if outcome.trace is not None:
                where = (record.model, record.setting, task.name, document.id)
                self.evidence.trace(*where, outcome.trace.compact())
            counts["recorded"] += 1
            counts["failed"] += record.failed
        return counts

    def _before(self, path: Path) -> dict[str, bool]:
        if path not in self.done:
            self.done[path] = self.store.done(path, self.retry_failed)
        return self.done[path]

    def _outcomes(
        self, task: Task, document: Document, todo: tuple[Setting, ...]
    ) -> Iterator[tuple[Outcome, Asked]]:
        if not todo:
            return
        try:
            question = framed(document.open(), self.spec.frames)
            inputs = prepare(self.loaded, question)
            check_length(self.loaded, inputs, task.max_new_tokens)
            self.evidence.show(task.name, document.id, question, document.answers)
            if self.keep:
                tiles = tiles_of(self.loaded, inputs)
                self.evidence.view(self.loaded.name, task.name, document.id, tiles)
        except Exception as error:
            log.warning("%s %s cannot be asked: %s", task.name, document.id, error)
            yield from ((Outcome(s, None, None, error), Asked("", "")) for s in todo)
            return
        declared = f"{task.name}:{document.cluster}" if document.cluster else ""
        asked = Asked(question.digest(), declared or question.media())
        for outcome in self.plan(todo).run(inputs, task.max_new_tokens, stop_ids(self.loaded)):
            yield outcome, asked

    def score(self, task: Task) -> None:
        """Score every setting's answers to a task, unless their scores are there."""
        for setting in self.settings:
            if (path := self.path(setting, task)).exists():
                score_file(path, task)

    def _record(
        self, task: Task, document: Document, outcome: Outcome, asked: Asked
    ) -> DocumentRecord:
        common = {
            "model": self.loaded.name,
            "setting": str(outcome.setting),
            "task": task.name,
            "document": document.id,
            "metric": task.scorer.name,
            "references": document.answers,
            **asked._asdict(),
        }
        if outcome.error is not None or outcome.generated is None or outcome.account is None:
            error = outcome.error or RuntimeError("no answer")
            log.error(
                "%s %s under %s failed", task.name, document.id, outcome.setting, exc_info=error
            )
            return DocumentRecord(
                **common,
                answer=None,
                new_tokens=0,
                finish="error",
                error={"type": type(error).__name__, "message": str(error)[:500]},
            )
        text = self.loaded.processor.tokenizer.decode(
            outcome.generated.tokens, skip_special_tokens=True
        ).strip()
        return DocumentRecord(
            **common,
            answer=text,
            new_tokens=len(outcome.generated.tokens),
            finish=outcome.generated.finish,
            error=None,
            cost=self._cost(outcome.account),
        )

    def _cost(self, account: Account) -> dict[str, Any]:
        """What an answer cost: counted in the tensors, and derived from shapes."""
        size = next(self.loaded.model.parameters()).element_size()
        cost = account.as_dict() | {
            "prefill_flops": self.shape.prefill_flops(account.tokens_per_layer),
            "decode_bytes_per_token": self.shape.decode_bytes(account.kv_bytes_held, size),
        }
        if self.weights is not None:
            held = self.weights.account
            cost["weights"] = held.as_dict()
            cost["decode_bytes_per_token"] -= held.bytes_before - held.bytes
        return cost
