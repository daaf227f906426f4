"""Official benchmarks: answers of the sharing pass, scored as lmms-eval itself scores them.

Needs `make benchmarks`; `make benchmarks-test` runs it.
"""

import argparse
import contextlib
import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make benchmarks", exc_type=ImportError)
pytestmark = [pytest.mark.filterwarnings("ignore")]

import official_rows
from judge_server import KEY, judge_server

from effivlm.config import JudgeSpec, ModelSpec, build_experiment
from effivlm.evaluation import score_run
from effivlm.experiment import run
from effivlm.prompts import load_model
from effivlm.records import read_run, read_totals
from effivlm.scores import Answered
from effivlm.tasks.base import TaskError
from effivlm.tasks.loading import load_task, official_tasks
from effivlm.tasks.video import frames

torch.set_num_threads(1)
KNOWN = official_tasks()
JAVA = {"flickr30k_test", "coco2017_cap_val"}  # a minute each, in Java
TASKS = [t for t in official_rows.ROWS if t not in JAVA]
JUDGED = [t for t in TASKS if KNOWN[t].judge]
COMPARED = ["mme", "pope", "docvqa_val", "chartqa", "mmmu_val", "mmbench_en_dev_static", "ocrbench", "mvbench_moving_count"]  # fmt: skip
SETTINGS = ["none", "visionzip@0.3", "snapkv@0.3", "fastv@0.3"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Rows of every task in a folder of its own, and videos where they are looked for."""
    import datasets
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("official")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
        datasets.disable_progress_bars()
        for name in TASKS:
            official_rows.write(home, name, KNOWN[name].split)
        official_rows.write_videos(home / "hf")
        yield home


@pytest.fixture(scope="session")
def loaded(data):
    """Tasks by name; every one is opened once."""
    found = {}

    def load(name):
        if name not in found:
            spec = JudgeSpec(url="http://127.0.0.1:9", model="m") if KNOWN[name].judge else None
            found[name] = load_task(name, data / name, spec)
        return found[name]

    return load


def answers(task, texts):
    documents = [task.documents[i] for i in range(len(task.documents))]
    return [Answered(d.id, t, d.answers, 1) for d, t in zip(documents, texts, strict=True)]


def right(name, task):
    """The right answer to every document."""
    if name in ("mvbench_moving_count", "egoschema_subset", "longvideobench_val_v"):
        return [f"({'ABCD'[i % 4]})" for i in range(len(task.documents))]
    if name == "mvbench_object_existence":
        return ["(A)" if d.answers[0] == "yes" else "(B)" for d in task.documents]
    if name == "multidocvqa_val":
        return [re.sub(r"[\[\]']", "", d.answers[0]) for d in task.documents]
    return [d.answers[0] for d in task.documents]


PLAIN = [t for t in TASKS if not KNOWN[t].judge]
OF_ALL = {"ocrbench": 4 / 1000, "mme": 400 / 2800, "mlvu_dev": 2 / 7}  # of the whole benchmark


@pytest.mark.parametrize("name", PLAIN)
def test_right_answers_score_full_and_failures_nothing(loaded, name):
    task = loaded(name)
    full = task.scorer.score(answers(task, right(name, task)))
    best = KNOWN[name].scale * OF_ALL.get(name, 1)
    assert full.total[task.scorer.name] == pytest.approx(best) and not full.void
    assert {None if e is None else round(e, 4) for e in full.each} <= {None, 1.0, round(1 / 7, 4)}
    failed = task.scorer.score(answers(task, [None] * len(task.documents)))
    assert failed.total.get(task.scorer.name, 0.0) == 0 and set(failed.each) == {0.0}


def test_the_same_answers_score_the_same_whenever_they_are_scored(loaded):
    """OCRBench counts in a module's dictionary; a second setting must not find the first's counts."""
    task = loaded("ocrbench")
    texts = right("ocrbench", task)
    first = task.scorer.score(answers(task, texts))
    for other in (["x"] * 4, [*texts[:2], "x", None]):
        task.scorer.score(answers(task, other))
        assert task.scorer.score(answers(task, texts)) == first
    shuffled = answers(task, texts)
    random.Random(0).shuffle(shuffled)
    assert task.scorer.score(shuffled).total == first.total


def test_failures_do_not_leave_the_denominator(loaded):
    """MVBench drops empty answers; a failed document must not be dropped, nor guessed at."""
    task = loaded("mvbench_moving_count")
    texts = right("mvbench_moving_count", task)
    some = task.scorer.score(answers(task, [texts[0], None, None, None]))
    assert some.total["mvbench_accuracy"] == 25 and some.each == [1.0, 0.0, 0.0, 0.0]
    empty = task.scorer.score(answers(task, [texts[0], "", "", ""]))
    assert empty.total["mvbench_accuracy"] > 25, "lmms-eval mended it: drop the counts of empties"


def test_some_documents_are_scored_as_if_they_were_all(loaded):
    task = loaded("docvqa_val")
    given = answers(task, right("docvqa_val", task))
    assert task.scorer.score([given[3], given[1]]).total == {"anls": 1.0}
    wrong = [given[3], Answered("1", "zzzzzz", given[1].references)]
    assert task.scorer.score(wrong) == type(task.scorer.score(wrong))([1.0, 0.0], {"anls": 0.5})


# --------------------------------------------------------------- through the sharing pass, all of them
def experiment_of(home, names, **more):
    return build_experiment(
        {
            "name": "official",
            "models": [{"name": "zoo:mini-llava-onevision", "frames": 2}],
            "settings": SETTINGS[:3],
            "tasks": [{"name": n, "data": str(home / n), "documents": 2} for n in names],
            **more,
        },
        "here",
    )


def judged(text):
    if "which option is most similar" in text or "Options" in text:
        return "B"
    return "0.5"


def test_every_task_is_answered_and_scored_in_one_pass(data, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    names = [t for t in TASKS if not t.startswith(("mathvi", "mmbench_en_dev_s"))]
    with judge_server(say=judged) as (url, seen):
        judge = {"url": url, "model": "fake", "key_env": "JUDGE_KEY"}
        summary = run(experiment_of(data, names, judge=judge), tmp_path)
    assert summary.failed == 0 and summary.recorded == 3 * 2 * len(names)
    totals = read_totals(tmp_path / "official")
    assert len(totals) == 3 * len(names)
    missing = {k: s.total for k, s in totals.items() if s.metrics[0].name not in s.total or s.void}
    assert not missing
    assert seen and {b["model"] for b in seen} == {"fake"}
    bodies = [str(sorted(b.items(), key=str)) for b in seen]
    assert len(set(bodies)) == len(bodies), "equal requests were asked twice"
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written and not [p for p in written if KEY.encode() in p.read_bytes()]


def test_failed_calls_of_a_judge_void_the_score(data, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server("500") as (url, _):
        judge = {"url": url, "model": "fake", "key_env": "JUDGE_KEY"}
        run(experiment_of(data, ["mmvet"], judge=judge), tmp_path)
        totals = read_totals(tmp_path / "official")
        assert all("calls of the judge failed" in s.void for s in totals.values())
        assert all(np.isnan(s.headline) for s in totals.values())
    answered = [r.answer for r in read_run(tmp_path / "official")]
    with judge_server() as (url, _):  # the answers are there: nothing is asked of the model again
        path = tmp_path / "official/experiment.yaml"
        told = yaml.safe_load(path.read_text())
        told["judge"]["url"] = url
        path.write_text(yaml.safe_dump(told))
        assert all(s.total["gpt_eval_score"] == 100 for s in score_run(path.parent, again=True))
    assert [r.answer for r in read_run(tmp_path / "official")] == answered


# ------------------------------------------------- the same as lmms-eval around a plain model.generate
@pytest.mark.parametrize("checkpoint", ["mini-llava-onevision", "mini-qwen2-vl", "mini-internvl"])
def test_answers_and_scores_are_those_of_lmms_eval_around_generate(data, tmp_path, checkpoint):
    spec = {"name": f"zoo:{checkpoint}", "frames": 2}
    tasks = [{"name": n, "data": str(data / n)} for n in COMPARED]
    run(experiment_of(data, [], models=[spec], settings=SETTINGS, tasks=tasks), tmp_path)
    totals = read_totals(tmp_path / "official")
    mine = {r.task: {} for r in read_run(tmp_path / "official")}
    for r in read_run(tmp_path / "official"):
        if r.setting == "none":
            mine[r.task][int(r.document)] = r
    model = load_model(ModelSpec(**spec))
    seen, official = plain(model, data, tmp_path)
    texts = {(t, i): load_task(t, data / t).cut(Answered("", r.answer)).text for t, by in mine.items() for i, r in by.items()}  # fmt: skip
    assert texts == seen
    assert any(r.answer for by in mine.values() for r in by.values())
    for name in COMPARED:
        found = totals[next(k for k in totals if k[1] == "none" and k[2] == name)].total
        for key, value in official[name].items():
            if isinstance(value, float | int) and "stderr" not in key:
                assert found[key.partition(",")[0]] == pytest.approx(value), (name, key)


def plain(model, data, out):
    """lmms-eval's own evaluator around the checkpoint's processor and `generate`: answers by task
    and row, results by task. In a process of its own: OCRBench counts on.
    """
    import multiprocessing

    from lmms_eval.api.task import ConfigurableMessagesTask

    from effivlm.tasks import lmms as adapter

    tasks = {}
    for name in COMPARED:
        local = {"dataset_path": str(data / name), "dataset_name": None, "dataset_kwargs": {}}
        tasks[name] = ConfigurableMessagesTask(
            config=adapter._config(name) | local, model_name="plain"
        )
        tasks[name].set_config("num_fewshot", 0)
        tasks[name].set_fewshot_seed(1234)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_plain, args=(there, model, tasks, out))
    child.start()
    found = here.recv()
    child.join()
    assert not isinstance(found, str), found
    return found


def _plain(pipe, loaded, tasks, out):
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import evaluate
    from lmms_eval.protocol import ChatMessages

    torch.set_num_threads(1)
    seen = {}

    class Plain(lmms):
        is_simple, device = False, "cpu"

        def generate_until(self, requests):
            return [self.one(*r.args) for r in requests]

        def one(self, context, doc_to_messages, given, number, task, split):
            turns, media = [], []
            for turn in ChatMessages(
                messages=doc_to_messages(self.task_dict[task][split][number])
            ).messages:
                content = []
                for part in turn.content:
                    if part.type == "text":
                        content.append({"type": "text", "text": part.text})
                        continue
                    shown = (
                        [part.url.convert("RGB")] if part.type == "image" else frames(part.url, 2)
                    )
                    content += [{"type": "image"}] * len(shown)
                    media += shown
                turns.append({"role": turn.role, "content": content})
            text = loaded.processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
            inputs = loaded.processor(text=text, images=[media], return_tensors="pt")
            with torch.inference_mode():
                ids = loaded.model.generate(
                    **inputs, max_new_tokens=given.get("max_new_tokens", 128), do_sample=False
                )
            said = loaded.processor.tokenizer.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            for stop in given.get("until", []) if given.get("until") != ["\n\n"] else []:
                said = said.split(stop)[0]
            seen[task, number] = said
            return said

        def loglikelihood(self, requests):
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

        def clean(self):
            pass

    try:
        model = Plain()
        model.task_dict = {name: task.dataset for name, task in tasks.items()}
        random.seed(0)
        np.random.seed(1234)
        with contextlib.redirect_stdout(io.StringIO()):
            results = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, distributed_executor_backend="torchrun", process_docs_parallel=1, cli_args=argparse.Namespace(output_path=str(out), process_with_media=False, reasoning_tags=None))  # fmt: skip
        pipe.send(
            (
                seen,
                {
                    n: {
                        k: v for k, v in results["results"][n].items() if isinstance(v, int | float)
                    }
                    for n in COMPARED
                },
            )
        )
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lmms:nothing_like_it", "has no single task 'nothing_like_it'"),
        ("mmvet", "mmvet is scored by a judge: name one in the experiment"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(data, name, message):
    with pytest.raises(TaskError, match=message):
        load_task(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "loglikelihood"}, "x is scored by likelihoods"),
        ({"output_type": "generate_until_multi_round"}, "x asks in several rounds"),
        ({"generation_kwargs": {"do_sample": True}}, "x samples its answers"),
        ({"generation_kwargs": {"temperature": 0.7}}, "x samples its answers"),
        ({"generation_kwargs": {"num_beams": 3}}, "x needs beams"),
        ({"repeats": 2}, "x needs beams or repeated answers"),
    ],
)
def test_kinds_that_greedy_answers_cannot_serve(change, message):
    from effivlm.tasks.lmms import _greedy

    _greedy("x", {"generation_kwargs": {"temperature": 0.2, "do_sample": False}})
    with pytest.raises(TaskError, match=message):
        _greedy("x", change)


def test_data_that_is_missing_or_of_another_schema(data, tmp_path):
    with pytest.raises(TaskError, match="no folder"):
        load_task("chartqa", tmp_path / "none")
    with pytest.raises(TaskError, match=r"the data set .* cannot be opened"):
        load_task("chartqa", tmp_path)
    with pytest.raises(
        TaskError, match="chartqa: its rows have no column 'image'; they have id, question"
    ):
        load_task("chartqa", data / "mathvision_test")


def test_a_video_that_cannot_be_read_is_a_failure_of_its_document(data, tmp_path):
    task = load_task("videomme", data / "videomme")
    path = Path(task.documents[1].open().videos[0])
    path.rename(path.with_suffix(".gone"))
    try:
        summary = run(
            experiment_of(
                data, ["videomme"], tasks=[{"name": "videomme", "data": str(data / "videomme")}]
            ),
            tmp_path,
        )
    finally:
        path.with_suffix(".gone").rename(path)
    assert summary.failed == 3 and summary.recorded == 12
    scores = next(iter(read_totals(tmp_path / "official").values()))
    assert scores.failed == 1 and scores.each["1"] == 0


def test_videos_become_evenly_spaced_frames(tmp_path):
    import cv2

    out = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 8, (32, 32))
    for level in range(0, 240, 20):
        out.write(np.full((32, 32, 3), level, np.uint8))
    out.release()
    shown = [int(np.asarray(f).mean()) for f in frames(str(tmp_path / "v.avi"), 4)]
    assert shown == pytest.approx([0, 80, 140, 220], abs=4)
    assert isinstance(frames(str(tmp_path / "v.avi"), 1)[0], Image.Image)
