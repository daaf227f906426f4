"""KV statistics on a GPU: is the Triton kernel right, and what do statistics cost? `python
gpu/kv_statistics.py`.

First the fused column sums against the blocked twin. Then one bfloat16 decoder layer of a 7B model
at 8k and 32k tokens, timed with CUDA events: layer, layer and row-restricted statistic, layer and
column sums, taking turns. Every layer of a model does the same work, so the ratio is that of the
prefill. Targets: rows >= 0.98, column sums >= 0.93 of the plain speed, peak memory at 32k <= 1.05.
Exit status 1 on a wrong number or a missed target.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from effivlm.ops import statistics as blocked
from effivlm.ops.kernels.column_sums import column_sums

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kv_cost import GROUPS, HEADS, HIDDEN, WIDTH, Block

ROWS, COLUMNS, PEAK = 0.98, 0.93, 1.05


def check() -> bool:
    """Kernel against twin: odd lengths, groups of 1, 7 and 28, chunks, bfloat16 and float32."""
    good = True
    for heads, groups, length, width, dtype in (
        (28, 4, 1000, 128, torch.bfloat16),
        (8, 8, 333, 64, torch.float32),
        (28, 1, 2049, 80, torch.bfloat16),
    ):
        q, k = (torch.randn(h, length, width, device="cuda", dtype=dtype) for h in (heads, groups))
        want = blocked.column_sums(q, k, width**-0.5)
        half = length // 2
        chunked = column_sums(q[:, half:], k, width**-0.5, half)
        chunked[:, :half] += column_sums(q[:, :half], k[:, :half], width**-0.5)
        for name, got in (("whole", column_sums(q, k, width**-0.5)), ("chunked", chunked)):
            error = float(((got - want).abs() / want).max())
            good &= error < 1e-3
            print(
                f"{name:8} H={heads} KV={groups} L={length} d={width} {dtype}: largest relative"
                f" error {error:.1e}"
            )
    return good


def seconds(work: Callable[[], object]) -> float:
    """Of one call, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak(work: Callable[[], object]) -> int:
    """Bytes allocated at most during one call."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


@torch.no_grad()
def cost(length: int, rounds: int = 15) -> bool:
    """Speed and memory at one length."""
    block = Block().to("cuda", torch.bfloat16)
    x = torch.randn(length, HIDDEN, device="cuda", dtype=torch.bfloat16)
    q, k = (
        torch.randn(h, length, WIDTH, device="cuda", dtype=torch.bfloat16) for h in (HEADS, GROUPS)
    )
    at = torch.arange(length - 256, length, device="cuda")

    def rows() -> Tensor:
        return blocked.row_sums(q[:, at], k, at, WIDTH**-0.5)

    cases = {
        "layer": (lambda: block(x), 1.0),
        "rows": (lambda: (block(x), rows()), ROWS),
        "columns": (lambda: (block(x), column_sums(q, k, WIDTH**-0.5)), COLUMNS),
    }
    for work, _ in cases.values():
        work()
    taken = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (work, _) in cases.items():
            taken[name].append(seconds(work))
    plain, held = statistics.median(taken["layer"]), peak(cases["layer"][0])
    good = True
    for name, (work, target) in cases.items():
        speed, memory = plain / statistics.median(taken[name]), peak(work) / held
        good &= speed >= target - (0.01 if name == "layer" else 0) and (
            memory <= PEAK or length < 32768
        )
        ratios = [a / b for a, b in zip(taken["layer"], taken[name], strict=True)]
        print(
            f"L={length} {name:8} {1e3 * statistics.median(taken[name]):8.2f} ms  speed {speed:.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f})  target {target:.2f}  memory {memory:.3f}"
        )
    return good


def main() -> int:
    """Everything; 1 if anything is off."""
    if not torch.cuda.is_available():
        print("needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    return 0 if all([check(), cost(8192), cost(32768)]) else 1


if __name__ == "__main__":
    sys.exit(main())
