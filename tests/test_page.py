"""The page, as a browser shows it: nothing leaves it, what it is asked it does, text stays text."""

import json
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from record_samples import document

from effivlm.evidence import Evidence
from effivlm.report.page import documents
from effivlm.report.page.data import embedded, stages_of
from effivlm.report.page.write import page, write_page
from effivlm.report.write import read_rows, view, write
from effivlm.runtime.trace import ImageTrace, PromptTrace
from effivlm.store import RunStore
from effivlm.tasks.base import one_turn

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
SETTINGS = ("none", "visionzip@0.5", "fastv@0.5:k=2", "adakv(snapkv)@0.4 + <b>odd</b>")
DOCUMENTS = 50  # more than one chunk


def answer(number, setting, task):
    """The original is right; visionzip loses one document, and answers another with a script."""
    if setting == "visionzip@0.5" and number in (7, 8):
        return {"answer": EVIL if number == 7 else "blue", "score": 0.0}
    return {"answer": "red", "score": 1.0}


def trace():
    """Four by four tokens: the upper half enters, token 15 went into 0, layer 1 keeps the first row."""
    place = torch.tensor([(r, c) for r in range(4) for c in range(4)]).float()
    layers = torch.arange(16) < torch.tensor([[8], [4]])
    cache = layers[:, None].repeat(1, 2, 1)
    cache[1, 1, 0] = False
    into = (-1, torch.tensor([0, 0]), torch.tensor([0, 15]))
    return PromptTrace((ImageTrace(place, torch.zeros(16).long(), 1, layers, cache, (into,)),))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shown"
    settings = json.dumps({"settings": SETTINGS})
    with RunStore(folder, settings, "identity") as store:
        store.note_environment({"device": EVIL, "versions": {"torch": "2.13"}})
        for place, setting in enumerate(SETTINGS):
            for task in ("colour", "count"):
                for n in range(DOCUMENTS):
                    record = document(n, setting, task, share=0.3, **answer(n, setting, task))
                    store.append(store.path("tiny", str(place), task), record)
    evidence = Evidence(folder)
    for n in range(DOCUMENTS):
        picture = Image.new("RGB", (60, 60), (200, n, 0))
        evidence.show("colour", f"d{n}", one_turn(f"what is {EVIL}", [picture]), ["red"])
    evidence.trace("tiny", "visionzip@0.5", "colour", "d7", trace().compact())
    (folder / "report").mkdir()
    return folder


# ------------------------------------------------------------------------------------------ as text
def test_what_is_embedded_can_end_no_script():
    text = embedded({"a": "</script><!--", "b": float("nan"), "c": "\u2028", "d": (1.0, None)})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--", "b": None, "c": "\u2028", "d": [1.0, None]}


def test_one_file_that_asks_for_nothing(run):
    path, left_out = write_page(run, read_rows(run), {"device": EVIL})
    text = path.read_text()
    assert left_out == 0 and "default-src 'none'" in text and "{{" not in text.split("<script")[0]
    assert not re.search(
        r'<(?:script|link|img|iframe)[^>]* (?:src|href)="', text.split("<body>")[0]
    )
    assert len(re.findall(r"plotly\.js v\d", text)) == 1, "Plotly once"


def test_documents_beyond_the_stated_size_are_left_to_the_view(run):
    rows = read_rows(run)
    whole, none_left = page("x", rows, {}, run)
    some = [page("x", rows, {}, run, whole=size) for size in range(20_000, 60_000, 10_000)]
    assert none_left == 0 and any(0 < left < 2 * DOCUMENTS for _, left in some)
    assert all((len(text) < len(whole)) == (left > 0) for text, left in some)
    assert page("x", rows, {}, run, whole=0)[1] == 2 * DOCUMENTS


def test_a_large_run_gets_its_view_and_only_a_changed_one_gets_it_again(run, monkeypatch):
    monkeypatch.setattr(write_page, "__defaults__", (0,))
    paths = write(run, axes=())[1]
    assert paths[-1].name == "index.html" and len(list(paths[-1].parent.glob("chunks/*.js"))) == 3
    monkeypatch.setattr("effivlm.report.write.read_rows", lambda folder: pytest.fail("read again"))
    assert view(run) == paths[-1]
    Evidence(run).trace("tiny", "none", "colour", "d1", {"images": []})
    with pytest.raises(pytest.fail.Exception, match="read again"):
        view(run)


def test_marks_and_the_order_of_documents(run):
    rows = read_rows(run)
    first, second, *rest = documents.asked(rows)
    assert {first.document, second.document} <= {"d7", "d8"} and first.marks == "=-=="
    assert first.flips == 1 and not any(d.flips for d in rest[2:])
    base, failed = document(0), document(0, error={"type": "E", "message": "m"})
    other, better = document(0, answer="Red."), document(0, answer="blue", score=0.5)
    marks = [documents.mark(x, base) for x in (base, failed, other, better)]
    assert marks == ["=", "!", "=", "-"] and documents.mark(base, better) == "+"


def test_where_settings_act():
    stages = {"fastv": ["intra_llm"], "snapkv": ["kv_cache"]}
    assert stages_of("none", stages) == [] and stages_of("mine@0.1", stages) == ["other"]
    assert stages_of("fastv@0.1:k=2 + snapkv@0.4", stages) == ["in the LLM", "KV cache", "combined"]


def test_without_plotly_it_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match="pip install plotly"):
        write(run, axes=())


# --------------------------------------------------------------------------------------- as shown
@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync.sync_playwright() as play:
        yield play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Seen:
    """A page in the browser, and everything it said or asked for."""

    def __init__(self, browser, path, width=1400):
        self.said, self.asked = [], []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda m: self.said.append(m.text))
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def settings(self):
        rows = self.page.locator("#table tbody tr")
        return [r.get_attribute("data-setting") for r in rows.all()]


