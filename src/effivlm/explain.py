"""One document again under one setting, with what became of every visual token."""

from collections.abc import Iterator
from pathlib import Path

import torch

from effivlm.config import Experiment, load_experiment
from effivlm.errors import EffivlmError
from effivlm.evidence import Evidence
from effivlm.experiment import experiment_tasks, sample
from effivlm.families.loading import Loaded
from effivlm.methods.base import Processing
from effivlm.prompts import load_model, prepare, stop_ids, tiles_of
from effivlm.runtime.plan import Outcome, Plan
from effivlm.runtime.trace import ImageTrace, PromptTrace
from effivlm.setting import parse_setting
from effivlm.tasks.base import Document, Task
from effivlm.tasks.video import framed

KEPT, MERGED, DROPPED = "#", "+", "."


class ExplainError(EffivlmError, LookupError):
    """A document or setting that the run cannot be asked for."""


def explain(folder: Path, document: str, setting: str) -> Iterator[str]:
    """Ask every model of a run one document under one setting; records the traces, which the page
    draws for settings of the run, and says in lines what was kept.

    Args:
        folder: of the run.
        document: its id, or ``TASK/ID``.
        setting: in text form.

    Raises:
        ExplainError: where there is no such document, or several; SettingError, ConfigError, and
            whatever stops the model from answering.
    """
    experiment, asked = load_experiment(folder / "experiment.yaml"), parse_setting(setting)
    task, found = _find(experiment, document)
    if native := asked.stage(Processing):
        raise ExplainError(
            f"{native[0]} sends the model other pixels and drops no token: there is nothing to"
            " explain; leave it out"
        )
    opened, evidence = found.open(), Evidence(folder)
    for spec in experiment.models:
        if {p.method.name for p in asked.parts} & set(spec.without):
            continue
        loaded = load_model(spec)
        plan = Plan(loaded.model, [asked], keep=True)
        question = framed(opened, spec.frames)
        evidence.show(task.name, found.id, question, found.answers)
        inputs = prepare(loaded, question)
        evidence.view(loaded.name, task.name, found.id, tiles_of(loaded, inputs))
        outcome = next(iter(plan.run(inputs, task.max_new_tokens, stop_ids(loaded))))
        trace = _trace(outcome)
        evidence.trace(loaded.name, str(asked), task.name, found.id, trace.compact())
        yield f"{loaded.name}, {asked}, {task.name}/{found.id}: {_answer(loaded, outcome)!r}"
        yield from _drawn(trace)


def _find(experiment: Experiment, document: str) -> tuple[Task, Document]:
    tasks = experiment_tasks(experiment)
    found = [
        (task, d)
        for spec, task in tasks
        for d in (task.documents[n] for n in sample(task, spec, experiment.seed))
        if document in (d.id, f"{task.name}/{d.id}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{t.name}/{d.id}" for t, d in found)
        raise ExplainError(f"{document!r} names several documents of this run: say {names}")
    raise ExplainError(
        f"this run asked no document {document!r}: expected an id, or TASK/ID, as the page lists"
        f" them; its tasks are {', '.join(t.name for _, t in tasks)}"
    )


def _trace(outcome: Outcome) -> PromptTrace:
    if outcome.error is not None:
        raise outcome.error
    assert outcome.trace is not None
    return outcome.trace


def _answer(loaded: Loaded, outcome: Outcome) -> str:
    assert outcome.generated is not None
    tokens = outcome.generated.tokens
    return loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _drawn(trace: PromptTrace) -> Iterator[str]:
    """Every image at the last layer, as characters, and counts by layer."""
    for number, image in enumerate(trace.images):
        counts = image.layers.sum(1).tolist()
        yield f"picture {number + 1}: {len(image.place)} visual tokens, entering layers: {counts}"
        if image.cache is not None:
            held = image.cache.float().sum(2).mean(1)
            yield f"  in the cache, mean over heads: {[round(float(x), 1) for x in held]}"
        for unit in image.unit.unique().tolist():
            yield from (f"  {line}" for line in _grid(image, unit))
    yield f"{KEPT} in play at the last layer, {MERGED} merged into another token, {DROPPED} dropped"


def _grid(image: ImageTrace, unit: int) -> list[str]:
    mine = ((image.unit == unit) & image.place.isfinite().all(1)).nonzero()[:, 0]
    if not len(mine):
        return []
    rows, columns = (int(x) + 1 for x in image.place[mine].max(0).values.tolist())
    lines = [[" "] * columns for _ in range(rows)]
    sources = [source for _, _, source in image.merged]
    gone = set(torch.cat(sources).tolist()) if sources else set[int]()
    for i in mine.tolist():
        row, column = (int(x) for x in image.place[i].tolist())
        kept = bool(image.layers[-1, i])
        lines[row][column] = KEPT if kept else MERGED if i in gone else DROPPED
    return ["".join(line) for line in lines]
