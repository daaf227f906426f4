"""What column statistics cost beside one more causal product of queries and keys: `python
benchmarks/tail_cost.py`.

One layer's queries and keys, random, float32. Compared, taking turns: the product alone in the same
blocks (the floor), one pass for sums, one pass for sums and a threshold, and both as two passes in
blocks of 256 rows (`statistics.row_sums`, `statistics.threshold_share`), as it was. Processor time
of one thread; ratios to the floor of the same round, median and range. Prints Markdown.
"""

import argparse
import os
import statistics as numbers
import time
from collections.abc import Callable

import torch
from torch import Tensor

from effivlm.ops import statistics
from effivlm.ops.tails import BUFFER, tail_statistics

SHAPES = ((14, 2, 64, 2048), (14, 2, 64, 4096), (28, 4, 128, 2048))  # heads, KV heads, width, rows


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def product(q: Tensor, k: Tensor, buffer: int) -> None:
    """Queries times keys, causal blocks only."""
    groups, length, width = k.shape
    q = q.view(groups, -1, length, width)
    step = max(1, min(256, buffer // (q.shape[1] * length)))
    for h in range(groups):
        keys = k[h].T
        for start in range(0, length, step):
            end = min(start + step, length)
            torch.mm(q[h, :, start:end].reshape(-1, width), keys[:, :end])


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--buffer", type=int, default=BUFFER)
    options = args.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {options.rounds} rounds, blocks of {options.buffer} logits\n"
    )
    print("| heads / KV / width / length | what | ms, least | times the product | range | load |")
    print("|---|---|---:|---:|---|---:|")
    for heads, groups, width, length in SHAPES:
        q, k = torch.randn(heads, length, width), torch.randn(groups, length, width)
        scaling, rows = width**-0.5, torch.arange(length)
        works: dict[str, Callable[[], object]] = {
            "product": lambda q=q, k=k: product(q, k, options.buffer),
            "sums": lambda q=q, k=k, s=scaling: tail_statistics(q, k, s, buffer=options.buffer),
            "sums as before": lambda q=q, k=k, s=scaling, r=rows: statistics.row_sums(q, k, r, s),
            "sums and threshold": lambda q=q, k=k, s=scaling: tail_statistics(
                q, k, s, (0.01,), buffer=options.buffer
            ),
            "both as before": lambda q=q, k=k, s=scaling, r=rows: (
                statistics.row_sums(q, k, r, s),
                statistics.threshold_share(q, k, r, s, 0.01),
            ),
        }
        took: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.rounds):
            for name, work in works.items():
                took[name].append(seconds(work))
        for name, times in took.items():
            ratios = [t / p for t, p in zip(times, took["product"], strict=True)]
            print(
                f"| {heads} / {groups} / {width} / {length} | {name} | {1e3 * min(times):.0f} |"
                f" {numbers.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
                f" {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
