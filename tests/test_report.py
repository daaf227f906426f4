"""The report of synthetic runs: every number traced to records, every file readable on its own."""

import csv
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from record_samples import document, timing
from rich.console import Console

from effivlm.metrics.performance import MetricError
from effivlm.records import StoreError
from effivlm.report import columns, figures, latex, tables
from effivlm.report.page.data import page_data
from effivlm.report.rows import asked_of, joined, rows_of
from effivlm.report.write import write
from effivlm.store import RunStore

ERROR = {"type": "MediaError", "message": "cannot read"}
QUALITY = {
    "none": 0.9,
    "fastv@0.1": 0.5,
    "fastv@0.4": 0.8,
    "divprune@0.1": 0.7,
    "divprune@0.4": 0.85,
    "snapkv@64tok": 0.6,
}
SHARES = {
    "none": 1.0,
    "fastv@0.1": 0.1,
    "fastv@0.4": 0.4,
    "divprune@0.1": 0.1,
    "divprune@0.4": 0.4,
    "snapkv@64tok": 0.64,
}


def answers(models=("tiny",), count=40, quality=QUALITY):
    """Per model and setting, two tasks; a document is answered rightly under every setting at least as good as its difficulty."""
    difficulty = np.random.default_rng(0).random((len(models), 2, count))
    return [
        document(
            n,
            setting,
            task,
            model=model,
            share=SHARES.get(setting, 1.0),
            answer="red" if right else "blue",
            score=float(right),
        )
        for m, model in enumerate(models)
        for setting, level in quality.items()
        for k, task in enumerate(("colour", "count"))
        for n in range(count)
        for right in [difficulty[m, k, n] < level]
    ]


def row(rows, setting):
    return next(r for r in rows if r.setting == setting)


def test_rows_by_hand():
    records = [document(0), document(1), document(2), document(3, answer="blue", score=0.0)]
    records += [document(n) for n in range(10, 18)]
    mine = [
        *(document(n, "fastv@0.1", cost=False) for n in range(10, 18)),
        document(0, "fastv@0.1", share=0.1),
        document(1, "fastv@0.1", share=0.3, answer="blue", score=0.0),
        document(2, "fastv@0.1", error=ERROR),
        document(3, "fastv@0.1", answer="blue", score=0.0, share=0.2),
        document(9, "fastv@0.1", answer="blue", score=0.0),
    ]
    base, found = rows_of([*mine, *records])
    assert (base.setting, base.op, base.ol, base.p, base.failures, base.documents) == (
        "none",
        100,
        100,
        1,
        0,
        12,
    )
    assert (
        found.scores == {"colour": pytest.approx(75)}
        and found.op == pytest.approx(100 * 9 / 11)
        and found.ratios == {"colour": pytest.approx(9 / 11)}
    )
    assert found.ol == pytest.approx(100 * 10 / 12), (
        "red and blue agree; the changed answer and the failure do not; d9 was never asked of the original"
    )
    assert (found.failures, found.documents) == (1, 12)
    assert found.shares["visual"] == pytest.approx(0.2) and found.shares["asked"] == 0.1, (
        "over documents with an account"
    )
    assert found.shares["kv_bytes"] == pytest.approx((140 + 20) / (140 + 100)) and found.costs[
        "kv_bytes"
    ] == pytest.approx(64 * 160)
    assert found.p == pytest.approx(0.5), (
        "two documents worse, none better: 2 of 4 sign patterns are as extreme"
    )
    assert found.comparison.flips == (2, 0, 0, 10)
    excluded = rows_of([*mine, *records], failures="exclude")[1]
    assert (excluded.documents, excluded.failures) == (11, 0)
    assert excluded.op == pytest.approx(90)


def test_p_values_are_corrected_per_model():
    rows = rows_of(answers())
    alone = rows_of([r for r in answers() if r.setting in ("none", "fastv@0.1")])
    assert row(rows, "fastv@0.1").p == pytest.approx(5 * alone[1].p), "the smallest of five"


def test_missing_original_or_common_documents_are_errors():
    with pytest.raises(
        MetricError, match="tiny has no records under 'none': nothing to compare with"
    ):
        rows_of([document(0, "fastv@0.1")])
    with pytest.raises(
        MetricError, match=r"tiny under fastv@0.1 has no document in common with 'none'"
    ):
        rows_of([document(0), document(1, "fastv@0.1")])


