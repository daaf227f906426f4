"""Tasks, scores beside answers, and the sampling of documents; no model is asked."""

import json
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from record_samples import document as record
from typer.testing import CliRunner

import effivlm
from effivlm.cli import app
from effivlm.config import TaskSpec, build_experiment
from effivlm.evaluation import score_file, score_run
from effivlm.experiment import sample
from effivlm.metrics.official import with_official
from effivlm.metrics.performance import MetricError, score_of
from effivlm.records import read_run, read_totals
from effivlm.report.rows import rows_of
from effivlm.result import Result as RunResult
from effivlm.scores import Answered, Metric, read_scores, scores_path
from effivlm.store import RunStore
from effivlm.tasks.base import Document, Result, Scorer, Task, TaskError, one_turn
from effivlm.tasks.loading import (
    load_suite,
    load_task,
    load_tasks,
    official_tasks,
    suite_names,
)
from effivlm.tasks.per_answer import PerAnswer, invalid


def task_of(count=6, clusters=(), scorer=None, **more):
    documents = [Document(f"d{i}", ("red",), lambda: one_turn("?")) for i in range(count)]
    return Task(
        "colour", "1", documents, scorer or PerAnswer("exact_match"), clusters=clusters, **more
    )


class Sum(Scorer):
    """A benchmark that has no score of single documents, and prints a sum of 500."""

    name, metrics = "sum", (Metric("sum", scale=500.0),)

    def score(self, answers):
        return Result([None] * len(answers), {"sum": 100.0 * sum(a.text == "red" for a in answers)})


@pytest.fixture
def run(tmp_path):
    """A run of two settings, three documents; the second is wrong under the setting, one failed."""
    task = {"name": "colour", "prompt": "?", "metric": "exact_match", "rows": "rows.jsonl"}
    (tmp_path / "task").mkdir()
    (tmp_path / "task/task.yaml").write_text(yaml.safe_dump(task))
    rows = [{"id": f"d{i}", "answers": ["red"]} for i in range(3)]
    (tmp_path / "task/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = yaml.safe_dump(
        {
            "name": "x",
            "models": [{"name": "tiny"}],
            "settings": ["none", "uniform@0.5"],
            "tasks": [{"name": str(tmp_path / "task")}],
        }
    )
    with RunStore(tmp_path / "x", experiment, "identity") as store:
        for name, answers in (("none", ("Red!", "red", "red")), ("uniform@0.5", ("red", "", None))):
            for i, answer in enumerate(answers):
                error = {"type": "X", "message": "x"} if answer is None else None
                given = record(i, setting=name, answer=answer, error=error, references=("red",))
                store.append(store.path("tiny", name, "colour"), replace(given, score=None))
    return tmp_path / "x"


def test_answers_without_scores_are_no_zeros(run):
    records = read_run(run)
    assert {r.score for r in records} == {None}
    none, half = rows_of(records)
    assert none.scores == half.scores == {} and half.op != half.op
    assert "answers without a score are left out of all but OL: colour" in " ".join(half.notes)
    with pytest.raises(MetricError, match="no score: run `effivlm score`"):
        score_of(next(r for r in records if not r.failed))
    assert score_of(next(r for r in records if r.failed)) == 0


def test_scores_are_a_file_that_can_be_made_again(run):
    scores = score_run(run)
    assert [(s.total, s.failed, s.empty) for s in scores] == [
        ({"exact_match": 1.0}, 0, 0),
        ({"exact_match": 1 / 3}, 1, 1),
    ]
    before = [p.read_bytes() for p in sorted(run.rglob("*.jsonl"))]
    assert [r.score for r in read_run(run)] == [1, 1, 1, 1, 0, 0]
    for path in run.rglob("scores/**/*.json"):
        path.write_text(path.read_text().replace("1.0", "0.25"))
    assert score_run(run)[0].total == {"exact_match": 0.25}, "scored again though nothing changed"
    done = CliRunner().invoke(app, ["score", str(run)])
    assert done.exit_code == 0 and "exact_match 0.3333" in done.output, done.output
    assert "1 failed, 1 empty" in done.output and score_run(run)[0].total == {"exact_match": 1.0}
    assert [p.read_bytes() for p in sorted(run.rglob("*.jsonl"))] == before


def test_scores_of_fewer_answers_are_out_of_date(run):
    score_run(run)
    path = sorted(run.rglob("*.jsonl"))[0]
    assert read_scores(path) is not None
    path.write_bytes(path.read_bytes() + b'{"torn')
    assert read_scores(path) is None
    assert len(score_run(run)[0].each) == 3


def test_a_file_that_holds_no_scores_is_named(run):
    score_run(run)
    path = scores_path(sorted(run.rglob("*.jsonl"))[0])
    path.write_text("[]")
    with pytest.raises(RuntimeError, match=r"holds no scores .*delete it"):
        read_run(run)


