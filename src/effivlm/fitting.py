"""Fits methods to a model on documents of a task: VTW's layer and FitPrune's curve, by the searches
of `calibration`.

effivlm calibrate vtw zoo:mini-qwen2-vl --task scene_qa --documents 20
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effivlm import registry
from effivlm.budget import parse_budget
from effivlm.calibration import Shape, Statistics, fit_deletions, tokens_left, withdrawal_layer
from effivlm.config import ModelSpec, TaskSpec
from effivlm.experiment import sample
from effivlm.families.loading import Loaded
from effivlm.measure.roofline import TextShape
from effivlm.methods.base import KVCache, LayerCache, Paper
from effivlm.methods.intra_llm.fitprune import FitPrune
from effivlm.methods.intra_llm.vtw import VTW
from effivlm.methods.signals import HeadMaxSums, Signal
from effivlm.prompts import load_model, prepare
from effivlm.runtime.generate import encode, prefill, resume
from effivlm.runtime.session import Session
from effivlm.setting import Part, Setting
from effivlm.tasks.base import TaskError
from effivlm.tasks.loading import load_task

Inputs = Mapping[str, Any]
TEXT, VISUAL = HeadMaxSums(rows="text"), HeadMaxSums(rows="visual")


def fit_vtw(loaded: Loaded, prompts: Iterator[Inputs], eta: float) -> Iterator[str]:
    """Lines: the mean divergence of every layer, and the setting of the first that can do without
    visual tokens.
    """
    found = withdrawal_layer((withdrawal_logits(loaded.model, p) for p in prompts), eta)
    yield from (
        f"without visual tokens from layer {k} on: {d:.5f} nats"
        for k, d in found.divergence.items()
    )
    if found.layer is None:
        yield f"no layer stays within {eta} nats of the whole model: allow more with --eta"
    else:
        yield str(Setting((Part(VTW(layer=found.layer), None),)))


def fit_fitprune(loaded: Loaded, prompts: Iterator[Inputs], reduction: float) -> Iterator[str]:
    """Lines: tokens deleted per layer, and the setting with the fitted curve; budgets
    (``fitprune@0.2:left=...``) scale it.
    """
    shape = TextShape.of(loaded.model.get_decoder().config)
    samples = [attention_received(loaded.model, p) for p in prompts]
    deletions = fit_deletions(samples, reduction, Shape(shape.hidden, shape.inter))
    length = round(sum(len(layers[0][0]) for layers in samples) / len(samples))
    yield (
        f"of {length} tokens (mean of {len(samples)} prompts) deleted after each layer:"
        f" {', '.join(map(str, deletions))}"
    )
    yield str(Setting((Part(FitPrune(left=tokens_left(deletions, length)), None),)))


def calibrate(
    method: str,
    model: str,
    task: str,
    documents: int,
    eta: float,
    reduction: float,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[str]:
    """Fit a method to a model on the first ``documents`` documents that an experiment would sample.

    Args:
        method: ``vtw`` or ``fitprune``.
        model: as in an experiment.
        task: of documents with one image.
        documents: how many.
        eta: most nats that VTW's layer may cost.
        reduction: share of the decoder's cost that FitPrune is to save.
        progress: called with the number of documents begun.

    Yields:
        What was found; the last line is a setting in text form.

    Raises:
        LoadError, TaskError, UnknownName: for a model, task or document that cannot be used.
    """
    fit = registry.lookup("method to calibrate", method, {"vtw": fit_vtw, "fitprune": fit_fitprune})
    spec = TaskSpec(name=task, documents=documents)
    found = load_task(task)
    chosen = [found.documents[i] for i in sample(found, spec, seed=0)]
    loaded = load_model(ModelSpec(name=model))

    def prompts() -> Iterator[Inputs]:
        for number, document in enumerate(chosen, start=1):
            question = document.open()
            if len(question.images) != 1:
                raise TaskError(
                    f"{task} {document.id} has {len(question.images)} images: calibrate on"
                    " documents with one"
                )
            progress(number)
            yield prepare(loaded, question)

    yield from fit(loaded, prompts(), eta if method == "vtw" else reduction)


# -------------------------------------------------------------------------------- driving the model
def withdrawal_logits(model: nn.Module, inputs: Inputs) -> tuple[Tensor, dict[int, Tensor]]:
    """[V] logits of the next token with all visual tokens, and those without them from every layer
    on but the first.

    One prefill; every candidate resumes from the layer at which it withdraws.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    settings = {k: Setting((Part(VTW(layer=k), None),)) for k in range(1, len(decoder.layers))}
    with Session(model, Setting(()), trunk=True, branches=list(settings.values())) as session:
        whole = prefill(session, inputs, encode(session, inputs))
        return whole.logits[0], {
            k: resume(session, whole, s).logits[0] for k, s in settings.items()
        }


def attention_received(model: nn.Module, inputs: Inputs) -> list[Statistics]:
    """Per layer of the unpruned model, what each visual token receives from text and from visual
    rows: [N], [N].
    """
    part = Part(_Reader(), parse_budget("1.0", "prompt_kv"))
    with Session(model, Setting(()), watch=[part]) as session:
        done = prefill(session, inputs, encode(session, inputs))
    return done.state.notes[(_Reader.name, 0)]["layers"]


@dataclass(frozen=True)
class _Reader(KVCache):
    """Keeps everything, and notes attention received as every layer's prefill ends."""

    name: ClassVar[str] = "fitprune_statistics"
    paper: ClassVar[Paper] = FitPrune.paper

    @property
    def signals(self) -> frozenset[Signal]:
        """FitPrune's."""
        return frozenset({TEXT, VISUAL})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Note both statistics; nothing is chosen by the zeros returned."""
        visual = cache.image >= 0
        cache.notes.setdefault("layers", []).append(
            (cache[TEXT][visual].cpu(), cache[VISUAL][visual].cpu())
        )
        return torch.zeros(cache.keys.shape[:2], device=cache.keys.device)
