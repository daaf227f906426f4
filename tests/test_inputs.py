"""Any text in the place of an experiment, a setting, a row or a flag: it works, or it is one message and exit status 2.

`EFFIVLM_EXAMPLES=5000 pytest tests/test_inputs.py` tries more."""

import faulthandler
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from record_samples import document, timing
from typer.testing import CliRunner

from effivlm import evidence
from effivlm.cli import app
from effivlm.config import ConfigError, build_experiment, dump_experiment, load_experiment
from effivlm.errors import EffivlmError, printable
from effivlm.evaluation import score_run
from effivlm.evidence import Evidence
from effivlm.files.names import file_name
from effivlm.files.reading import read_bytes
from effivlm.files.yaml_text import dump_yaml, parse_yaml
from effivlm.records import StoreError, read_timings
from effivlm.setting import parse_setting
from effivlm.store import RunStore
from effivlm.tasks.base import TaskError, one_turn
from effivlm.tasks.loading import load_task, load_tasks

score_again = partial(score_run, again=True)

MANY = settings(
    max_examples=int(os.environ.get("EFFIVLM_EXAMPLES", "20")),
    deadline=None,
    derandomize="EFFIVLM_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
NUMBER = st.sampled_from(
    [
        "0.1",
        "50%",
        "1/3",
        "1",
        "1.0",
        "64",
        "1tok",
        "0",
        "-1",
        "1e99999999",
        "1e-99999999",
        "nan",
        "inf",
        "1/0",
        "٣",
        "",
        "1e-5",
        "9" * 400,
    ]
) | st.text(max_size=6)
FIELDS = st.sampled_from(
    [
        "layer=1",
        "layer=-1",
        "layer=1,layer=2",
        "unit=visual_mean",
        "unit=x",
        "rows=all",
        "kernel=0",
        "window=nan",
        "floor=0@0.2",
        "positions=repack",
        "=",
        "a=b=c",
    ]
) | st.text(max_size=8)
NAME = st.sampled_from(
    [
        "fastv",
        "snapkv",
        "adakv",
        "none",
        "vtw",
        "visionzip",
        "pyramidkv",
        "adakv(h2o)",
        "h2o",
        "fitprune",
    ]
) | st.text(max_size=5)
PART = st.builds(
    lambda n, b, f: n + (f"@{b}" if b is not None else "") + (f":{f}" if f else ""),
    NAME,
    st.none() | NUMBER,
    st.none() | FIELDS,
)
SETTING = st.lists(PART, min_size=1, max_size=3).map(" + ".join) | st.text(max_size=30)
RIGHT = {
    "name": "x",
    "models": ["zoo:mini-qwen2-vl"],
    "settings": ["fastv@0.5"],
    "tasks": ["count"],
}


@pytest.fixture(autouse=True)
def watchdog():
    """A hang ends the run with a traceback instead of waiting for ever."""
    faulthandler.dump_traceback_later(60 * max(1, MANY.max_examples // 20), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@MANY
@given(SETTING)
def test_settings(text):
    try:
        setting = parse_setting(text)
    except EffivlmError as error:
        assert str(error) and len(str(error)) < 6000
        return
    assert parse_setting(str(setting)) == setting and str(parse_setting(str(setting))) == str(
        setting
    )


@MANY
@given(st.sampled_from([*RIGHT, "measure", "seed", "width", "settngs"]), PLAIN)
def test_values_of_an_experiment(key, value):
    try:
        experiment = build_experiment(RIGHT | {key: value}, "x.yaml")
    except ConfigError as error:
        assert "mistake(s)" in str(error) and printable(str(error)) == str(error)
        return
    again = parse_yaml(dump_experiment(experiment), "x.yaml", "an experiment", ConfigError)
    assert build_experiment(again, "x.yaml") == experiment


@MANY
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode(errors="surrogatepass"))
)
def test_bytes_of_an_experiment(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("x") / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load_experiment(path)


@MANY
@given(PLAIN)
def test_yaml_reads_what_it_wrote(data):
    text = dump_yaml(data)
    try:
        back = parse_yaml(text, "x", "anything", ConfigError)
    except ConfigError as error:  # signs that YAML cannot hold, and keys that are one after reading
        assert "is not YAML" in str(error)
        return
    assert repr(back) == repr(data)


@MANY
@given(st.text())
def test_names_stay_in_their_folder(name):
    made = file_name(name)
    assert made and "/" not in made and "\0" not in made and not made.startswith(".")
    assert len(made.encode()) <= 120 and file_name(made) == made


@MANY
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["id", "question", "answer", "answers", "image", "images"]), PLAIN
        ),
        max_size=3,
    )
    | PLAIN,
    st.dictionaries(
        st.sampled_from(
            ["name", "version", "prompt", "metric", "max_new_tokens", "rows", "generator", "x"]
        ),
        PLAIN,
        max_size=2,
    ),
)
def test_task_folders(tmp_path_factory, rows, wrong):
    folder = tmp_path_factory.mktemp("task")
    spec = {
        "name": "t",
        "prompt": "{question}",
        "metric": "exact_match",
        "rows": "rows.jsonl",
    } | wrong
    (folder / "task.yaml").write_text(yaml.safe_dump(spec, allow_unicode=False))
    lines = rows if isinstance(rows, list) else [rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    try:
        task = load_task(str(folder))
    except EffivlmError as error:
        assert str(error)
        return
    assert all(d.id and d.answers and isinstance(d.prompt, str) for d in task.documents)


@settings(MANY, max_examples=max(10, MANY.max_examples // 5))
@given(
    st.sampled_from(["list", "show", "predict", "report", "calibrate", "run"]),
    st.lists(
        st.sampled_from(
            [
                "--set",
                "--root",
                "--json",
                "--dry-run",
                "--documents",
                "--task",
                "--eta",
                "nan",
                "-1",
                "tasks.0=x",
                "methods",
                "qwen2-vl-2b",
                "fastv@0.5",
                "/dev/zero",
                "/",
            ]
        )
        | st.text(max_size=8),
        max_size=4,
    ),
)
def test_flags(tmp_path_factory, verb, words):
    if verb == "run" and not any(w.startswith("/") for w in words):
        words = ["/", *words]  # never the whole default experiment
    done = CliRunner().invoke(app, [verb, *words], env={"COLUMNS": "80"})
    assert done.exit_code in (0, 2), (done.exit_code, done.output, done.exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y", "line 2, column 1: is not YAML: the key 'name' comes twice"),
        ("a: &a [*a]", "stands for more than"),
        ("[" * 600, "nested too deeply"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("a: 1\n---\nb: 2", "another document"),
        ("keep: !!bool abc", "is not YAML: 'abc'"),
        ("seed: !!timestamp abc", "is not YAML"),
        (b"\xff\xfea\x00", "is UTF-16"),
        (b"name: \xe9", "line 1 is not UTF-8 (byte 0xe9)"),
    ],
)
def test_yaml(tmp_path, text, message):
    (tmp_path / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_experiment(tmp_path / "x.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": ".."}, "the first a letter or a digit"),
        ({"name": "a/b"}, "the first a letter or a digit"),
        ({"settings": []}, "at least one setting, got []"),
        ({"settings": [None]}, "expected texts such as fastv@0.1, got None"),
        ({"settings": [{"methods": ["fastv"], "keep": [True]}]}, "budgets such as 0.1"),
        ({"settings": ["fastv@1e99999999"]}, "is not a number"),
        ({"settings": ["adakv:floor=0@0.2"]}, "write adakv@0.2:floor=0"),
        ({"models": ["a/m", "b/m"]}, "would both be called 'm'"),
        ({"models": [{"name": "m", "dtype": "float16"}, {"name": "m"}]}, "would both be called"),
        (
            {"tasks": [{"name": "count", "documents": True}]},
            "documents: Input should be a valid integer",
        ),
        ({"width": "4"}, "width: Input should be a valid integer"),
        ({"measure": {"seconds": float("inf")}}, "finite number"),
        ({"measure": {"workload": "nope"}}, "unknown workload 'nope'"),
        ({"keep": "yes"}, "keep: Input should be a valid boolean"),
        ({"models": [{"name": "m", "attn": "nope"}]}, "expected one of sdpa, eager"),
        ({"models": [{"name": "m", "frames": True}]}, "frames: Input should be a valid integer"),
        ({"judge": {"url": "file:///etc/passwd", "model": "m"}}, "should match pattern"),
        ({"judge": {"url": "http://x", "model": "m", "timeout": float("inf")}}, "finite number"),
        ({"calibration": {"samples": "5"}}, "samples: Input should be a valid integer"),
        ({"calibration": {"sample": 5}}, "did you mean samples?"),
        ({"settings": ["fastv@0.5:layer=１"]}, "is not a int"),
        ({"settings": ["fastv@0.5:layer=1_0"]}, "is not a int"),
        ({"settings": ["fastv@0.5 + none"]}, "none changes nothing beside other methods"),
        ({f"k{i}": 1 for i in range(500)}, "and 480 more"),
    ],
)
def test_experiments(wrong, message):
    with pytest.raises(ConfigError) as error:
        build_experiment(RIGHT | wrong, "x.yaml")
    assert message in str(error.value)


def test_one_form_of_a_budget():
    made = build_experiment(
        RIGHT | {"settings": ["fastv@0.5", "fastv@50%", "fastv@1/2", "fastv@.50"]}, "x"
    )
    assert made.settings == ("none", "fastv@0.5")


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        ({"answers": []}, {}, "answers is empty"),
        ({"answers": [float("nan")]}, {}, "answer 1: expected a text or a number, got nan"),
        ({"answers": [" "]}, {}, "answers: expected a text with a word"),
        ({}, {"prompt": " "}, "prompt: expected a text"),
        ({"answers": [None]}, {}, "answer 1: expected a text or a number, got None"),
        ({"id": None}, {}, "id: expected a text or a whole number, got None"),
        ({}, {"version": "1.0"}, "version: expected a whole number"),
        ({}, {"metric": ["exact_match"]}, "metric: expected a text"),
        ({}, {"max_new_tokens": -1}, "max_new_tokens: expected a whole number from 1"),
        ({}, {"name": "../../evil"}, "name: expected 1 to 80 characters without /"),
        ({}, {"name": "/abs"}, "name: expected 1 to 80 characters without /"),
        ({}, {"prompt": "{question:>99999999999}"}, "expected fields of the rows in braces"),
        ({}, {"rows": "/dev/zero"}, "is a device"),
        ({"question": "x" * 1_000_001}, {}, "its prompt has 1000001 characters"),
    ],
)
def test_tasks(tmp_path, row, spec, message):
    whole = {"name": "t", "prompt": "{question}", "metric": "exact_match", "rows": "r.jsonl"} | spec
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "r.jsonl").write_text(json.dumps({"question": "q", "answers": ["a"]} | row))
    with pytest.raises(TaskError) as error:
        load_task(str(tmp_path))
    assert message in str(error.value)


