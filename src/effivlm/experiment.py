"""The whole run on one screen: load, plan, answer every document under every setting, record,
report.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from effivlm import __version__
from effivlm.config import ConfigError, Experiment, ModelSpec, TaskSpec, dump_experiment
from effivlm.evidence import Evidence
from effivlm.families.loading import Loaded, load
from effivlm.measure.roofline import TextShape
from effivlm.provenance import environment
from effivlm.records import DocumentRecord, content_hash
from effivlm.runtime.plan import Outcome, Plan
from effivlm.setting import Setting
from effivlm.store import RunStore
from effivlm.tasks.builtin import Document, Task, load_suite, load_task, media_digest

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
    tasks = [(spec, load_task(name)) for spec in experiment.tasks for name in load_suite(spec.name)]
    counts = {"recorded": 0, "found": 0, "failed": 0}
    with RunStore(
        root / experiment.name,
        dump_experiment(experiment),
        experiment.model_dump(mode="json", exclude={"keep"}),
    ) as store:
        for spec in experiment.models:
            loaded = load_model(spec)
            store.note_environment(environment(str(loaded.model.device), "pil"))
            settings = experiment.settings_for(spec)
            runner = Runner(
                store, spec, loaded, settings, experiment.width, retry_failed, experiment.keep
            )
            work = [(task, d) for t, task in tasks for d in sample(task, t, experiment.seed)]
            for done, (task, document) in enumerate(work):
                progress(loaded.name, done, len(work))
                for kind, number in runner.answer(task, document).items():
                    counts[kind] += number
            progress(loaded.name, len(work), len(work))
    return Summary(**counts)


def load_model(spec: ModelSpec) -> Loaded:
    """The model of a specification; ``zoo:NAME`` is a checkpoint that ships with the package."""
    dtype = "float32" if spec.dtype == "auto" and spec.device == "cpu" else spec.dtype
    return load(spec.name, dtype, spec.attn, spec.device, spec.random_weights)


def sample(task: Task, spec: TaskSpec, seed: int) -> list[Document]:
    """The documents to ask, in the task's order; the same for every model and setting."""
    documents = list(task.documents)
    if spec.documents is None or spec.documents >= len(documents):
        return documents
    chosen = random.Random(f"{seed}:{task.name}").sample(range(len(documents)), spec.documents)
    return [documents[i] for i in sorted(chosen)]


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
        keep: bool = False,
    ) -> None:
        self.retry_failed, self.keep, self.evidence = retry_failed, keep, Evidence(store.folder)
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
        identity = {
            "model": model,
            "setting": str(setting),
            "fields": repr(setting),
            "task": [task.name, task.version, task.metric],
            "limit": task.max_new_tokens,
            "version": __version__,
        }
        return self.store.path(self.loaded.name, content_hash(identity), task.name)

    def answer(self, task: Task, document: Document) -> dict[str, int]:
        """Ask one document under every setting that has not answered it; a failure is a record,
        never an empty answer.
        """
        counts = {"recorded": 0, "found": 0, "failed": 0}
        todo = []
        for setting in self.settings:
            before = self._before(self.path(setting, task))
            if document.id in before:
                counts["found"] += 1
                counts["failed"] += before[document.id]
            else:
                todo.append(setting)
        for outcome, digest in self._outcomes(task, document, tuple(todo)):
            record = self._record(task, document, outcome, digest)
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
    ) -> Iterator[tuple[Outcome, str]]:
        if not todo:
            return
        try:
            images = [open_image() for open_image in document.images]
            inputs, digest = prepare(self.loaded, document, images), media_digest(images)
            self.evidence.show(task.name, document.id, document.prompt, document.answers, images)
            if self.keep:
                tiles = tiles_of(self.loaded, inputs)
                self.evidence.view(self.loaded.name, task.name, document.id, tiles)
        except Exception as error:
            log.warning("%s %s cannot be asked: %s", task.name, document.id, error)
            yield from ((Outcome(s, None, None, error), "") for s in todo)
            return
        digest = hashlib.sha256((document.prompt + digest).encode()).hexdigest()[:16]
        for outcome in self.plan(todo).run(inputs, task.max_new_tokens, stop_ids(self.loaded)):
            yield outcome, digest

    def _record(
        self, task: Task, document: Document, outcome: Outcome, digest: str
    ) -> DocumentRecord:
        common = {
            "model": self.loaded.name,
            "setting": str(outcome.setting),
            "task": task.name,
            "document": document.id,
            "metric": task.metric,
            "references": document.answers,
            "digest": digest,
        }
        if outcome.error is not None or outcome.generated is None or outcome.account is None:
            error = outcome.error or RuntimeError("no answer")
            log.error(
                "%s %s under %s failed", task.name, document.id, outcome.setting, exc_info=error
            )
            return DocumentRecord(
                **common,
                answer=None,
                score=None,
                new_tokens=0,
                finish="error",
                error={"type": type(error).__name__, "message": str(error)[:500]},
            )
        text = self.loaded.processor.tokenizer.decode(
            outcome.generated.tokens, skip_special_tokens=True
        ).strip()
        cost = outcome.account.as_dict()
        size = next(self.loaded.model.parameters()).element_size()
        cost |= {
            "prefill_flops": self.shape.prefill_flops(outcome.account.tokens_per_layer),
            "decode_bytes_per_token": self.shape.decode_bytes(outcome.account.kv_bytes_held, size),
        }
        return DocumentRecord(
            **common,
            answer=text,
            score=task.scorer(text, document.answers),
            new_tokens=len(outcome.generated.tokens),
            finish=outcome.generated.finish,
            error=None,
            cost=cost,
        )


def prepare(loaded: Loaded, document: Document, images: list[Any]) -> Mapping[str, torch.Tensor]:
    """Model inputs of one document, by the checkpoint's own chat template and processor."""
    text = loaded.processor.apply_chat_template(
        document.messages(), add_generation_prompt=True, tokenize=False
    )
    given = {"text": text, "return_tensors": "pt"} | (
        {"images": [images]} if images else {}
    )  # one list a prompt: several images
    inputs = loaded.processor(**given)
    device, dtype = loaded.model.device, loaded.model.dtype
    return {
        k: v.to(device, dtype) if v.is_floating_point() else v.to(device)
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor)
    }


def tiles_of(loaded: Loaded, inputs: Mapping[str, torch.Tensor]) -> list[Image.Image]:
    """Pictures of what the encoder is given, in the order of its tiles; none where images are
    packed into one sequence of patches, which shows them whole.
    """
    pixels = inputs.get("pixel_values")
    how: Any = getattr(loaded.processor, "image_processor", None)
    if pixels is None or pixels.ndim not in (4, 5) or getattr(how, "image_mean", None) is None:
        return []
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (how.image_mean, how.image_std))
    shown = pixels.flatten(0, -4).float().cpu() * std + mean
    bytes_ = (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(tile) for tile in bytes_]


def stop_ids(loaded: Loaded) -> list[int]:
    """Token ids that end an answer."""
    ids = loaded.model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [int(ids)]