def test_a_task_the_original_fails_is_named_everywhere():
    wrong = [
        document(n, s, "hopeless", answer="blue", score=0.0)
        for s in ("none", "fastv@0.1")
        for n in range(9)
    ]
    fine = [document(n, s) for s in ("none", "fastv@0.1") for n in range(9)]
    rows = rows_of([*wrong, *fine])
    assert row(rows, "fastv@0.1").op == pytest.approx(100)
    expected = "clearly above what can be said without looking: hopeless (0.0 against 0.0)"
    notes = " ".join(page_data("x", rows, {})["notes"])
    assert expected in tables.markdown(rows) and expected in notes
    only = rows_of(wrong)
    assert np.isnan(only[1].op) and "| - | - | " in tables.markdown(only)


@pytest.mark.parametrize(
    ("setting", "asked", "share"),
    [
        ("none", "", 1.0),
        ("fastv@10%", "10%", 0.1),
        ("fastv@1/4:k=2", "1/4", 0.25),
        ("snapkv@64tok", "64tok", None),
        ("divprune@1/3 + fastv@1/3", "1/3 + 1/3", None),
        ("vtw:k=16", "", None),
    ],
)
def test_what_was_asked(setting, asked, share):
    assert asked_of(setting) == asked
    rows = rows_of([document(0), document(0, setting)] if setting != "none" else [document(0)])
    found = row(rows, setting).shares["asked"]
    assert np.isnan(found) if share is None else found == pytest.approx(share)


def test_what_can_be_said_without_looking_does_not_enter_op():
    """One answer fits 8 of 10 questions: an original that is right 9 times of 10 has not shown that it looks."""
    asked = [("red",)] * 32 + [("blue",)] * 8
    records = [
        document(n, s, answer=r[0], references=r, score=float(n % 10 > 0))
        for s in ("none", "fastv@0.1")
        for n, r in enumerate(asked)
    ]
    found = rows_of(records)[1]
    assert np.isnan(found.op) and found.ratios == {} and found.scores == {"colour": 90}
    assert found.comparison.decision.difference.value == 0, "absolute scores and differences stand"
    assert "without looking: colour (90.0 against 80.0)" in found.notes[0]
    told = rows_of([replace(r, references=(f"{r.references[0]} {r.document}",)) for r in records])
    assert told[1].op == 100 and not told[1].notes, "the same scores, and nothing to guess"


def test_json_holds_all_numbers_and_no_nan():
    def refuse(constant):
        raise AssertionError(constant)

    rows = rows_of(answers())
    found = json.loads(tables.as_json(rows), parse_constant=refuse)
    assert [r["setting"] for r in found] == list(QUALITY)
    worse, task = found[1], found[1]["tasks"]["colour"]
    assert (
        worse["op"]["value"] == row(rows, "fastv@0.1").op and worse["decision"]["as_good"] == "no"
    )
    assert task["difference"]["value"] == pytest.approx(
        task["score"]["value"] - task["original"]["value"]
    )
    assert sum(t["flips"]["lost"] for t in worse["tasks"].values()) == worse["flips"]["lost"] > 0
    assert (
        json.loads(tables.as_json(rows_of(answers(quality={"none": 0.9, "x@1": 0.9}))))[1][
            "decision"
        ]["needed"]
        == "infinite"
    )


def test_table_formats_agree():
    rows = rows_of(answers())
    parsed = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    assert [r["setting"] for r in parsed] == list(QUALITY) and float(parsed[1]["op"]) == row(
        rows, "fastv@0.1"
    ).op
    assert all(len(r) == len(parsed[0]) and None not in r for r in parsed)
    lines = tables.markdown(rows).splitlines()
    titles, _, *cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert titles[:5] == ["model", "setting", "asked", "visual", "visual mean"]
    assert titles.index("OG") < titles.index("p") < titles.index("failed")
    for r, line in zip(rows, cells, strict=True):
        shown = dict(zip(titles, line, strict=True))
        for task in ("colour", "count"):
            assert shown[task] == f"{r.scores[task]:.1f}"
        assert (
            shown["visual"] == f"{100 * r.shares['visual']:.1f} %"
            and shown["KV"] == f"{100 * r.shares['prompt_kv']:.1f} %"
        )
        assert (
            shown["OP"] == f"{r.op:.1f}"
            and shown["OL"] == f"{r.ol:.1f}"
            and shown["failed"] == "0/80"
        )
    assert row(rows, "fastv@0.1").scores["colour"] != row(rows, "fastv@0.1").scores["count"]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(rows)
    assert f"{row(rows, 'fastv@0.4').op:.1f}" in printed(rows, 80) and "fastv@0.4" in printed(
        rows, 80
    )


def printed(rows, width):
    console = Console(width=width, file=io.StringIO())
    for table in tables.terminal(rows):
        console.print(table)
    return console.file.getvalue()


