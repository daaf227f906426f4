"""One model asked: every document under every setting, each answer a record."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from effivlm import __version__
from effivlm.config import (
    CalibrationSpec,
    ModelSpec,
)
from effivlm.evaluation import score_file
from effivlm.evidence import Evidence
from effivlm.families.fitness import check_length
from effivlm.families.loading import Loaded
from effivlm.measure.roofline import TextShape
from effivlm.methods.base import Processing, Weights
from effivlm.prompts import prepare, prepare_within, stop_ids, tiles_of
from effivlm.records import DocumentRecord, content_hash
from effivlm.runtime.account import Account
from effivlm.runtime.plan import Outcome, Plan, grouped
from effivlm.runtime.support import check_supported
from effivlm.runtime.weights import CompressedWeights
from effivlm.setting import Setting
from effivlm.store import RunStore
from effivlm.tasks.base import Document, Question, Task
from effivlm.tasks.video import framed
from effivlm.weights_calibration import identity, weights_for

log = logging.getLogger("effivlm")


class Asked(NamedTuple):
    """What records say of a question: its digest, and the cluster it belongs to."""

    digest: str
    cluster: str


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
        self.plans: dict[tuple[tuple[Setting, ...], bool], Plan] = {}
        for setting in settings:
            check_supported(setting, loaded.family)
        for some in grouped(settings, Processing).values():
            Plan(loaded.model, [s.without(Processing) for s in some])  # refuses what it cannot do
        self.done: dict[Path, dict[str, bool]] = {}

    def plan(self, settings: tuple[Setting, ...], keep: bool = False) -> Plan:
        """The sharing plan of some settings."""
        if (settings, keep) not in self.plans:
            made = Plan(self.loaded.model, settings, self.width, keep)
            self.plans[settings, keep] = made
        return self.plans[settings, keep]

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
        for parts, some in grouped(self.settings, Weights).items():
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
        for some in grouped(todo, Processing).values():
            for outcome in self._processed(task, question, some, inputs):
                yield outcome, asked

    def _processed(
        self, task: Task, question: Question, some: list[Setting], inputs: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        """Settings that have images processed alike: ``inputs``, unless a part says otherwise.

        A trace of other pixels than those of the document's pictures is not kept.
        """
        parts = some[0].stage(Processing)
        limit, stop = task.max_new_tokens, stop_ids(self.loaded)
        try:
            found = prepare_within(self.loaded, question, parts[0]) if parts else None
            given = found.inputs if found else inputs
            check_length(self.loaded, given, limit)
        except Exception as error:
            yield from (Outcome(s, None, None, error) for s in some)
            return
        if found is None:
            yield from self.plan(tuple(some), self.keep).run(given, limit, stop)
            return
        whole: dict[Setting, list[Setting]] = {}
        for setting in some:
            whole.setdefault(setting.without(Processing), []).append(setting)
        for outcome in self.plan(tuple(whole)).run(given, limit, stop):
            yield from (found.told(replace(outcome, setting=s)) for s in whole[outcome.setting])

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
