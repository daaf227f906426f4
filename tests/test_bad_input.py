"""What a user can get wrong, through the command line: one message that says what to do, an exit status, nothing lost."""

import errno
import fcntl
import json
import os
import shutil

import pytest
import tiny
import torch
import yaml
from PIL import Image
from test_families_loading import OPTIONS, image_processor, tokenizer
from transformers import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from typer.testing import CliRunner

from effivlm import store as store_module
from effivlm.budget import BudgetError
from effivlm.cli import app
from effivlm.families import loading
from effivlm.records import read_run
from effivlm.runtime.session import Session

torch.set_num_threads(1)
TEMPLATE = "{% for part in messages[0]['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
QUESTION = {"question": "w7 w8", "answers": ["w9"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llava"
    tiny.build("llava").save_pretrained(folder)
    kind = loading._image_only(PROCESSOR_MAPPING[CONFIG_MAPPING["llava"]])
    processor = kind(
        image_processor=image_processor("llava"),
        tokenizer=tokenizer("llava"),
        chat_template=TEMPLATE,
        **OPTIONS["llava"],
    )
    processor.save_pretrained(folder)
    return folder


def write_task(folder, rows, **more):
    folder.mkdir(exist_ok=True)
    spec = {
        "name": "odd",
        "prompt": "{question}",
        "metric": "exact_match",
        "max_new_tokens": 2,
        "rows": "rows.jsonl",
        **more,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(spec))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def task(tmp_path):
    """Two images that can be read."""
    for name in ("a", "b"):
        (tmp_path / "task").mkdir(exist_ok=True)
        Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / f"task/{name}.png")
    return write_task(
        tmp_path / "task", [{"id": n, "images": [f"{n}.png"], **QUESTION} for n in ("a", "b")]
    )


@pytest.fixture
def invoke(tmp_path, checkpoint, task):
    """Run an experiment that is right but for what is given; (exit status, output)."""

    def run(**wrong):
        right = {
            "name": "x",
            "models": [{"name": str(checkpoint)}],
            "settings": ["uniform@0.5"],
            "tasks": [{"name": task}],
        }
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(right | wrong))
        done = CliRunner().invoke(
            app, ["run", str(tmp_path / "x.yaml"), "--root", str(tmp_path / "runs")]
        )
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, " ".join(done.output.split())

    return run


# --------------------------------------------------------------------------------- what the experiment file says
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fastvv@0.1", "unknown method 'fastvv': did you mean fastv"),
        ("fastv@0.1:layr=2", "unknown parameter of fastv 'layr': did you mean layer?"),
        ("fastv@0", "asks for 0 tokens: expected at least 1"),
        ("fastv@-0.2", "is the share -0.2: expected a share in (0, 1]"),
        ("fastv@1.5", "is the share 1.5: expected a share in (0, 1]"),
        ("fastv@lots", "'lots' is not a number: expected a share in (0, 1]"),
        ("fastv@1", "write '@1.0' to keep everything or '@1tok' to keep one token"),
        ("fastv@0.1:layer=two", "layer='two' is not a int"),
    ],
)
def test_settings(invoke, setting, message):
    status, output = invoke(settings=[setting])
    assert status == 2 and message in output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seting": ["none"]}, "seting: unknown key: did you mean settings?"),
        (
            {"tasks": [{"name": "count", "docs": 3}]},
            "tasks.0.docs: unknown key: did you mean documents?",
        ),
        (
            {"models": [{"name": "x", "dtype": "fp16"}]},
            "has 1 mistake(s): models.0.dtype: expected one of auto, float32",
        ),
        (
            {"settings": [{"methods": ["fastv"], "keep": 0.1}]},
            "a settings grid needs lists, got keep: 0.1; write keep: [0.1]",
        ),
        (
            {"settings": [{"methods": ["fastv"], "keep": [0, "many"]}]},
            "'fastv@0': budget '@0' asks for 0 tokens: expected at least 1; 'fastv@many'",
        ),
        ({"tasks": [{"name": "coutn"}]}, "unknown task or suite 'coutn': did you mean count"),
        ({"tasks": [{"name": "/nowhere/task"}]}, "/nowhere/task holds no task.yaml"),
        (
            {"models": [{"name": "qwen2-vl-2b", "random_weights": True}]},
            "have no tokenizer and answer nothing: use `effivlm measure`",
        ),
        ({"models": [{"name": "zoo:nothing"}]}, "unknown zoo checkpoint 'nothing'"),
    ],
)
def test_experiments(invoke, wrong, message):
    status, output = invoke(**wrong)
    assert status == 2 and message in output, output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "is not YAML"),
        ("- x", "holds a list: expected keys name, models"),
        ("", "is empty: expected keys name, models"),
    ],
)
def test_files_that_are_no_experiment(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    done = CliRunner().invoke(app, ["run", str(tmp_path / "x.yaml")])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (["show", "qwen2vl"], "unknown method or family 'qwen2vl': did you mean qwen2_vl"),
        (["show", "fastvv"], "did you mean fastv"),
        (["list", "metods"], "did you mean methods"),
        (["run", "nothing.yaml"], "no experiment file nothing.yaml"),
        (["report", "nothing"], "expected the folder of a run"),
    ],
)
def test_names_on_the_command_line(verb, message):
    done = CliRunner().invoke(app, verb)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "fastv@0.01:unit=visual_mean",
            r"visual_mean budget 0\.01 is infeasible with the first cut before layer 2 of 4: .* share is 0\.5001",
        ),
        ("vtw@0.1", r"smallest feasible share is 0\.2500"),
        ("fastv@0.5:layer=99", r"before layers \[99\], which do not fit a model of 4"),
        ("vscan@0.5:layer=7", r"do not fit a model of 4"),
    ],
)
def test_what_no_image_could_meet_is_refused_before_anything_runs(setting, message):
    with pytest.raises(BudgetError, match=message):
        Session(tiny.build("llava"), setting)


