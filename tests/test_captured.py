"""Decoding in fixed slots gives the tokens of plain decoding, whatever the layers hold."""

from dataclasses import replace

import pytest
import tiny
import torch

from effivlm.runtime import generate
from effivlm.runtime.cache import fork
from effivlm.runtime.captured import FixedDecoder
from effivlm.runtime.plan import Plan
from effivlm.runtime.session import Session
from effivlm.setting import Setting, parse_setting

torch.set_num_threads(1)


def prefilled(model, setting, inputs):
    with Session(model, setting) as session:
        return generate.prefill(session, inputs, generate.encode(session, inputs))


def plain(model, done, limit, stop=()):
    with Session(model, Setting(())) as session:
        return generate.decode(
            session, [replace(d, cache=fork(d.cache)) for d in done], limit, stop
        )


@pytest.mark.parametrize(
    "family", ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3")
)
@pytest.mark.parametrize(
    "setting",
    (
        "none",
        "divprune@0.5",
        "fastv@0.3",
        "snapkv@0.3",
        "adakv@0.3",
        "pyramidkv@0.3",
        "divprune@0.5:positions=repack",
    ),
)
def test_same_tokens_as_plain_decoding(family, setting):
    model, inputs = tiny.build(family, dtype=torch.float64), tiny.prompt(family)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    done = prefilled(model, setting, inputs)
    entries = [layer.keys.clone() for layer in done.cache.layers]
    want = plain(model, [done], 9)
    decoder = FixedDecoder(model, [done], 9)
    assert decoder.run((), graph=False) == want
    assert decoder.run((), graph=False) == want  # again: the slots are written anew
    assert all(torch.equal(a, x.keys) for a, x in zip(entries, done.cache.layers, strict=True))


def test_rows_of_different_length_and_stop_tokens():
    model = tiny.build("qwen2_vl", dtype=torch.float64)
    inputs = tiny.batch(
        "qwen2_vl", tiny.prompt("qwen2_vl", images=1), tiny.prompt("qwen2_vl", images=2, seed=3)
    )
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    done = prefilled(model, "divprune@0.4 + adakv@0.4", inputs)
    want = plain(model, [done], 8)
    stop = want[0].tokens[4]
    assert FixedDecoder(model, [done], 8).run((), graph=False) == want
    assert FixedDecoder(model, [done], 8).run((stop,), graph=False) == plain(
        model, [done], 8, (stop,)
    )
    two = [
        prefilled(model, s, dict(tiny.prompt("qwen2_vl")) | _double("qwen2_vl"))
        for s in ("none", "snapkv@0.3")
    ]
    assert FixedDecoder(model, two, 6).run((), graph=False) == plain(model, two, 6)


def _double(family):
    return {k: v.double() for k, v in tiny.prompt(family).items() if v.is_floating_point()}


def test_attention_table_is_restored_and_windows_are_refused():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = tiny.build("llava"), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    decoder = FixedDecoder(model, [prefilled(model, "none", tiny.prompt("llava"))], 3)
    decoder.sites.clear()
    with pytest.raises(KeyError):
        decoder.run((), graph=False)
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    gemma = tiny.build("gemma3")
    with pytest.raises(NotImplementedError, match="sliding windows"):
        FixedDecoder(gemma, [prefilled(gemma, "none", tiny.prompt("gemma3"))], 3)


def test_plan_answers_are_unchanged():
    """`finished` is shared with plain decoding."""
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    (outcome,) = Plan(model, [parse_setting("none")]).run(inputs, 5, [])
    assert outcome.generated.tokens == tiny.generate(model, inputs, 5)[0][0].tolist()