def test_rows_that_are_no_mistake(tmp_path):
    """A byte order mark, blank lines, U+2028 inside a text, no last line break; a pipe is refused."""
    (tmp_path / "task.yaml").write_bytes(
        b"\xef\xbb\xbfname: t\nprompt: '{question}'\nmetric: exact_match\nrows: r.jsonl"
    )
    row = json.dumps({"question": "a\u2028b", "answers": ["x"]}, ensure_ascii=False)
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n  \n{row}".encode())
    assert [d.open().text for d in load_task(str(tmp_path)).documents] == ["a\u2028b"] * 2
    (tmp_path / "r.jsonl").unlink()
    os.mkfifo(tmp_path / "r.jsonl")
    with pytest.raises(TaskError, match="is a pipe"):
        load_task(str(tmp_path))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run's folder with answers, scores, timings and evidence."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    store = RunStore(folder, dump_experiment(build_experiment(RIGHT, "x")), "x")
    with store:
        for setting in ("none", "fastv@0.5"):
            record = document(0, setting, "count", answer="2")
            store.append(store.path("tiny", setting[:4], "count"), record)
            for i in range(2):
                store.append(store.timings("effivlm-bench"), timing(i, setting))
    image = Image.new("RGB", (8, 8))
    Evidence(folder).show("count", "d0", one_turn("how many?", [image]), ["2"])
    Evidence(folder).trace("tiny", "none", "count", "d0", {"images": []})
    score_run(folder, again=True)
    return folder


