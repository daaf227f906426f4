"""A run that is only said: documents, settings, answers, least time and memory, what is missing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from effivlm.config import Experiment, ModelSpec
from effivlm.errors import EffivlmError
from effivlm.experiment import experiment_tasks, sample
from effivlm.families.checkpoint import Checkpoint, checkpoint_of, said_by
from effivlm.families.fitness import LoadError, check_device
from effivlm.families.loading import Loaded, load_processor
from effivlm.measure.peaks import measured
from effivlm.measure.roofline import TextShape
from effivlm.prompts import prepare
from effivlm.records import StoreError, read_run
from effivlm.runtime.plan import tree
from effivlm.runtime.support import check_supported
from effivlm.setting import Setting
from effivlm.tasks.base import Document
from effivlm.tasks.video import framed

GIB = 1 << 30


@dataclass(frozen=True)
class ModelPlan:
    """What one model would be asked.

    Attributes:
        model: as tables call it. documents: task -> how many. settings: how many.
        answers: to be recorded in all. found: of them, there already.
        seconds: at least, for all prefills and answers of the language model, or None where the
            checkpoint is not here. memory: bytes of weights and caches, or None.
        missing: what stops the run, or has to be downloaded first.
    """

    model: str
    documents: dict[str, int]
    settings: int
    answers: int
    found: int
    seconds: float | None
    memory: int | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do."""

    folder: str
    models: tuple[ModelPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """In words."""
        yield f"into {self.folder}"
        for m in self.models:
            total = sum(m.documents.values())
            yield f"{m.model}: {total} documents under {m.settings} settings: {m.answers} answers"
            yield "  documents: " + ", ".join(f"{t} {n}" for t, n in m.documents.items())
            if m.found:
                yield f"  {m.found} answers are there already"
            if m.seconds is not None and m.memory is not None:
                yield (
                    f"  at least {m.seconds:.0f} s (the language model at this device's peaks;"
                    f" small models take many times that), about {m.memory / GIB:.2f} GiB"
                )
            yield from (f"  missing: {text}" for text in m.missing)


def rehearse(experiment: Experiment, root: Path = Path("runs")) -> Rehearsal:
    """What a run of an experiment would do; nothing is loaded, asked or written.

    Raises:
        ConfigError, TaskError, UnknownName: for what the run would refuse by them.
    """
    tasks = experiment_tasks(experiment)
    chosen = {task.name: list(sample(task, spec, experiment.seed)) for spec, task in tasks}
    folder = root / experiment.name
    try:
        found = Counter(r.model for r in read_run(folder))
    except StoreError:
        found = Counter()
    plans: list[ModelPlan] = []
    for spec in experiment.models:
        settings = experiment.settings_for(spec)
        total = sum(map(len, chosen.values()))
        seconds, memory, missing = None, None, list(_missing(spec, settings))
        if not missing:
            first = [(t, t.documents[chosen[t.name][0]], len(chosen[t.name])) for _, t in tasks]
            try:
                seconds, memory = _estimate(spec, settings, first, experiment.width)
            except EffivlmError as error:
                missing.append(str(error))
            except Exception as error:  # whatever a damaged processor makes of a document
                missing.append(f"no document can be prepared: {said_by(error)}")
        plans.append(
            ModelPlan(
                spec.label,
                {name: len(documents) for name, documents in chosen.items()},
                len(settings),
                total * len(settings),
                found[spec.label],
                seconds,
                memory,
                tuple(missing),
            )
        )
    return Rehearsal(str(folder), tuple(plans))


def _missing(spec: ModelSpec, settings: list[Setting]) -> Iterator[str]:
    try:
        check_device(spec.device)
    except LoadError as error:
        yield str(error)
    if spec.random_weights:
        yield "random weights have no tokenizer and answer nothing: use `effivlm measure`"
        return
    try:
        known = checkpoint_of(spec.name)
    except EffivlmError as error:
        yield str(error)
        return
    try:
        layers = TextShape.of(known.config.text_config).layers
    except Exception as error:  # of sizes that no model can have
        yield f"the configuration of {known.name} describes no model: {said_by(error)}"
        return
    for setting in settings:
        try:
            check_supported(setting, known.family, layers)
        except EffivlmError as error:
            yield f"{setting}: {error}"


def _estimate(
    spec: ModelSpec, settings: list[Setting], first: list[Any], width: int
) -> tuple[float, int]:
    """Least seconds, and bytes, from the first document of every task."""
    known = checkpoint_of(spec.name)
    shape = TextShape.of(known.config.text_config)
    dtype = torch.float32 if spec.device == "cpu" else torch.bfloat16
    size = torch.empty(0, dtype=dtype).element_size()
    limits = measured(torch.device("cuda" if spec.device == "auto" else spec.device), dtype, 2)
    trunks = sum(map(len, tree(settings).values()))
    seconds, longest = 0.0, 0
    for task, document, count in first:
        length = _length(known, document, spec.frames)
        entered = [length] * shape.layers
        prefill = trunks * shape.prefill_work(entered, size).floor(limits)
        kept = [float(length)] * shape.layers
        decode = shape.decode_work(kept, task.max_new_tokens, size).floor(limits)
        seconds += count * (prefill + len(settings) * task.max_new_tokens * decode)
        longest = max(longest, length + task.max_new_tokens)
    caches = (width + trunks) * longest * shape.layers * shape.kv_entry(size)
    return seconds, known.weight_bytes + caches


def _length(known: Checkpoint, document: Document, frames: int) -> int:
    """Prompt tokens of one document; only the processor is loaded."""
    loaded = Loaded(_Nowhere(), load_processor(known.path), known.family, known.name)
    return int(prepare(loaded, framed(document.open(), frames))["input_ids"].shape[1])


class _Nowhere:
    """Stands for a model where only inputs are prepared."""

    device, dtype = torch.device("cpu"), torch.float32