def test_the_terminal_table_cuts_nothing_off():
    assert "…" not in printed(rows_of(answers()), 80)
    timings = [timing(i, s) for i in range(3) for s in QUALITY]
    timed = printed(rows_of(answers(), timings), 110)
    assert "…" not in timed and "OE ttft" in timed and "1.00x" in timed


def test_cost_axes_can_be_chosen():
    rows = rows_of(answers())
    assert "| FLOPs |" in tables.markdown(
        rows, axes=("prefill_flops",)
    ) and "visual mean" not in tables.markdown(rows, axes=("prefill_flops",))
    with pytest.raises(KeyError, match="unknown cost axis 'flops': expected one of asked, visual"):
        tables.markdown(rows, axes=("flops",))
    with pytest.raises(KeyError, match="unknown cost axis"):
        figures.trade_off(rows, "never.png", "flops")  # type: ignore[arg-type]


def test_speed_columns_only_where_measured_and_refusals_are_shown():
    timings = [
        timing(i, s, ttft=t) for i in range(10) for s, t in (("none", 0.4), ("fastv@0.1", 0.1))
    ]
    timings += [timing(i, "fastv@0.4", ttft=0.1, correct=False) for i in range(10)]
    rows = rows_of(answers(), timings)
    text = tables.markdown(rows)
    assert "| OE ttft | OE total |" in text and "4.00x [4.00-4.00]" in text
    assert (
        "fastv@0.4, effivlm-bench: no speed-up (ttft): fastv@0.4 failed its correctness check"
        in text
    )
    assert "OE" not in tables.markdown(rows_of(answers()))
    both = rows_of(
        answers(),
        timings
        + [timing(i, s, workload="serving") for i in range(3) for s in ("none", "fastv@0.1")],
    )
    assert (
        "| OE effivlm-bench ttft | OE effivlm-bench total | OE serving ttft | OE serving total |"
        in tables.markdown(both)
    )


def test_several_models_are_joined():
    rows = rows_of(answers(("tiny", "small")))
    found = next(j for j in joined(rows) if j.setting == "fastv@0.1")
    mine = [r for r in rows if r.setting == "fastv@0.1"]
    mean = [np.mean([r.ratios[t] for r in mine]) for t in ("colour", "count")]
    assert (found.models, found.op) == (2, pytest.approx(np.mean([r.op for r in mine])))
    assert found.og == pytest.approx(100 * np.std(mean) / np.mean(mean))
    assert "OG over models" in tables.markdown(rows)
    assert [j["op"] for j in page_data("x", rows, {})["joined"]] == [j.op for j in joined(rows)]
    assert joined(rows_of(answers())) == []


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    settings = "settings: [" + ", ".join(f"'{s}'" for s in QUALITY) + "]\n"
    with RunStore(tmp_path / "run", settings, "identity") as store:
        store.note_environment({"commit": "abc", "device": "cpu", "versions": {"torch": "2.13"}})
        for r in answers(count=6):
            store.append(store.path(r.model, r.setting.replace("@", "_"), r.task), r)
    return tmp_path / "run"