def test_infeasible_settings_stop_a_run_before_its_first_answer(invoke, tmp_path):
    status, output = invoke(settings=["uniform@0.5", "fastv@0.01:unit=visual_mean"])
    assert status == 2 and "the smallest feasible share is 0.5001" in output
    status, output = invoke(settings=["uniform@0.5", "fastv@0.5:layer=9"])
    assert status == 2 and "[9], which do not fit a model of 4 decoder layers" in output
    assert not list((tmp_path / "runs").rglob("*.jsonl"))
    status, output = invoke()  # the mended experiment may keep its name
    assert status == 0 and "4 answers recorded" in output


def test_a_budget_that_one_image_cannot_meet_fails_that_setting_alone(checkpoint, task):
    """Counts of tokens are feasible or not image by image; settings that share the prefill go on."""
    from effivlm.runtime.plan import Plan
    from effivlm.setting import parse_setting

    model = tiny.build("llava")
    settings = [parse_setting(t) for t in ("none", "fastv@1tok:unit=visual_mean", "fastv@0.5")]
    done = {str(o.setting): o for o in Plan(model, settings).run(tiny.prompt("llava", 1), 2, [])}
    assert isinstance(done["fastv@1tok:unit=visual_mean"].error, BudgetError)
    assert done["none"].error is None and done["fastv@0.5"].error is None


