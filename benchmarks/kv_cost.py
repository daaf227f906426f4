"""What KV statistics cost on a CPU, as a ratio to the layer's prefill in the same run: `python
benchmarks/kv_cost.py`.

One decoder layer of a 7B model (28 query heads, 4 KV heads, d = 128, hidden 3584, MLP 18944),
random weights, float32. Layer and methods take turns; printed are medians over rounds, with range,
of processor time, which other jobs on the machine hardly change. ``speed`` is layer / (layer +
method); ``memory`` is the higher of the two peaks over the layer's own.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kv_source import Layer
from torch import Tensor, nn
from torch.nn import functional

from effivlm.methods.base import KVCache
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.look_m import LookM
from effivlm.methods.kv_cache.plphp import PLPHP
from effivlm.methods.kv_cache.pyramidkv import PyramidKV
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.kv_cache.tova import Tova
from effivlm.methods.kv_cache.vl_cache import VLCache

HIDDEN, MLP, HEADS, GROUPS, WIDTH = 3584, 18944, 28, 4, 128
ROWS, COLUMNS = 0.97, 0.85  # least speed of row-restricted and of column-sum methods
PEAK = 1.1
CASES: tuple[tuple[KVCache, float], ...] = (
    (SnapKV(), ROWS),
    (SnapKV(rows=32), ROWS),
    (PyramidKV(), ROWS),
    (Tova(), ROWS),
    (VLCache(), ROWS),
    (PLPHP(), ROWS),
    (H2O(), COLUMNS),
    (LookM(merge="none"), COLUMNS),
    (LookM(), COLUMNS),
)


class Block(nn.Module):
    """Norm-free decoder layer: its time is in the same matrix products as a real one's."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "q": (HIDDEN, HIDDEN),
            "kv": (HIDDEN, 2 * GROUPS * WIDTH),
            "o": (HIDDEN, HIDDEN),
            "gate": (HIDDEN, MLP),
            "up": (HIDDEN, MLP),
            "down": (MLP, HIDDEN),
        }
        self.linear = nn.ModuleDict(
            {name: nn.Linear(a, b, bias=False) for name, (a, b) in sizes.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        """[L, D] to [L, D]."""
        q = self.linear["q"](x).view(1, -1, HEADS, WIDTH).transpose(1, 2)
        k, v = self.linear["kv"](x).view(1, -1, 2 * GROUPS, WIDTH).transpose(1, 2).chunk(2, 1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.linear["o"](y.transpose(1, 2).reshape(x.shape))
        return x + self.linear["down"](
            functional.silu(self.linear["gate"](x)) * self.linear["up"](x)
        )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(work: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds, and peak bytes above what was held before."""
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    work()
    took = time.process_time() - start
    done.set()
    watcher.join()
    return took, max(0, peak[0] - before)


def compress(method: KVCache, layer: Layer, k: int) -> None:
    """Signals, scores, statistic and choice of one layer."""
    cache = layer.cache(method, fresh=True)
    if method.waits:
        method.statistic(cache)
    method.choose(cache, method.score(cache, k), k)


@torch.no_grad()
def main() -> int:
    """Print the table; 1 if a target is missed."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--length", type=int, default=4096)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--keep", type=float, default=0.1)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    block, x = Block(), torch.randn(options.length, HIDDEN)
    layer, k = (
        Layer(options.length, HEADS, GROUPS, WIDTH, number=3, layers=28),
        int(options.keep * options.length),
    )
    block(x[:64]), compress(H2O(), Layer(256, HEADS, GROUPS, WIDTH), 20)  # warm-up
    full, times, speeds, peaks = [], {}, {}, {}
    for _ in range(options.rounds):
        base, base_peak = measured(lambda: block(x))
        full.append(base)
        for i, (method, _) in enumerate(CASES):
            took, peak = measured(lambda method=method: compress(method, layer, k))
            times.setdefault(i, []).append(took)
            speeds.setdefault(i, []).append(base / (base + took))
            peaks.setdefault(i, []).append(max(base_peak, peak) / max(base_peak, 1))
    print(
        f"torch {torch.__version__}, {options.threads} threads, L = {options.length}, keep"
        f" {options.keep:g}"
    )
    print(
        f"layer prefill, {options.rounds} rounds: {statistics.median(full):.2f} s ({min(full):.2f}"
        f" to {max(full):.2f})"
    )
    print(f"{'method':22}{'seconds':>9}{'speed':>8}{'range':>18}{'target':>8}{'memory':>8}")
    missed = 0
    for i, (method, target) in enumerate(CASES):
        speed, peak = statistics.median(speeds[i]), max(peaks[i])
        missed += speed < target or peak > PEAK
        label = " ".join(
            [method.name, *(f"{f}={v}" for f in ("rows", "merge") if (v := getattr(method, f, 0)))]
        )
        span = f"{min(speeds[i]):.3f} to {max(speeds[i]):.3f}"
        print(
            f"{label:22}{statistics.median(times[i]):>9.2f}{speed:>8.3f}{span:>18}{target:>8.2f}{peak:>8.2f}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
