"""Reruns EffiVLM-Bench 5.1, 5.2 and 5.4 on the built-in suite: `python benchmarks/findings_kv.py
[--model NAME] [--documents N]`.

Runs `findings_kv.yaml` (all settings share one prefill a document; what ``runs/`` holds is not done
again), then compares the settings of each finding document by document. Prints Markdown: mean over
tasks of the difference in score, in points, its 95 % interval over documents, and the
p-value of a sign-flip test, Holm-corrected within a finding. ``all`` is the mean of each document
over the budgets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effivlm.config import load_experiment
from effivlm.experiment import run
from effivlm.metrics import intervals
from effivlm.metrics.paired import holm, paired_test
from effivlm.metrics.performance import score_of
from effivlm.metrics.sample import Part
from effivlm.records import DocumentRecord, read_run

KEEP = ("0.05", "0.1", "0.2", "0.4")
ADAPTIVE = ("snapkv", "h2o", "pyramidkv", "vl_cache")
# finding -> (what is compared, first setting, second setting); {} is the budget, positive means
# that the first is better
FINDINGS = {
    "5.1 Hybrid layer allocation: part spread evenly beats adaptive alone, U-80 best": [
        ("U-40 - adaptive", "vl_cache@{}:uniform=0.4", "vl_cache@{}"),
        ("U-80 - adaptive", "vl_cache@{}:uniform=0.8", "vl_cache@{}"),
        ("U-80 - U-40", "vl_cache@{}:uniform=0.8", "vl_cache@{}:uniform=0.4"),
        ("U-80 - even", "vl_cache@{}:uniform=0.8", "vl_cache@{}:uniform=1.0"),
    ],
    "5.2 Head-adaptive selection: each KV head for itself beats one choice for all": [
        (f"{m}: per head - shared", m + "@{}", m + "@{}:shared=true") for m in ADAPTIVE
    ],
    "5.4 Modality-specific merging: merging within modalities beats LOOK-M's merging across them": [
        ("within - across", "look_m@{}:modality=true", "look_m@{}"),
        ("within - no merging", "look_m@{}:modality=true", "look_m@{}:merge=none"),
        ("across - no merging", "look_m@{}", "look_m@{}:merge=none"),
    ],
}
Scores = dict[str, dict[str, dict[str, float]]]  # setting -> task -> document -> score


def scores_of(records: Sequence[DocumentRecord]) -> Scores:
    """Scores by setting, task and document; a failed document scores 0."""
    out: Scores = {}
    for r in records:
        out.setdefault(r.setting, {}).setdefault(r.task, {})[r.document] = score_of(r)
    return out


def differences(scores: Scores, pairs: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Task -> [documents] score of the first minus score of the second setting, mean over the
    pairs.
    """
    tasks = scores[pairs[0][0]]
    return {
        t: np.array(
            [np.mean([scores[a][t][d] - scores[b][t][d] for a, b in pairs]) for d in tasks[t]]
        )
        for t in tasks
    }


def verdict(low: float, high: float, p: float) -> str:
    """Whether the difference is positive: the interval must exclude zero and the corrected p-value
    lie below 0.05.
    """
    return "not resolved" if p >= 0.05 or low <= 0 <= high else "yes" if low > 0 else "the opposite"


def table(scores: Scores, comparisons: Sequence[tuple[str, str, str]]) -> str:
    """One finding's comparisons at every budget and over all."""
    rows = []
    for what, first, second in comparisons:
        pairs = [(first.format(k), second.format(k)) for k in KEEP]
        rows += [(what, k, differences(scores, [p])) for k, p in zip(KEEP, pairs, strict=True)]
        rows.append((what, "all", differences(scores, pairs)))
    corrected = holm([paired_test(x) for *_, x in rows])
    lines = [
        "| comparison | budget | points | 95 % | p | better? |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (what, keep, x), p in zip(rows, corrected, strict=True):
        parts = [Part(d, np.arange(len(d)) + 10**6 * i) for i, d in enumerate(x.values())]
        mean, (low, high) = 100 * intervals.average(parts), intervals.difference(parts)
        cells = (
            what,
            keep,
            f"{mean:+.2f}",
            f"{100 * low:+.2f} to {100 * high:+.2f}",
            f"{p:.3f}",
            verdict(low, high, p),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layer_shares(records: Sequence[DocumentRecord], setting: str) -> str:
    """Mean share of the prompt's entries that each layer keeps."""
    costs = [r.cost for r in records if r.setting == setting and r.cost]
    return " ".join(
        f"{x:.3f}"
        for x in np.mean([np.array(c["kv_per_layer"]) / c["prompt_tokens"] for c in costs], axis=0)
    )


def means(scores: Scores) -> str:
    """Mean score over tasks of every setting, a row for a method and a column for a budget."""
    templates = list(dict.fromkeys(s for c in FINDINGS.values() for _, *pair in c for s in pair))
    lines = ["| setting | " + " | ".join(KEEP) + " |", "| --- " * (1 + len(KEEP)) + "|"]
    for text in templates:
        cells = [
            100 * np.mean([np.mean(list(d.values())) for d in scores[text.format(k)].values()])
            for k in KEEP
        ]
        lines.append(
            f"| {text.replace('@{}', '')} | " + " | ".join(f"{c:.1f}" for c in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="another model or checkpoint folder")
    parser.add_argument("--documents", type=int, help="of each task; all by default")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    args = parser.parse_args()
    experiment = load_experiment(Path(__file__).with_suffix(".yaml"))
    if args.model:
        experiment = experiment.model_copy(
            update={"models": (experiment.models[0].model_copy(update={"name": args.model}),)}
        )
    tasks = tuple(t.model_copy(update={"documents": args.documents}) for t in experiment.tasks)
    experiment = experiment.model_copy(update={"tasks": tasks})
    summary = run(experiment, args.root)
    records = read_run(args.root / experiment.name)
    scores = scores_of(records)
    sizes = {t: len(d) for t, d in scores["none"].items()}
    plain = 100 * np.mean([np.mean(list(d.values())) for d in scores["none"].values()])
    print(
        f"{experiment.models[0].name}: {sum(sizes.values())} documents of {len(sizes)} tasks,"
        f" {summary.failed} answers failed; uncompressed {plain:.1f}\n\nMean score over"
        f" tasks\n\n{means(scores)}\n"
    )
    for text in ("vl_cache@{}", "vl_cache@{}:uniform=0.4", "vl_cache@{}:uniform=0.8"):
        print(
            f"{text.replace('@{}', '')}: share kept in each layer at 0.2:"
            f" {layer_shares(records, text.format('0.2'))}"
        )
    for claim, comparisons in FINDINGS.items():
        print(f"\n## {claim}\n\n{table(scores, comparisons)}")


if __name__ == "__main__":
    main()
