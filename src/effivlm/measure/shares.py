"""What settings leave of a model's cost on a device, predicted from the published shape of its
name.
"""

import re
from collections.abc import Sequence

from effivlm.budget import BudgetError
from effivlm.errors import EffivlmError
from effivlm.families.loading import load, shapes
from effivlm.measure import peaks, workloads
from effivlm.measure.predict import Predictor
from effivlm.setting import parse_setting

WORKLOAD = "effivlm-bench"


class UnknownShape(EffivlmError, LookupError):
    """A model whose shape is not published here."""


def shape_of(model: str) -> str:
    """The published shape that a model's name holds, such as ``qwen2-vl-7b`` in
    ``Qwen/Qwen2-VL-7B-Instruct``.

    Raises:
        UnknownShape: if there is none.
    """
    names = sorted(shapes(), key=len, reverse=True)
    for name in names:
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", model.lower()):
            return name
    raise UnknownShape(
        f"{model} cannot be predicted: its name holds no published shape (effivlm list models);"
        " measure it, or leave --device out to go by what was counted"
    )


def predicted_shares(
    model: str, settings: Sequence[str], what: str, device: str
) -> dict[str, float | str]:
    """Shares of the original for one prompt of `WORKLOAD` in bfloat16.

    Args:
        model: see `shape_of`.
        settings: in text form.
        what: attribute of `predict.Prediction`.
        device: see `peaks.stated`.

    Returns:
        Setting -> share, or why it cannot be predicted.

    Raises:
        UnknownShape, UnknownName: for what is not known.
    """
    limits, work, shape = peaks.stated(device), workloads.workload(WORKLOAD), shape_of(model)
    loaded = load(shape, "bfloat16", device="meta", random_weights=True)
    inputs = workloads.prompts(
        work, loaded.family, loaded.model.config, 1, workloads.image_sizes(shape)
    )
    predictor = Predictor(loaded.model, loaded.family, inputs, work.new_tokens, 2)
    whole = getattr(predictor.predict(parse_setting("none"), limits), what)
    out: dict[str, float | str] = {}
    for text in settings:
        try:
            out[text] = getattr(predictor.predict(parse_setting(text), limits), what) / whole
        except BudgetError as error:
            out[text] = str(error)
    return out
