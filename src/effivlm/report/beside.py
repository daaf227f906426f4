"""A run's numbers beside the published ones of the same model, method, budget and benchmark."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from effivlm.budget import BudgetError, parse_budget
from effivlm.metrics.intervals import share
from effivlm.metrics.sample import pseudo_values
from effivlm.reference import Published, all_published
from effivlm.scores import Scores
from effivlm.tasks.loading import official_tasks

Key = tuple[str, str, str]  # model, setting, task
UNCOMPRESSED = ("vanilla", "original")
SPELLED = {"vispruner": "visprune", "prumerge_plus": "prumerge+"}  # ours -> the papers'
UNITS = {  # what a perfect score is printed as, where it is not 100
    ("EffiVLM-Bench", "OCRBench"): 1000.0,
    ("EffiVLM-Bench", "MME"): 2800.0,
    ("Polymorphic", "MME"): 2800.0,
}
F1 = ("POPE-F1", "POPE", "pope_f1_score")  # as printed, the benchmark, and its number


@dataclass(frozen=True)
class Beside:
    """One number of ours and one of a paper, in the paper's unit.

    Attributes:
        half: half the 95 % interval of ours over documents; NaN where documents have no scores that
            join to it.
    """

    model: str
    setting: str
    documents: int
    ours: float
    half: float
    theirs: Published

    @property
    def apart(self) -> float:
        """The difference in units of our half interval."""
        return (self.ours - self.theirs.value) / self.half if self.half else float("nan")


def beside(totals: Mapping[Key, Scores]) -> list[Beside]:
    """Every pair of a number of ours and a published one that states the same."""
    figures = [r for r in all_published() if r.metric == "score"]
    known = official_tasks()
    out: list[Beside] = []
    for (model, setting, task), scores in totals.items():
        if task not in known or scores.void:
            continue
        for theirs in figures:
            number = _number(scores, known[task].benchmark, theirs)
            if number is not None and _same_model(model, theirs) and _same_setting(setting, theirs):
                unit = UNITS.get((theirs.source, theirs.benchmark), 100.0)
                half = _half(scores, number)
                pair = (unit * number, unit * half)
                out.append(Beside(model, setting, scores.documents, *pair, theirs))
    return out


def _number(scores: Scores, benchmark: str, theirs: Published) -> float | None:
    """Our share of a perfect score by the published metric, if it is of that benchmark."""
    if _letters(theirs.benchmark) == _letters(F1[0]) and benchmark == F1[1]:
        return scores.total.get(F1[2])
    printed = {_letters(benchmark), _letters(benchmark) + "en"}  # MMBench is also MMBench-EN
    return scores.headline if _letters(theirs.benchmark) in printed else None


def _same_model(model: str, theirs: Published) -> bool:
    """Whether ours has every word of the printed name, as llava-1.5-7b-hf has LLaVA-v1.5-7B's."""
    words = re.split(r"[-_/ ]", theirs.model.lower())
    ours = set(re.split(r"[-_/ ]", model.lower()))
    return bool(theirs.model) and {w.removeprefix("v") or w for w in words} <= {
        w.removeprefix("v") or w for w in ours
    }


def _same_setting(setting: str, theirs: Published) -> bool:
    if setting == "none":
        return theirs.method.lower() in UNCOMPRESSED
    head, _, tail = setting.partition("@")
    if "+" in setting or not tail or ":" in setting:
        return False  # several methods, or other parameters than the published ones
    name = SPELLED.get(head.strip(), head.strip())
    if _letters(name) != _letters(theirs.method):
        return False
    try:
        budget = parse_budget(tail.strip(), "visual")
    except BudgetError:
        return False
    printed = re.fullmatch(r"([\d.]+)(%| tokens)", theirs.setting)
    if printed is None:
        return False
    if printed[2] == "%":
        return budget.share is not None and abs(100 * budget.share - float(printed[1])) < 0.06
    return budget.tokens == float(printed[1])


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _half(scores: Scores, number: float) -> float:
    each = [s for s in scores.each.values() if s is not None]
    if len(each) != scores.documents or abs(float(np.mean(each)) - number) > 1e-9:
        return float("nan")
    low, high = share([pseudo_values(np.array(each)[:, None], np.arange(len(each)))])
    return (high - low) / 2


def lines(pairs: list[Beside]) -> Iterator[str]:
    """A Markdown table."""
    yield "| model | setting | benchmark | documents | ours | published | apart | source |"
    yield "|---|---|---|---|---|---|---|---|"
    for p in pairs:
        apart = "-" if np.isnan(p.apart) else f"{p.apart:+.1f}"
        half = "" if np.isnan(p.half) else f" ± {p.half:.1f}"
        yield (
            f"| {p.model} | {p.setting} | {p.theirs.benchmark} | {p.documents} |"
            f" {p.ours:.1f}{half} | {p.theirs.value:g} | {apart} | {p.theirs.source} table"
            f" {p.theirs.table}, {p.theirs.method} {p.theirs.setting} |"
        )
    if not pairs:
        yield "no published figure is of a model, method, budget and benchmark of this run"