def test_write(folder):
    rows, paths = write(folder)
    assert [r.setting for r in rows] == list(QUALITY), "in the order asked"
    assert [p.name for p in paths] == [
        "table.md",
        "table.csv",
        "table.json",
        "table.tex",
        *(f"quality_prompt_kv.{kind}" for kind in figures.KINDS),
        *(f"quality_visual_mean.{kind}" for kind in figures.KINDS),
        "report.html",
    ]
    assert all(p.stat().st_size > 500 for p in paths)
    for path in (p for p in paths if p.suffix == ".png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert all(p.read_text().count("<text") > 10 for p in paths if p.suffix == ".svg")
    again = {p: p.read_bytes() for p in paths}
    write(folder)
    assert all(p.read_bytes() == data for p, data in again.items()), "the same records, the same"


def test_a_column_is_one_entry(folder, monkeypatch):
    added = columns.Column(
        key="extra_key",
        title="extra",
        value=lambda r: sum(mine.new_tokens for mine, _ in r.pairs) / 8 + len(r.pairs) / 1000,
        help="tokens [all] generated, in eighths",
        text=lambda value: f"<{value:.2f}>",
        shown=columns.EVERYWHERE,
    )
    monkeypatch.setattr(columns, "COLUMNS", [*columns.COLUMNS, added])
    rows, paths = write(folder)
    value = 12 * 2 / 8 + 12 / 1000
    text, data, page = (paths[i].read_text() for i in (0, 1, -1))

    head, _, *lines = text.splitlines()[: 2 + len(rows)]
    assert head.endswith("| extra |") and all(x.endswith("| <3.01> |") for x in lines)
    assert "- `extra`: tokens [all] generated, in eighths\n" in text
    assert "- `extra_key`: tokens [all] generated, in eighths\n" in text, "the CSV's key"
    parsed = list(csv.DictReader(io.StringIO(data)))
    assert [float(r["extra_key"]) for r in parsed] == [pytest.approx(value)] * len(rows)
    found = json.loads(page.split('id="data">')[1].split("</script>")[0])
    place = [c["title"] for c in found["columns"]].index("extra")
    assert found["columns"][place]["help"] == "tokens [all] generated, in eighths"
    assert all(r["cells"][place] == {"text": "<3.01>", "value": 3.012} for r in found["rows"])
    assert "extra_key" in found["qualities"], "an axis of the plot"
    shown = printed(rows, 120)
    assert shown.count("<3.01>") == len(rows) and " extra  \n" in shown
    assert "extra: tokens [all] generated, in eighths" in shown


@pytest.mark.parametrize("where", columns.EVERYWHERE)
def test_an_output_has_the_columns_that_say_so_and_explains_them_all(where, monkeypatch):
    timings = [timing(i, s) for i in range(3) for s in QUALITY]
    rows = rows_of(answers(), timings)
    only = columns.Column("here", "here", lambda r: 1.0, "only here", shown=(where,))
    monkeypatch.setattr(columns, "COLUMNS", [*columns.COLUMNS, only])
    for other in columns.EVERYWHERE:
        heads = [c.heading(other) for c in columns.columns(other, rows)]
        explained = [h for names in columns.legend(other, rows).values() for h in names]
        assert sorted(explained) == sorted(heads) and len(set(heads)) == len(heads)
        assert ("here" in heads) == (other == where)


def test_latex_marks_the_best_and_escapes():
    rows = rows_of(answers(("tiny_1",), count=20))
    text = latex.table(rows)
    best = max((r for r in rows if r.setting != "none"), key=lambda r: r.op)
    bold = [x for x in text.splitlines() if rf"\textbf{{{best.op:.1f}}}" in x]
    assert len(bold) == 1 and bold[0].startswith(f"{best.setting} & ")
    assert r"tiny\_1" in text and r"40.0 \%" in text and text.count(r"\midrule") == 1
    body = [x for x in text.splitlines() if x.endswith(r"\\") and "multicolumn" not in x]
    assert len({x.count("&") for x in body}) == 1 and len(body) == 1 + len(rows)
    assert latex.escaped("a_b & 5 % $x$ \\ ~^#{}") == (
        r"a\_b \& 5 \% \$x\$ \textbackslash{} \textasciitilde{}\textasciicircum{}\#\{\}"
    )


def test_without_matplotlib_tables_are_written_and_it_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write(folder)
    assert (folder / "report/table.csv").exists()


def test_folders_that_hold_no_run(tmp_path, folder):
    with pytest.raises(StoreError, match=r"holds no experiment.yaml: expected the folder of a run"):
        write(tmp_path)
    (folder / "experiment.yaml").write_text("- just a list")
    with pytest.raises(StoreError, match=r"experiment.yaml names no settings"):
        write(folder)


@pytest.mark.parametrize(
    ("setting", "method"),
    [
        ("fastv@0.1", "fastv"),
        ("fastv@0.1:k=2", "fastv:k=2"),
        ("divprune@1/3 + fastv@1/3", "divprune + fastv"),
        ("vtw:k=16", "vtw:k=16"),
    ],
)
def test_lines_join_budgets_of_one_method(setting, method):
    assert figures.method_of(setting) == method


def test_axis_is_logarithmic_over_a_decade_and_left_out_points_are_named(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []

    def savefig(self, path, **more):
        if path.suffix == ".png":
            kept.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    rows = rows_of(answers(count=5))
    figures.trade_off(rows, tmp_path / "a.png", "visual")
    figures.trade_off(rows, tmp_path / "b.png", "asked")
    wide = rows_of(
        [
            *answers(count=5, quality={"none": 0.9}),
            *(
                document(n, s, t, share=x)
                for s, x in (("fastv@0.01", 0.01), ("fastv@0.4", 0.4))
                for t in ("colour", "count")
                for n in range(5)
            ),
        ]
    )
    figures.trade_off(wide, tmp_path / "c.png", "visual")
    linear, asked, decades = (f.axes[0] for f in kept)
    assert (linear.get_xscale(), decades.get_xscale()) == ("linear", "log")
    assert [t.get_text() for t in asked.texts] == [
        "not on this axis: snapkv@64tok"
    ] and not linear.texts
    assert [t.get_text() for t in decades.get_xticklabels()] == ["1", "2", "5", "10", "20", "50"]