def test_official_numbers_are_shown_and_not_resampled(run):
    """Without scores of single documents the table shows the official number, and no interval."""
    for path in run.rglob("*.jsonl"):
        score_file(path, task_of(scorer=Sum()))
    assert rows_of(read_run(run))[1].scores == {}
    none, half = rows_of(read_run(run), totals=read_totals(run))
    assert half.scores == {"colour": pytest.approx(20.0)}
    assert none.scores == {"colour": pytest.approx(40.0)}, "'Red!' is not 'red' here"
    assert half.op == pytest.approx(50) and half.low != half.low and half.p != half.p


def test_void_numbers_take_a_task_out_of_op_and_a_guess_stays_one():
    """A judge that failed leaves no OP behind that still counts the task; nor do official numbers lift a task that is guessed."""
    records = [record(n, s) for s in ("none", "x") for n in range(12)]
    (_, before) = rows_of(records)
    assert before.op == 100
    found = with_official(before.comparison, {"colour": (float("nan"), 0.4)})
    assert found.op.value != found.op.value and not found.tasks["colour"].rated
    guessed = replace(before.comparison.tasks["colour"], rated=False)
    told = with_official(
        replace(before.comparison, tasks={"colour": guessed}), {"colour": (0.2, 0.4)}
    )
    assert told.tasks["colour"].score.value == 20 and not told.tasks["colour"].rated


def test_a_result_has_the_rows_of_the_report_and_a_picture(run):
    """Official numbers included; what was not scored yet is scored."""
    result = effivlm.report(run)
    assert [r.setting for r in result.rows] == ["none", "uniform@0.5"]
    assert result.rows[1].scores == {"colour": pytest.approx(100 / 3)}
    for path in run.rglob("records/**/*.jsonl"):
        score_file(path, task_of(scorer=Sum()), again=True)
    assert RunResult(run).rows[1].scores == {"colour": pytest.approx(20.0)}
    made = result.plot(run / "a.png")
    assert made == run / "a.png" and made.stat().st_size > 500


def test_answers_are_cut_afterwards(run):
    (path, *_) = sorted(run.rglob("*.jsonl"))
    assert read_run(run)[0].answer == "Red!"
    assert score_file(path, task_of(until=("e",))).total == {"exact_match": 0.0}
    assert read_run(run)[0].answer == "Red!"


def test_clusters_are_drawn_whole():
    pairs = task_of(10, clusters=[f"c{i // 2}" for i in range(10)])
    for seed in range(20):
        drawn = sample(pairs, TaskSpec(name="colour", documents=5), seed)
        assert len(drawn) == 4 and {i ^ 1 for i in drawn} == set(drawn)
    assert len(sample(pairs, TaskSpec(name="colour", documents=1), 0)) == 2
    assert len({tuple(sample(pairs, TaskSpec(name="c", documents=4), s)) for s in range(9)}) > 3
    assert list(sample(pairs, TaskSpec(name="colour"), 0)) == list(range(10))


@pytest.mark.parametrize(
    ("form", "text", "wrong"),
    [
        ("yes_no", "Yes, it is.", False),
        ("yes_no", "maybe yes", True),
        ("letter", "(B)", False),
        ("letter", "B. a dog", False),
        ("letter", "a dog", True),
        ("free", "", False),
    ],
)
def test_invalid_answers(form, text, wrong):
    assert invalid(text, form) is wrong


def test_yes_no_totals_equal_the_counts():
    said = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), (None, "no")]
    answers = [Answered(str(i), a, (r,)) for i, (a, r) in enumerate(said)]
    found = PerAnswer("yes_no").score(answers)
    assert found.total == {"yes_no": pytest.approx(2 / (2 + 3)), "mean": pytest.approx(2 / 5)}


# ------------------------------------------------------------------------------- suites, and words
def test_suites_name_tasks_that_are_described():
    known = official_tasks()
    for name in suite_names():
        suite = load_suite(name)
        assert name == "mini" or set(suite.tasks) <= set(known)
        assert {t for members in suite.groups.values() for t in members} <= set(suite.tasks)
    images = {f.benchmark for f in known.values() if f.media == "image"}
    assert len(images) >= 30


def test_a_suite_is_an_experiment_s_task():
    given = {"name": "x", "models": [{"name": "tiny"}], "settings": ["none"]}
    read = build_experiment(given | {"tasks": [{"suite": "mini", "documents": 3}]}, "x")
    assert read.tasks == (TaskSpec(name="mini", documents=3),)
    assert [t.name for t in load_tasks("mini")] == list(load_suite("mini").tasks)


def test_refusals_before_anything_is_opened(tmp_path):
    with pytest.raises(TaskError, match=r"llava_wilder_small: lmms-eval 0\.7\.3 never calls"):
        load_task("llava_wilder_small")
    with pytest.raises(TaskError, match="count, which is no official benchmark"):
        load_task("count", tmp_path)
    with pytest.raises(KeyError, match="unknown task or suite 'docvqa': did you mean docvqa_val"):
        load_task("docvqa")


def test_questions_differ_where_words_or_pixels_do():
    red, blue = (Image.new("RGB", (2, 2), c) for c in ("red", "blue"))
    made = [one_turn("a", [red]), one_turn("a", [blue]), one_turn("b", [red]), one_turn("a", [red])]
    digests = [q.digest() for q in made]
    assert len(set(digests)) == 3 and digests[0] == digests[3]
