"""The public door: a model under a setting, with whatever the setting has to find out first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effivlm.methods.base import Weights
from effivlm.runtime.passage import Sample
from effivlm.runtime.session import Session
from effivlm.runtime.weight_files import load_weights
from effivlm.runtime.weights import compress_weights
from effivlm.setting import Setting, SettingError, parse_setting

Calibration = Sequence[Sample | Mapping[str, Any]] | str | Path


def compress(
    model: nn.Module, setting: Setting | str, calibration: Calibration | None = None
) -> Session:
    """A context manager under which ``model`` answers with a setting's compression.

    Weights are compressed here, before the block is entered, and put in for the block only: after
    it the model holds its own parameters again, the same objects.

    Args:
        model: a transformers vision-language model of a supported family; wrappers (PEFT,
            `torch.compile`, accelerate) may be around it.
        setting: a `Setting` or its text form, such as ``visionzip@0.1 + snapkv@0.4`` or
            ``wanda@0.5 + snapkv@0.4``.
        calibration: for a weights method that reads activations: model inputs of some prompts, each
            a mapping or a `Sample`, or the file that `effivlm calibrate` wrote.

    Raises:
        SettingError: for a setting that cannot be read or carried out.
        BudgetError: for a budget that no image could meet.
        UnknownName: for a method that is not there.
        UnsupportedCall: for a model that cannot be followed.
        WeightsError: for weights that cannot be compressed as asked.
    """
    read = parse_setting(setting) if isinstance(setting, str) else setting
    parts = read.stage(Weights)
    if not parts:
        if calibration is not None:
            raise SettingError(f"{read} compresses no weights: leave calibration out")
        return Session(model, read)
    Session(model, read)  # refuses what the family cannot do before anything is compressed
    if isinstance(calibration, str | Path):
        return Session(model, read, weights=load_weights(model, parts[0], Path(calibration)))
    samples = [x if isinstance(x, Sample) else Sample(x) for x in calibration or ()]
    kind = next(model.parameters()).dtype
    weights = compress_weights(model, parts[0], samples, fast=kind != torch.float64)
    return Session(model, read, weights=weights)