# ------------------------------------------------------------------------------------------------- tasks and media
def test_documents_that_cannot_be_read_fail_alone(invoke, tmp_path, task):
    """Truncated, not an image, empty, missing: recorded as failures; the others, one of text alone, are answered."""
    folder = tmp_path / "task"
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    names = ("a", "cut", "text", "empty", "missing")
    write_task(
        folder,
        [
            *({"id": n, "images": [f"{n}.png"], **QUESTION} for n in names),
            {"id": "words", **QUESTION},
        ],
    )
    status, output = invoke(
        settings=["uniform@0.5", "fastv@0.5:layer=1", "h2o@0.5", "downsample@0.5", "visionzip@0.5"]
    )
    assert (
        status == 3
        and "24 of 36 answers failed: see the column 'failed'" in output
        and output.count("4/6") == 6
    )
    records = read_run(tmp_path / "runs/x")
    failed = {r.document: r.error for r in records if r.failed}
    assert set(failed) == {"cut", "text", "empty", "missing"} and len(records) == 36
    assert {e["type"] for e in failed.values()} == {"MediaError"} and "truncated" in failed["cut"][
        "message"
    ]
    assert "cannot read image missing.png" in failed["missing"]["message"]
    words = [r for r in records if r.document == "words"]
    assert len(words) == 6 and all(r.cost["visual_tokens"] == 0 for r in words)
    assert "4/6" in (tmp_path / "runs/x/report/table.md").read_text()
    again, output = invoke(
        settings=["uniform@0.5", "fastv@0.5:layer=1", "h2o@0.5", "downsample@0.5", "visionzip@0.5"]
    )
    assert again == 3 and "0 answers recorded, 36 found from before" in output


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([["x"]], {}, "line 1 is a list: expected fields such as question and answers"),
        ([{"answers": ["w9"]}], {}, "row 1 has no field 'question', which the task needs"),
        (
            [{"question": "w7", "answers": "w9"}],
            {},
            "row 1: answers is one value: give a list, or name the field answer",
        ),
        (
            [{"images": "a.png", **QUESTION}],
            {},
            "row 1: images is one value: give a list, or name the field image",
        ),
        ([{"id": 1, **QUESTION}, {"id": "1", **QUESTION}], {}, "two rows have the id '1'"),
        ([QUESTION], {"prompt": "{question"}, "the prompt '{question' cannot be filled in"),
        (
            [QUESTION],
            {"metric": "exact_mach"},
            "unknown metric 'exact_mach': did you mean exact_match?",
        ),
        ([QUESTION], {"metrc": "x"}, "unknown key(s) metrc"),
    ],
)
def test_tasks(invoke, tmp_path, rows, more, message):
    write_task(tmp_path / "task", rows, **more)
    status, output = invoke()
    assert status == 2 and message in output, output


# ---------------------------------------------------------------------------------------------------------- models
def test_model_folders(invoke, tmp_path, checkpoint):
    def loaded(files):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return invoke(models=[{"name": str(folder)}])

    config, weights = (
        (checkpoint / "config.json").read_bytes(),
        (checkpoint / "model.safetensors").read_bytes(),
    )
    for files, message in (
        ({}, "holds no config.json"),
        ({"config.json": b"{}", "model.safetensors": weights}, "names no model_type"),
        ({"config.json": config}, "holds no weights: expected *.safetensors"),
        (
            {"config.json": b'{"model_type": "qwen2_vll"}', "model.safetensors": weights},
            "no family serves (did you mean qwen2_vl",
        ),
        (
            {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights},
            "no family serves: supported are ",
        ),
        ({"config.json": config, "model.safetensors": weights[:2000]}, "cannot load"),
    ):
        status, output = loaded(files)
        assert status == 2 and message in output, output
    status, output = invoke(models=[{"name": "/nowhere/model"}])
    assert (
        status == 2
        and "/nowhere/model is not a folder: expected a transformers checkpoint folder, or a hub id"
        in output
    )


def test_weights_that_are_not_all_there(tmp_path, checkpoint):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = sorted(n for n in tensors if "down_proj" in n)[0]
    save_file(
        {k: v for k, v in tensors.items() if k != name},
        tmp_path / "model/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        loading.LoadError, match=r"weights of .* are not complete: 1 missing, such as .*down_proj"
    ):
        loading.load(tmp_path / "model", "float32")


# ------------------------------------------------------------------------------------------------------ run folders
def test_a_folder_of_another_experiment(invoke, tmp_path):
    assert invoke()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "runs/x/records").rglob("*.jsonl")}
    status, output = invoke(settings=["uniform@0.6"])
    assert (
        status == 2
        and "holds another experiment" in output
        and "choose another name, or delete the folder" in output
    )
    assert {p: p.read_bytes() for p in (tmp_path / "runs/x/records").rglob("*.jsonl")} == before


def test_two_processes_on_one_run(invoke, tmp_path):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/lock").write_text("4711")
    with (tmp_path / "runs/x/lock").open("r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        status, output = invoke()
    assert (
        status == 2 and "is in use by process 4711: wait for it, or choose another name" in output
    )
    assert invoke()[0] == 0


def test_a_full_disk(invoke, tmp_path, monkeypatch):
    real, written = os.write, []

    def full(handle, data):
        written.append(data)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(store_module.os, "write", full)
    status, output = invoke()
    assert (
        status == 2
        and "every finished line is intact; free space and run the same command again" in output
    )
    assert len(read_run(tmp_path / "runs/x")) == 2
    monkeypatch.undo()
    status, output = invoke()
    assert status == 0 and "2 answers recorded, 2 found from before" in output
