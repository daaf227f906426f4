"""What became of every visual token: against methods whose choices are known, alone and shared."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from test_bad_input import checkpoint, invoke, task  # noqa: F401
from typer.testing import CliRunner

from effivlm import compress
from effivlm.budget import parse_budget
from effivlm.cli import app
from effivlm.families.tiny import double, exact
from effivlm.methods.base import (
    Entries,
    IntraLLM,
    KVCache,
    Merge,
    Method,
    Paper,
    PreLLM,
    Selection,
)
from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.plan import Plan
from effivlm.runtime.trace import digits
from effivlm.setting import Part, Setting, parse_setting

NOWHERE = Paper("none", "", "")


@dataclass(frozen=True)
class FirstOnes(PreLLM):
    """Keeps the first k tokens; the last goes into the first."""

    name: ClassVar[str] = "first_ones"
    paper: ClassVar[Paper] = NOWHERE

    def select_image(self, tokens, k):
        n = len(tokens.embeds)
        merge = Merge(torch.tensor([0, 0]), torch.tensor([0, n - 1]), torch.tensor([0.5, 0.5]))
        return Selection(torch.arange(k), merge)


@dataclass(frozen=True)
class EveryOther(IntraLLM):
    """From layer 2 on every other token, each with its neighbour merged in."""

    name: ClassVar[str] = "every_other"
    paper: ClassVar[Paper] = NOWHERE

    def counts(self, room, budget):
        return [n if i < 2 else n // 2 for i, n in enumerate(room.lengths)]

    def select_layer(self, tokens, k):
        keep = torch.arange(0, 2 * k, 2)
        return Selection(keep, Merge(keep, keep + 1, torch.ones(k)))


@dataclass(frozen=True)
class Ends(KVCache):
    """The first KV head keeps the first entries and those at the end, the others only the end."""

    name: ClassVar[str] = "ends"
    paper: ClassVar[Paper] = NOWHERE

    def score(self, cache, k):
        return torch.zeros(cache.keys.shape[:2])

    def choose(self, cache, scores, k):
        keep = torch.zeros(cache.keys.shape[:2], dtype=torch.bool)
        keep[:, len(keep[0]) - k :] = True
        keep[0] = False
        keep[0, : k - 1] = keep[0, -1] = True
        return Entries(keep)


def part(method: Method, text="0.5", unit="visual"):
    return Part(method, parse_budget(text, unit))


BEFORE, INSIDE = part(FirstOnes()), part(EveryOther())
CACHE = part(Ends(), unit="prompt_kv")
WHOLE = Setting((BEFORE, INSIDE, CACHE))


def expected(trace, image):
    """By the rules of the three methods above."""
    n = len(image.place)
    first = torch.arange(n) < n // 2
    inside = first & (torch.arange(n) % 2 == 0)
    for layer, mask in enumerate(image.layers):
        assert mask.tolist() == (first if layer < 2 else inside).tolist()
    before, within = image.merged
    assert (before[0], before[1].tolist(), before[2].tolist()) == (-1, [0, 0], [0, n - 1])
    kept = inside.nonzero()[:, 0]
    assert within[0] == 2 and within[1].tolist() == kept.tolist()
    assert within[2].tolist() == (kept + 1).tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_a_trace_says_what_the_methods_chose(family):
    model, inputs = exact(family), double(family)
    with compress(model, WHOLE) as session:
        with pytest.raises(UnsupportedCall, match=r"read session.trace inside the with block"):
            _ = session.trace
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        (found,), (account,) = session.trace, session.accounts
    layers = torch.stack([image.layers.sum(1) for image in found.images]).sum(0)
    assert layers.tolist() == list(account.visual_per_layer)
    if family == "qwen2_vl":  # one unit an image, as `expected` says it
        for image in found.images:
            expected(found, image)
    first, others = found.images[0].cache[:, 0], found.images[0].cache[:, 1:]
    assert first.any() and first[:, 0].all(), "the first head kept the first entries"
    assert not torch.equal(first, others[:, 0])
    assert not (found.images[0].cache & ~found.images[0].layers[:, None]).any()


def test_a_shared_run_traces_what_a_session_does():
    model, inputs = exact("qwen2_vl"), double("qwen2_vl")
    settings = [Setting(()), WHOLE, Setting((BEFORE, CACHE)), Setting((INSIDE,))]
    shared = {o.setting: o for o in Plan(model, settings, keep=True).run(inputs, 2, [])}
    for setting in settings:
        with compress(model, setting) as session:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            alone = session.trace[0].compact()
        assert shared[setting].error is None and shared[setting].trace.compact() == alone
    assert all(o.trace is None for o in Plan(model, settings).run(inputs, 2, []))


def test_rows_of_a_batch_have_their_own_traces():
    model = exact("qwen2_vl")
    one, two = double("qwen2_vl", 1), double("qwen2_vl", 2)
    with compress(model, WHOLE) as session:
        model.generate(**tiny.batch("qwen2_vl", one, two), max_new_tokens=2, do_sample=False)
        both = [t.compact() for t in session.trace]
        for inputs, row in ((one, 0), (two, 1)):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert session.trace[0].compact() == both[row]


def test_the_compact_form():
    mask = torch.tensor([1, 0, 0, 0, 1, 1]).bool()
    assert digits(mask) == "8c", "four tokens a digit, the first the highest bit"
    model, inputs = exact("qwen2_vl"), double("qwen2_vl", 1)
    with compress(model, WHOLE) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        (image,) = session.trace[0].compact()["images"]
    assert json.loads(json.dumps(image)) == image and image["tiles"] == 1
    assert image["grid"][0] * image["grid"][1] == image["tokens"]
    assert [layer for layer, _ in image["layers"]] == [0, 2] and len(image["cache"]) == 4
    with compress(model, Setting(())) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert "cache" not in session.trace[0].compact()["images"][0], "it is whole"


def test_a_run_that_keeps_and_a_document_explained_later(invoke, tmp_path):  # noqa: F811
    status, _ = invoke(settings=["uniform@0.5"], keep=True)
    run = tmp_path / "runs/x"
    (kept,) = (run / "traces").rglob("*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert status == 0 and [x["setting"] for x in lines] == ["none", "uniform@0.5"] * 2
    assert len(list((run / "pictures").iterdir())) == 2 + 2, "two pictures, and their tiles"

    done = CliRunner().invoke(app, ["explain", str(run), "odd/b", "uniform@0.5"])
    assert done.exit_code == 0 and "visual tokens, entering layers" in done.output
    again = json.loads(kept.read_text().splitlines()[-1])
    assert again == next(
        x for x in lines if (x["document"], x["setting"]) == ("b", "uniform@0.5")
    ), "the same document is traced the same way"
    done = CliRunner().invoke(app, ["explain", str(run), "c", "uniform@0.5"])
    assert done.exit_code == 2 and "this run asked no document 'c'" in done.output
    assert parse_setting("uniform@0.5").parts