@pytest.mark.parametrize("damage", ["[1]\n", "5\n", "{}\n", "[" * 600 + "\n", b"\xff\n", "pipe"])
@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("experiment.yaml", score_again),
        ("records/*/none/*.jsonl", score_run),
        ("scores/*/none/*.json", score_run),
        ("timings/*.jsonl", read_timings),
        ("documents/*.jsonl", evidence.shown),
        ("traces/*/*.jsonl", evidence.traced),
    ],
)
def test_damaged_runs(tmp_path, whole_run, kind, reader, damage):
    """Each damaged file is one error that names it, whatever reads it."""
    shutil.copytree(whole_run, tmp_path / "x")
    path = next((tmp_path / "x").glob(kind))
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(EffivlmError) as error:
        reader(tmp_path / "x")
    assert path.name in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("documents/*.jsonl", "pictures", [["../../../etc/passwd", 1, 1]]),
        ("documents/*.jsonl", "prompt", None),
        ("traces/*/*.jsonl", "trace", "x"),
        ("scores/*/none/*.json", "metrics", []),
        ("scores/*/none/*.json", "metrics", [{"name": "x", "scale": 0}]),
        ("scores/*/none/*.json", "total", {"exact_match": float("nan")}),
        ("scores/*/none/*.json", "each", {"d0": "a"}),
    ],
)
def test_wrong_fields_of_a_run(tmp_path, whole_run, kind, key, value):
    """A page takes in pictures of the run and no other file; scores are numbers."""
    shutil.copytree(whole_run, tmp_path / "x")
    path = next((tmp_path / "x").glob(kind))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}) + "\n")
    with pytest.raises(EffivlmError, match=path.name):
        evidence.shown(tmp_path / "x")
        evidence.traced(tmp_path / "x")
        score_run(tmp_path / "x")


