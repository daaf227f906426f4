"""A run beside published figures."""

import pytest

from effivlm.reference import published
from effivlm.report.beside import beside, lines
from effivlm.scores import Metric, Scores


def scores(task, metric, value, scale=1.0, each=None, void="", **more):
    each = each or {"0": value / scale, "1": value / scale}
    return Scores(
        task,
        "1",
        (Metric(metric, scale=scale),),
        {metric: value, **more},
        each,
        9,
        len(each),
        void=void,
    )


LLAVA = "llava-hf/llava-1.5-7b-hf"


def test_figures_of_the_same_model_method_budget_and_benchmark():
    each = {str(i): float(i % 4 > 0) for i in range(100)}
    ours = {
        (LLAVA, "fastv@192", "textvqa_val"): scores("textvqa_val", "exact_match", 0.75, each=each),
        (LLAVA, "fastv@192:layer=5", "textvqa_val"): scores("textvqa_val", "exact_match", 0.5),
        (LLAVA, "fastv@33tok", "textvqa_val"): scores("textvqa_val", "exact_match", 0.5),
        ("llava-hf/llava-1.5-13b-hf", "snapkv@0.1", "textvqa_val"): scores(
            "textvqa_val", "exact_match", 0.5
        ),
    }
    (found,) = beside(ours)
    (theirs,) = [
        r
        for r in published("Polymorphic", 1)
        if (r.method, r.setting, r.benchmark) == ("FastV", "192 tokens", "TextVQA")
    ]
    assert found.theirs == theirs and found.ours == 75 and 6 < found.half < 11
    assert found.apart == pytest.approx((75 - theirs.value) / found.half)
    assert "75.0 ±" in list(lines([found]))[2] and "FastV 192 tokens" in list(lines([found]))[2]


def test_units_and_metrics_are_the_papers():
    model = "Qwen/Qwen2-VL-7B-Instruct"
    ours = {
        (model, "none", "mme"): scores(
            "mme", "mme_perception_score+mme_cognition_score", 2300.0, 2800.0
        ),
        (model, "none", "ocrbench"): scores("ocrbench", "ocrbench_accuracy", 0.8),
        (model, "none", "pope"): scores("pope", "pope_accuracy", 0.9, pope_f1_score=0.88),
    }
    found = {(p.theirs.source, p.theirs.benchmark): p.ours for p in beside(ours)}
    assert found["EffiVLM-Bench", "OCRBench"] == pytest.approx(800)
    assert found["EffiVLM-Bench", "MME"] == pytest.approx(2300)
    assert found["Polymorphic", "POPE-F1"] == pytest.approx(88)


def test_nothing_to_say_and_void_scores():
    key = ("Qwen/Qwen2-VL-7B-Instruct", "none", "ocrbench")
    assert not beside({key: scores("ocrbench", "ocrbench_accuracy", 0.8, void="the judge failed")})
    assert not beside({("tiny", "none", "ocrbench"): scores("ocrbench", "ocrbench_accuracy", 0.8)})
    assert "no published figure" in list(lines([]))[-1]
