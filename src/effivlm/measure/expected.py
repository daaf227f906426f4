"""Counts a setting leads to, from budgets alone: tokens entering every layer, entries in its
cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import (
    EncoderReducer,
    Format,
    IntraLLM,
    KVCache,
    KVFormat,
    Method,
    PreEncoder,
    PreLLM,
)
from effivlm.runtime.counts import entering
from effivlm.runtime.in_llm import plan_cuts
from effivlm.setting import Part, Setting


@dataclass(frozen=True)
class Expected:
    """Counts a setting leads to. ``tokens``: entering each decoder layer. ``kv``: prompt entries
    held per layer.

    Attributes:
        encoded: share of the patches that the encoder is given (resized images).
        form: how the entries are stored; None: element by element.
    """

    tokens: tuple[int, ...]
    kv: tuple[float, ...]
    encoded: float = 1.0
    form: Format | None = None


def expected(setting: Setting, layers: int, text: int, images: Sequence[int]) -> Expected:
    """Counts from budgets alone; the audit counts the same in the tensors.

    Methods that resize images or merge whole tiles in the encoder may keep a little less, for their
    counts have to fit a grid; the counts here are then upper bounds.

    Args:
        setting: what is predicted.
        layers: decoder layers.
        text: text tokens of the prompt.
        images: visual tokens of every image.

    Raises:
        BudgetError: for a method with a rule of its own and no budget, and for infeasible budgets.
    """
    entered: list[dict[str, int]] = [{} for _ in images]
    kept = [_before(setting, layers, n, entered[i]) for i, n in enumerate(images)]
    fake: Any = SimpleNamespace(
        images=[
            SimpleNamespace(slots=range(n), entered=e, last=False)
            for n, e in zip(images, entered, strict=True)
        ]
    )
    promise = plan_cuts(fake, [range(k) for k in kept], setting.stage(IntraLLM), layers)  # type: ignore[misc]
    tokens = [
        text + sum(_left(promise, number, k, i) for number, k in enumerate(kept))
        for i in range(layers)
    ]
    held = tuple(float(n) for n in _held(setting, tokens))
    return Expected(tuple(tokens), held, encoded_share(setting, images), form_of(setting))


def form_of(setting: Setting) -> Format | None:
    """How its cache is stored; None: element by element."""
    for part in setting.stage(KVFormat):
        assert isinstance(part.method, KVFormat)
        return part.method.format
    return None


def encoded_share(setting: Setting, images: Sequence[int]) -> float:
    """Share of the patches that the encoder is given."""
    for part in setting.stage(PreEncoder):
        return sum(_left_by(part, PreEncoder, 1, n) for n in images) / max(sum(images), 1)
    return 1.0


def _held(setting: Setting, tokens: Sequence[int]) -> list[int]:
    """Prompt entries each layer holds; over layers an allocator moves them about, but their sum
    stays.
    """
    for part in setting.stage(KVCache):
        budget = _budget(part)
        if budget.unit != "prompt_kv":  # a hybrid: its cache keeps what its last layer saw
            return [min(n, tokens[-1]) for n in tokens]
        return [budget.count(n) for n in tokens]
    return list(tokens)


def _before(setting: Setting, layers: int, n: int, entered: dict[str, int]) -> int:
    """Tokens of an image of ``n`` that enter the LLM; notes what every pre-LLM method was given."""
    full = n
    for part in setting.stage(PreEncoder):
        n = min(n, _left_by(part, PreEncoder, layers, n))
    for part in setting.stage(EncoderReducer):
        n = min(n, _left_by(part, EncoderReducer, layers, n))
    for part in setting.stage(PreLLM):
        entered[part.method.name] = full if part.at(EncoderReducer) else n
        n = min(n, _left_by(part, PreLLM, layers, n))
    return n


def _left_by(part: Part, stage: type[Method], layers: int, n: int) -> int:
    _budget(part)
    return entering(part, stage, layers, n)


def _left(promise: Any, number: int, kept: int, layer: int) -> int:
    cuts = [
        c.keep
        for at, here in promise.cuts.items()
        if at <= layer
        for c in here
        if c.image == number
    ]
    return min([kept, *cuts])


def _budget(part: Part) -> Budget:
    if part.budget is None:
        raise BudgetError(
            f"{part.method.name} without a budget decides while it runs: give it one to predict,"
            " such as @0.1"
        )
    return part.budget
