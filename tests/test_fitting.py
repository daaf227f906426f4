"""Fitting commands: what the searches are fed equals separate runs and dense attention; the line printed is a setting."""

import pytest
import torch
from PIL import Image
from tiny import EACH, build, generate, prompt
from typer.testing import CliRunner

from effivlm import cli, fitting, registry
from effivlm.calibration import Shape, fit_deletions, tokens_left, withdrawal_layer
from effivlm.families.loading import Loaded
from effivlm.methods.intra_llm.fitprune import FitPrune
from effivlm.runtime.session import Session
from effivlm.setting import parse_setting
from effivlm.tasks.base import Document, Task, one_turn
from effivlm.tasks.per_answer import PerAnswer

torch.set_num_threads(1)


def blank():
    return Image.new("RGB", (8, 8))


@pytest.mark.parametrize("family", EACH)
def test_withdrawal_logits_are_those_of_separate_runs(family):
    model, inputs = build(family), prompt(family, 1)
    whole, withdrawn = fitting.withdrawal_logits(model, inputs)
    torch.testing.assert_close(whole, generate(model, inputs, 1)[1][0, 0], atol=1e-4, rtol=1e-4)
    assert list(withdrawn) == [1, 2, 3]
    for layer, logits in withdrawn.items():
        with Session(model, f"vtw:layer={layer}"):
            torch.testing.assert_close(
                logits, generate(model, inputs, 1)[1][0, 0], atol=1e-4, rtol=1e-4
            )
    assert not torch.allclose(withdrawn[1], whole, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl"])
def test_attention_received_is_the_dense_sum(family):
    model, inputs = build(family), prompt(family, 1)
    eager = build(family, "eager")
    with torch.no_grad():
        dense = eager(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == model.config.image_token_id
    text = torch.arange(len(visual)) > visual.nonzero().max()
    got = fitting.attention_received(model, inputs)
    assert len(got) == len(dense) == 4
    for (from_text, from_visual), attention in zip(got, dense, strict=True):
        top = attention[0].amax(0)  # [L, L], maximum over heads
        torch.testing.assert_close(from_text, top[text].sum(0)[visual], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(from_visual, top[visual].sum(0)[visual], atol=1e-5, rtol=1e-4)


def task_of(name, ids, pictures=1):
    """A task of questions that say their own id."""
    documents = tuple(
        Document(i, ("",), lambda i=i: one_turn(i, [blank()] * pictures)) for i in ids
    )
    return Task(name, "1", documents, PerAnswer("exact_match"), 4)


@pytest.fixture
def tiny_task(monkeypatch):
    """Three prompts of one image for a tiny model, behind a task and a checkpoint name."""
    model = build("llava")
    prompts = {str(i): prompt("llava", 1, seed=i, after=5 + i) for i in range(3)}
    monkeypatch.setattr(fitting, "load_task", lambda name: task_of(name, prompts))
    monkeypatch.setattr(
        fitting,
        "load_model",
        lambda spec: Loaded(model, None, registry.families()["llava"], "tiny"),
    )
    monkeypatch.setattr(fitting, "prepare", lambda loaded, question: prompts[question.text])
    return model, list(prompts.values())


def run(*arguments):
    return CliRunner().invoke(cli.app, ["calibrate", *arguments, "--task", "t", "--documents", "3"])


def test_vtw_prints_the_layer_of_the_search(tiny_task):
    model, prompts = tiny_task
    found = withdrawal_layer((fitting.withdrawal_logits(model, p) for p in prompts), 1e9)
    middle = sorted(found.divergence.values())[1]
    for eta in (1e9, middle, 0.0):
        layer = withdrawal_layer((fitting.withdrawal_logits(model, p) for p in prompts), eta).layer
        result = run("vtw", "model", "--eta", str(eta))
        assert result.exit_code == 0, result.output
        last = result.output.strip().splitlines()[-1]
        assert last == (
            f"vtw:layer={layer}"
            if layer
            else "no layer stays within 0.0 nats of the whole model: allow more with --eta"
        )


def test_fitprune_prints_a_setting_that_deletes_what_was_fitted(tiny_task):
    model, prompts = tiny_task
    result = run("fitprune", "model", "--reduction", "0.5")
    assert result.exit_code == 0, result.output
    setting = parse_setting(result.output.strip().splitlines()[-1])
    config = model.get_decoder().config
    samples = [fitting.attention_received(model, p) for p in prompts]
    deletions = fit_deletions(samples, 0.5, Shape(config.hidden_size, config.intermediate_size))
    n = len(samples[0][0][0])
    assert setting.parts[0].method == FitPrune(left=tokens_left(deletions, n))
    with Session(model, setting) as session:
        generate(model, prompts[0], 2)
    left = [n]
    for d in deletions:
        left.append(left[-1] - d)
    assert session.accounts[0].visual_per_layer[-1] < n, (
        "nothing was deleted: the test could not fail"
    )
    for got, want in zip(session.accounts[0].visual_per_layer, left, strict=False):
        assert want - 1 <= got <= want  # through counts of 576 and back


def test_what_cannot_be_calibrated_is_refused(tiny_task, monkeypatch):
    result = run("fastv@0.5", "model")
    assert result.exit_code == cli.USER_ERROR and "compresses no weights" in result.output
    monkeypatch.setattr(fitting, "load_task", lambda name: task_of(name, ["7"], pictures=2))
    result = run("vtw", "model")
    assert (
        result.exit_code == cli.USER_ERROR
        and "t 7 has 2 images: calibrate on documents with one" in result.output
    )
