"""Stages timed apart: they sum to the total, a method's time is the method's, and what is held is counted."""

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny
import torch

from effivlm.budget import parse_budget
from effivlm.measure.clock import Clock
from effivlm.measure.timing import STAGES, Timer
from effivlm.methods.baselines import RandomPre
from effivlm.setting import Part, Setting, parse_setting

torch.set_num_threads(1)
SETTINGS = ("none", "visionzip@0.5", "fastv@0.5", "snapkv@0.3", "random_pre@0.5 + snapkv@0.5")


def once(model, setting, inputs, n=3):
    return Timer(model, setting if isinstance(setting, Setting) else parse_setting(setting)).once(
        lambda: inputs, n
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_stages_sum_to_the_total(setting):
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    timer = Timer(model, parse_setting(setting))
    samples = [timer.once(lambda: inputs, 4) for _ in range(5)][1:]
    shares = [sum(s.seconds[k] for k in STAGES) / s.seconds["total"] for s in samples]
    assert 0.98 <= np.median(shares) <= 1.0001, shares
    for s in samples:
        assert s.seconds["ttft"] == pytest.approx(
            s.seconds["vision"] + s.seconds["method"] + s.seconds["prefill"]
        )
        assert s.seconds["decode_per_token"] == pytest.approx(s.seconds["decode"] / 3)
        assert all(s.seconds[k] > 0 for k in ("vision", "method", "prefill", "decode"))


@dataclass(frozen=True)
class Sleepy(RandomPre):
    """Sleeps 10 ms in each image."""

    name = "sleepy"

    def select_image(self, tokens, k):
        time.sleep(0.01)
        return super().select_image(tokens, k)


def test_planted_sleep_is_method_time():
    model, inputs = tiny.build("llava"), tiny.prompt("llava", images=1)
    budget = parse_budget("0.5", "visual")
    fast, slow = (
        Timer(model, Setting((Part(RandomPre(), budget),))),
        Timer(model, Setting((Part(Sleepy(), budget),))),
    )
    pairs = [
        (fast.once(lambda: inputs, 2).seconds, slow.once(lambda: inputs, 2).seconds)
        for _ in range(14)
    ][2:]
    least = [
        {k: min(s[k] for s in mine) for k in mine[0]} for mine in zip(*pairs, strict=True)
    ]  # others' load only adds
    extra = {k: least[1][k] - least[0][k] for k in ("vision", "method", "prefill", "decode")}
    assert 0.0095 <= extra["method"] <= 0.015, extra
    assert all(extra[k] < 0.004 for k in ("vision", "prefill", "decode")), (
        extra
    )  # it is in no other stage


@pytest.mark.parametrize("family", ("llava_next", "qwen2_5_vl"))
@pytest.mark.parametrize("setting", ("none", "divprune@0.5", "tome@0.5", "fastv@0.5", "snapkv@0.3"))
def test_timed_run_is_the_run(family, setting):
    model, inputs = tiny.build(family), tiny.prompt(family)
    timer = Timer(model, parse_setting(setting))
    sample = timer.once(lambda: inputs, 5)
    with timer.session:
        tokens, _, cache = tiny.generate(model, inputs, 5)
    assert sample.tokens == tokens.tolist()
    assert timer.correct(lambda: inputs, sample)
    generated = 4 * sum(
        2 * x.keys.shape[1] * x.keys.shape[-1] * x.keys.element_size() for x in cache.layers
    )
    assert (
        sample.memory["kv"]
        == sum(sample.kv_per_layer)
        == sum(x.bytes_held() for x in cache.layers) - generated
    )
    assert sample.memory["kv"] >= sample.account.kv_bytes
    assert sample.memory["weights"] == sum(p.numel() * 4 for p in model.parameters()) + sum(
        b.nbytes for b in model.buffers()
    )
    assert sample.memory["resident"] > sample.memory["weights"]


def test_wrong_logits_are_not_correct():
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    timer = Timer(model, parse_setting("random_pre@0.5"))
    sample = timer.once(lambda: inputs, 2)
    for planted in (sample.logits[0, 0] + 0.5 * sample.logits.std(), torch.nan):
        logits = sample.logits.clone()
        logits[0, 0] = planted
        assert not timer.correct(lambda: inputs, replace(sample, logits=logits))


def test_clock_counts_nested_work_once():
    clock = Clock(torch.device("cpu"))
    model = clock.wrap("model", lambda: time.sleep(0.01))
    hook = clock.wrap("method", lambda: (time.sleep(0.01), model(), time.sleep(0.01)))
    clock.start()
    with clock.during("prefill"):
        time.sleep(0.01)
        hook()
    with clock.during("decode"):
        hook()
    out = clock.stop()
    assert 0.0195 < out["method"] and 0.0195 < out["prefill"] and 0.0295 < out["decode"]
    assert out["method"] + out["prefill"] < out["total"] - 0.029
    assert sum(v for k, v in out.items() if k != "total") == pytest.approx(out["total"], rel=0.01)


def test_hooks_go_when_a_method_fails():
    model, inputs = tiny.build("llava"), tiny.prompt("llava")

    class Broken(RandomPre):
        name = "broken"

        def select_image(self, tokens, k):
            raise ValueError("planted")

    timer = Timer(model, Setting((Part(Broken(), parse_budget("0.5", "visual")),)))
    with pytest.raises(ValueError, match="planted"):
        timer.once(lambda: inputs, 2)
    assert once(model, "none", inputs).tokens == tiny.generate(model, inputs, 3)[0].tolist()


@pytest.mark.parametrize("setting", ("none", "divprune@0.5", "snapkv@0.3"))
def test_a_batch_is_timed_as_it_is_generated(setting):
    model, inputs = (
        tiny.build("qwen2_vl"),
        tiny.batch("qwen2_vl", *[tiny.prompt("qwen2_vl", seed=s) for s in (0, 1, 2)]),
    )
    timer = Timer(model, parse_setting(setting))
    sample = timer.once(lambda: inputs, 4)
    assert [len(row) for row in sample.tokens] == [4, 4, 4] and timer.correct(
        lambda: inputs, sample
    )
    with timer.session:
        assert sample.tokens == tiny.generate(model, inputs, 4)[0].tolist()
