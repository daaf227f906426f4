"""Calibration samples and compressed weights of a loaded model: prompts of a task with their
answers, and the files `effivlm calibrate` writes.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from effivlm import __version__
from effivlm.config import CalibrationSpec, ModelSpec
from effivlm.families.loading import Loaded
from effivlm.methods.base import Weights
from effivlm.methods.linears import WeightsError
from effivlm.prompts import load_model, prepare, stop_ids
from effivlm.records import content_hash
from effivlm.runtime.passage import Sample
from effivlm.runtime.weight_files import load_weights, save_weights
from effivlm.runtime.weights import CompressedWeights, compress_weights, reads_samples
from effivlm.setting import Part, SettingError, parse_setting
from effivlm.tasks.base import Document
from effivlm.tasks.loading import load_task


def documents_of(spec: CalibrationSpec) -> list[Document]:
    """The documents to calibrate on: as many as asked, or all there are, by a seed."""
    documents = load_task(spec.task).documents
    count = min(spec.samples, len(documents))
    chosen = random.Random(f"{spec.seed}:{spec.task}").sample(range(len(documents)), count)
    return [documents[i] for i in sorted(chosen)]


def samples(loaded: Loaded, spec: CalibrationSpec) -> list[Sample]:
    """Prompts in the model's own chat template, each with its first answer and the end token.

    Raises:
        WeightsError: for a document that cannot be read.
    """
    out: list[Sample] = []
    for document in documents_of(spec):
        try:
            inputs = prepare(loaded, document.open())
        except Exception as error:
            raise WeightsError(
                f"calibration sample {spec.task} {document.id} cannot be read: {error}"
            ) from error
        out.append(answered(loaded, inputs, document.answers[0] if document.answers else ""))
    return out


def answered(loaded: Loaded, inputs: Any, answer: str) -> Sample:
    """A prompt with an answer behind it."""
    ids = loaded.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*ids, *stop_ids(loaded)[:1]]], device=inputs["input_ids"].device)
    shape, longer = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tail = more.get(name, torch.zeros_like(ids)).to(value.dtype)
            longer[name] = torch.cat([value, tail], 1)
    return Sample(longer, ids.shape[1])


def identity(spec: CalibrationSpec | None, part: Part, model: ModelSpec) -> dict[str, Any]:
    """Plain data on all that a part's compressed weights depend on."""
    spec, read = spec or CalibrationSpec(), dict[str, Any]()
    if reads_samples(part):
        ids = content_hash({"ids": [d.id for d in documents_of(spec)]})
        read = {"task": [spec.task, load_task(spec.task).version, ids], "seed": spec.seed}
    return read | {
        "part": repr(part),
        "model": model.model_dump(exclude={"device", "without", "attn"}),
        "version": __version__,
    }


def weights_for(
    loaded: Loaded, model: ModelSpec, part: Part, spec: CalibrationSpec | None, fast: bool = False
) -> CompressedWeights:
    """A part's compressed weights: from the folder of files, or found now.

    Raises:
        WeightsError: for weights, samples or a file that do not fit.
    """
    spec = spec or CalibrationSpec()
    if spec.files is not None:
        path = file_of(spec, part, model)
        if path.exists():
            return load_weights(loaded.model, part, path, fast)
    given = samples(loaded, spec) if reads_samples(part) else []
    return compress_weights(loaded.model, part, given, fast)


def file_of(spec: CalibrationSpec, part: Part, model: ModelSpec) -> Path:
    """Where a part's compressed weights are: by all that they depend on."""
    assert spec.files is not None
    name = f"{part.method.name}-{content_hash(identity(spec, part, model))}.safetensors"
    return Path(spec.files) / name


def calibrate(setting: str, model: ModelSpec, spec: CalibrationSpec) -> Iterator[str]:
    """Find a setting's compressed weights and write them into ``spec.files``; lines about it.

    Raises:
        SettingError: for a setting without a weights method.
    """
    parts = parse_setting(setting).stage(Weights)
    if not parts:
        raise SettingError(f"{setting} compresses no weights: there is nothing to calibrate")
    path = file_of(spec, parts[0], model)
    loaded = load_model(model)
    found = weights_for(loaded, model, parts[0], replace_files(spec))
    save_weights(found, path, identity(spec, parts[0], model))
    account = found.account
    yield (
        f"{parts[0]}: {account.nonzero:,} of {account.weights:,} weights are not 0,"
        f" {account.bytes:,} of {account.bytes_before:,} bytes"
    )
    yield str(path)


def replace_files(spec: CalibrationSpec) -> CalibrationSpec:
    """The same calibration, done anew."""
    return spec.model_copy(update={"files": None})
