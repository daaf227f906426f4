"""Settings against reference methods at the same budget, from a run's records: `python
benchmarks/against.py RUN REFERENCE ...`.

For every model and budget: OP with its interval over documents and, for each reference, the mean
difference of scores in points with the p-value of a paired sign-flip test over documents
(Holm-corrected over the methods of a budget). Markdown on stdout.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from effivlm.metrics.paired import holm, paired_test
from effivlm.metrics.performance import pairs_of, score_of
from effivlm.records import DocumentRecord, read_run
from effivlm.report.rows import Row, rows_of


def differences(mine: list[DocumentRecord], theirs: list[DocumentRecord]) -> dict[str, np.ndarray]:
    """Task -> score under one setting minus score under the other, document by document."""
    pairs = pairs_of(mine, theirs)
    return {t: np.array([score_of(a) - score_of(b) for a, b in p]) for t, p in pairs.items()}


def table(
    rows: list[Row], records: dict[str, list[DocumentRecord]], references: list[str], budget: str
) -> list[str]:
    """Lines of one model and budget, best first."""
    mine = sorted((r for r in rows if r.asked == budget), key=lambda r: -r.op)
    cells: dict[str, list[str]] = {r.setting: [] for r in mine}
    for name in references:
        base = records[f"{name}@{budget}"]
        found = {r.setting: differences(records[r.setting], base) for r in mine}
        adjusted = holm([paired_test(found[r.setting]) for r in mine])
        for r, p in zip(mine, adjusted, strict=True):
            points = 100 * float(np.mean([d.mean() for d in found[r.setting].values()]))
            cells[r.setting].append(
                "-" if r.setting == f"{name}@{budget}" else f"{points:+.1f} (p {p:.3f})"
            )
    lines = []
    for r in mine:
        shares = f"{100 * r.shares['visual_mean']:.0f} / {100 * r.shares['prompt_kv']:.0f}"
        lines.append(
            f"| {r.setting} | {shares} | {r.op:.1f} [{r.low:.1f}, {r.high:.1f}] | "
            + " | ".join(cells[r.setting])
            + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("references", nargs="+")
    args = parser.parse_args()
    everything = read_run(args.run)
    for model in dict.fromkeys(r.model for r in everything):
        records: dict[str, list[DocumentRecord]] = defaultdict(list)
        for r in everything:
            if r.model == model:
                records[r.setting].append(r)
        rows = rows_of([r for rs in records.values() for r in rs])
        for budget in dict.fromkeys(r.asked for r in rows if r.asked):
            references = [n for n in args.references if f"{n}@{budget}" in records]
            print(f"\n## {model}, keep {budget}\n")
            print(
                "| setting | visual / KV % (mean over layers) | OP % | "
                + " | ".join(f"against {n}" for n in references)
                + " |"
            )
            print("|---|---|---|" + "---|" * len(references))
            print("\n".join(table(rows, records, references, budget)))


if __name__ == "__main__":
    main()