@pytest.fixture(scope="module")
def seen(browser, run):
    found = Seen(browser, write_page(run, read_rows(run), {"device": EVIL}).path)
    yield found
    beyond = [url for url in found.asked if not url.startswith(("file:", "data:", "blob:"))]
    assert found.said == [] and beyond == [], "no message of the console, no request"
    assert len([url for url in found.asked if url.startswith("file:")]) == 1, "one file"


def test_the_table_filters_sorts_and_keeps_the_original_on_top(seen):
    page = seen.page
    assert seen.settings() == list(SETTINGS)
    page.fill("#search", "fastv")
    assert seen.settings() == ["none", "fastv@0.5:k=2"]
    page.fill("#search", "")
    page.click('#methods .chip[data-value="visionzip"]')
    assert "visionzip@0.5" not in seen.settings() and len(seen.settings()) == 3
    page.click('#methods .chip[data-value="visionzip"]')
    page.click('#stages .chip[data-value="in the LLM"]')
    assert "fastv@0.5:k=2" not in seen.settings()
    page.click('#stages .chip[data-value="in the LLM"]')
    page.click('#table th[data-key="op"]')
    assert seen.settings()[0] == "none" and seen.settings()[-1] == "visionzip@0.5", "least last"
    page.click('#table th[data-key="op"]')
    assert seen.settings()[:2] == ["none", "visionzip@0.5"]
    page.click('#table th[data-key="op"]')
    assert seen.settings() == list(SETTINGS), "as asked"
    page.click("#columns summary")
    page.uncheck("#columnlist input >> nth=5")
    heads = page.locator("#table th").count()
    page.check("#columnlist input >> nth=5")
    assert page.locator("#table th").count() == heads + 1
    page.click("#columns summary")
    assert page.locator("#table td svg.bar").count() >= len(SETTINGS) - 1


def test_the_plot_has_a_point_for_every_setting_and_its_front(seen):
    points = seen.page.evaluate(
        "document.querySelector('.panel').data.filter(t => t.customdata)"
        ".flatMap(t => t.customdata).sort()"
    )
    assert points == [0, 1, 2, 3]
    front = "effivlm.plot.front([{x:1,y:5},{x:2,y:5},{x:3,y:9},{x:3,y:8}]).map(p => [p.x, p.y])"
    assert seen.page.evaluate(front) == [[1, 5], [3, 9]]


def test_from_a_row_to_its_documents_and_a_script_stays_text(seen):
    page = seen.page
    page.click('#table tr[data-setting="visionzip@0.5"]')
    assert page.text_content("#code") == "visionzip@0.5"
    page.click("#open")
    listed = page.locator("#doclist button")
    assert {b.get_attribute("data-document") for b in listed.all()} == {
        f"{task}/d{n}" for task in ("colour", "count") for n in (7, 8)
    }, "the flips alone"
    page.click('#doclist button[data-document="colour/d7"]')
    page.wait_for_selector("svg.tokens")
    shown = page.text_content('.answers tr[data-place="1"] td:nth-child(2)')
    assert shown == EVIL and page.text_content(".question") == f"what is {EVIL}"
    assert page.title() == "shown" and page.locator("#document script, img[onerror]").count() == 0
    assert page.locator(".answers tbody tr").first.text_content().startswith("none")
    page.select_option("#docmarks", "all")
    assert listed.count() == 2 * DOCUMENTS
    page.select_option("#doctask", "count")
    assert listed.count() == DOCUMENTS


def test_the_tokens_kept_are_drawn_layer_by_layer_and_head_by_head(seen):
    page = seen.page
    page.select_option("#doctask", "colour")
    page.click('#doclist button[data-document="colour/d7"]')
    page.wait_for_selector("svg.tokens")

    def kept():
        return [
            int(r.get_attribute("data-token"))
            for r in page.locator("svg.tokens rect").all()
            if float(r.get_attribute("data-kept")) > 0
        ]

    def layer(number):
        page.evaluate(
            "n => { const s = document.getElementById('layer'); s.value = n;"
            " s.dispatchEvent(new Event('input')); }",
            number,
        )

    layer(0)
    assert kept() == list(range(8))
    layer(1)
    assert kept() == list(range(4)) and "layer 1 of 1: 4 of 16" in page.text_content(".overlay")
    colour = "i => document.querySelector(`svg.tokens rect[data-token='${i}']`).style.fill"
    assert page.evaluate(colour, 15) == page.evaluate(colour, 0), "15 went into 0"
    assert page.evaluate(colour, 15) != page.evaluate(colour, 14)
    page.select_option('select[aria-label="what"]', "cache")
    page.select_option('select[aria-label="head"]', "1")
    assert kept() == [1, 2, 3]
    page.select_option('select[aria-label="head"]', "all")
    share = page.locator('svg.tokens rect[data-token="0"]').get_attribute("data-kept")
    assert share == "0.50", "one of two heads"


def test_the_view_reads_documents_when_they_are_opened_and_fits_a_telephone(browser, run):
    found = Seen(browser, view(run), width=400)
    found.page.wait_for_selector(".question")
    assert [u.rsplit("/", 1)[1] for u in found.asked if "/chunks/" in u] == ["0.js"]
    found.page.select_option("#docmarks", "all")
    found.page.locator("#doclist button").last.click()
    found.page.wait_for_selector('#doclist button[aria-current="true"] >> nth=-1')
    found.page.wait_for_function("document.querySelectorAll('script[src^=chunks]').length === 2")
    assert found.said == [] and all(u.startswith(("file:", "data:")) for u in found.asked)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 400
