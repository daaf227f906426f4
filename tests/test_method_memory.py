"""No selection holds an N x N x D tensor: the largest one any method makes stays a few times N x N, or N x D."""

from typing import Any

import pytest
import torch
from layer_contexts import layer_tokens
from method_contexts import block_tokens, image_tokens
from tiny import build, prompt

from effivlm import registry
from effivlm.measure.memory import LargestTensor
from effivlm.methods.base import EncoderReducer, IntraLLM, PreLLM
from effivlm.methods.signals import Saliency
from effivlm.runtime.session import Session

torch.set_num_threads(1)
N, D = 256, 192
LIMIT = (
    16 * N * max(N, D)
)  # bytes: two float64, or four float32, of N x N; N x N x D would be 48 times that


def overriding(stage, hook):
    return sorted(
        n
        for n, c in registry.methods().items()
        if issubclass(c, stage) and getattr(c, hook) is not getattr(stage, hook)
    )


def check(select):
    with torch.inference_mode(), LargestTensor() as seen:
        select()
    assert seen.bytes <= LIMIT, f"a tensor of {seen.bytes / (4 * N * N):.1f} N x N"


@pytest.mark.parametrize("name", overriding(PreLLM, "select_image"))
@pytest.mark.parametrize("k", [25, 230])
def test_before_the_llm(name, k):
    method: Any = registry.methods()[name]()
    extra = {s: torch.rand(N) for s in method.signals if isinstance(s, Saliency)}
    tokens = image_tokens(method, rows=16, columns=16, width=D, values=extra)
    check(lambda: method.select_image(tokens, k))


@pytest.mark.parametrize("name", overriding(IntraLLM, "select_layer"))
@pytest.mark.parametrize("k", [25, 230])
def test_inside_the_llm(name, k):
    method: Any = registry.methods()[name]()
    tokens = layer_tokens(method, n=N, width=D)
    check(lambda: method.select_layer(tokens, k))


@pytest.mark.parametrize("name", overriding(EncoderReducer, "reduce_block"))
def test_inside_the_encoder(name):
    method: Any = registry.methods()[name]()
    tokens = block_tokens(rows=16, columns=16, width=D)
    check(lambda: method.reduce_block(tokens, 150))


def test_it_sees_a_large_tensor():
    x = torch.randn(N, D)
    with pytest.raises(AssertionError, match="N x N"):
        check(lambda: (x[:, None] * x).sum(-1))


READ_TEXT = [
    "fastv@0.3:rows=text",
    "adaptinfer@0.3",
    "sparsevlm@0.3",
    "sparsevlm@0.3:variant=plus",
    "sparsevlm_rank@0.3",
    "mustdrop@0.3",
]


@pytest.mark.parametrize("setting", READ_TEXT)
def test_text_rows_are_streamed(setting):
    """The image first, then a long text: no tensor of a session is larger than one block of rows in float32."""
    model, inputs = build("llava"), prompt("llava", 1, before=1, after=1600)
    with Session(model, setting), torch.inference_mode(), LargestTensor() as seen:
        model(**inputs)
    length, heads = inputs["input_ids"].shape[1], model.config.text_config.num_attention_heads
    assert seen.bytes <= 4 * heads * 256 * length, f"{seen.bytes / (4 * heads * length):.0f} rows"
