"""What a prefill asks of the host: a number of waits that does not grow with depth, and few operations a layer."""

import functools

import pytest
import torch

from effivlm import registry
from effivlm.families.tiny import deep, prompt
from effivlm.measure.traffic import Traffic
from effivlm.methods.base import IntraLLM, KVCache
from effivlm.runtime.session import Session

FAMILY, DEPTHS = "qwen2_vl", (4, 28)
A_LAYER = {"snapkv": 50, "h2o": 60}  # operations that a method may add to a layer's own
# each cut inside the LLM asks again, and deeper models may be cut more often
CACHE = sorted(
    name
    for name, kind in registry.methods().items()
    if issubclass(kind, KVCache) and not issubclass(kind, IntraLLM)
)


@functools.cache
def traffic(text, layers):
    """Waits and operations of one prefill; without a setting of the plain model."""
    inputs = prompt(FAMILY, 2)
    call = functools.partial(deep(FAMILY, layers), **inputs, use_cache=True, logits_to_keep=1)
    with torch.no_grad(), Traffic() as seen:
        if text is None:
            call()
        else:
            with Session(deep(FAMILY, layers), text):
                call()
    return seen.waits, seen.operations


def setting(name):
    method = registry.methods()[name]
    return name if method.budget == "none" else f"{name}@0.3"


@pytest.mark.parametrize("name", [*CACHE, "visionzip", "divprune"])
def test_a_prefill_waits_no_more_often_in_a_deeper_model(name):
    text = setting(name)
    (few, less), (many, more) = (traffic(text, layers) for layers in DEPTHS)
    (_, least), (_, most) = (traffic(None, layers) for layers in DEPTHS)
    assert many == few, f"{text}: {few} waits at {DEPTHS[0]} layers, {many} at {DEPTHS[1]}"
    added = (more - less) - (most - least)
    assert added <= A_LAYER.get(name, 200) * (DEPTHS[1] - DEPTHS[0]), f"{text}: {added} operations"


def test_waits_are_counted():
    """Every way a number, or a shape, leaves a tensor."""
    x = torch.tensor([3, 0, 5])
    reads = (
        lambda: int(x[0]),
        lambda: bool(x.any()),
        lambda: float(x.sum()),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.masked_select(x > 1),
        lambda: x.unique(),
        lambda: torch.equal(x, x),
        lambda: x.numpy(),
        lambda: x.repeat_interleave(x),
    )
    for number, read in enumerate(reads):
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode, Traffic() as seen:
                read()
            assert seen.waits >= 1, number
    with Traffic() as seen:
        x[1:].sort().values[torch.tensor([0, 1])].sum()
    assert seen.waits == 0 and seen.operations >= 4
