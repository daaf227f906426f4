"""Do two measurements of the same settings agree? `python benchmarks/speed_agreement.py RUN RUN`
prints a Markdown table.

Paired speed-ups of both runs with their 95 % intervals, and whether the intervals overlap; and over
all samples, the largest difference between the sum of the stages and the total.
"""

import sys
from pathlib import Path

from effivlm.metrics.efficiency import speedup
from effivlm.records import read_timings

STAGES = ("media", "vision", "method", "prefill", "decode")


def main(folders):
    runs = [read_timings(f) for f in folders]
    off = [abs(sum(t.seconds[s] for s in STAGES) / t.seconds["total"] - 1) for r in runs for t in r]
    worst, mean = 100 * max(off), 100 * sum(off) / len(off)
    print(
        f"{len(off)} samples; the sum of the stages is off the total by at most {worst:.2f} %,"
        f" {mean:.2f} % on average.\n"
    )
    print(
        "| workload | setting | stage | first run | second run | intervals overlap |\n| --- | --- |"
        " --- | --- | --- | --- |"
    )
    good = total = 0
    for workload, setting in dict.fromkeys((t.workload, t.setting) for t in runs[0]):
        for stage in ("ttft", "total") if setting != "none" else ():
            pair = [
                speedup(
                    [t for t in r if (t.workload, t.setting) == (workload, setting)],
                    [t for t in r if (t.workload, t.setting) == (workload, "none")],
                    stage,
                )
                for r in runs
            ]
            same = pair[0].low <= pair[1].high and pair[1].low <= pair[0].high
            good, total = good + same, total + 1
            cells = [f"{s.ratio:.2f}x [{s.low:.2f}-{s.high:.2f}]" for s in pair]
            print(
                f"| {workload} | {setting} | {stage} | {cells[0]} | {cells[1]} |"
                f" {'yes' if same else 'no'} |"
            )
    print(f"\n{good} of {total} overlap.")


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[1:]])
