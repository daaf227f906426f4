"""What a session costs the host where the model costs little: `python benchmarks/host_cost.py`.

A tiny model (one family, random weights) of 28 layers: waits for the device and dispatched
operations of one prefill, counted, and the time to the first token, plain over ours. Plain and
settings take turns; printed are medians over rounds of the ratio within a round, with range. Times
are processor time of one thread. Prints Markdown.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from effivlm.families.tiny import deep, prompt
from effivlm.measure.traffic import Traffic
from effivlm.runtime.session import Session

SETTINGS = ("none", "snapkv@0.2", "h2o@0.2", "vl_cache@0.2", "adakv@0.2", "divprune@0.2")


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Waits and operations of one call."""
    with Traffic() as seen:
        work()
    return seen.waits, seen.operations


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--family", default="qwen2_vl")
    args.add_argument("--layers", type=int, default=28)
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--repeats", type=int, default=4)
    options = args.parse_args()
    torch.set_num_threads(1)
    inputs, host = prompt(options.family, 2), deep(options.family, options.layers)

    def first_token() -> None:
        host(**inputs, use_cache=True, logits_to_keep=1)

    times: dict[str, list[float]] = {s: [] for s in ("plain", *SETTINGS)}
    counts = {"plain": counted(first_token)}
    for text in SETTINGS:
        with Session(host, text):
            first_token()
            counts[text] = counted(first_token)
    for _ in range(options.rounds):
        times["plain"].append(min(seconds(first_token) for _ in range(options.repeats)))
        for text in SETTINGS:
            with Session(host, text):
                times[text].append(min(seconds(first_token) for _ in range(options.repeats)))
    load = os.getloadavg()[0]
    length = inputs["input_ids"].shape[1]
    print(
        f"torch {torch.__version__}, {options.family}, {options.layers} layers, {length} tokens,"
        f" {options.rounds} rounds of the best of {options.repeats}, load {load:.1f}\n"
    )
    print("| setting | waits | operations | more a layer | least ms | plain / ours | range |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for text, took in times.items():
        ratios = [p / t for p, t in zip(times["plain"], took, strict=True)]
        waits, operations = counts[text]
        more = (operations - counts["plain"][1]) / options.layers
        print(
            f"| {text} | {waits} | {operations} | {more:.0f} | {1e3 * min(took):.1f} |"
            f" {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
        )


if __name__ == "__main__":
    main()