def test_answers_where_no_run_puts_them(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "x")
    shutil.copy(next((tmp_path / "x/records").rglob("*.jsonl")), tmp_path / "x/records/a.jsonl")
    with pytest.raises(StoreError, match="not where a run puts answers"):
        score_run(tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "qwen2-vl-2b", "fastv@0.5", "--device", "cuda:99"], "is not there"),
        (["run", "x.yaml", "--set", ".".join("a" * 1500) + "=1"], "expected key=value"),
        (["report", "x" * 5000], "(shortened)"),
    ],
)
def test_flags_that_ended_badly(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(RIGHT))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and len(done.output) < 2000
    assert message in done.output


def test_a_suite_is_a_name(tmp_path):
    with pytest.raises(TaskError, match=r"holds no task\.yaml"):
        load_tasks("../suites/mini")


def test_files_of_the_system_have_an_end():
    """`/proc` says that a file has 0 bytes, and may go on for ever."""
    with pytest.raises(ConfigError, match=r"no end|cannot read|does not exist"):
        read_bytes(Path("/proc/self/pagemap"), "anything", ConfigError)


def test_a_defect_is_one_message_too(monkeypatch):
    from effivlm import lists

    monkeypatch.setitem(lists.LISTS, "suites", lambda: 1 / 0)
    done = CliRunner().invoke(app, ["list", "suites"])
    assert done.exit_code == 70 and "a defect of effivlm: ZeroDivisionError" in done.output
