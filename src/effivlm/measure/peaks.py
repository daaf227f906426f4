"""What a device can do: measured by one large product and one copy, or as its maker states."""

import time
from collections.abc import Callable
from typing import Any

import torch

from effivlm import registry
from effivlm.measure.roofline import Peaks

# Dense bfloat16 products with float32 sums, memory bandwidth and size, from the makers' data sheets
STATED = {
    "a100-80gb": Peaks("a100-80gb", 312e12, 2.039e12, 80e9),
    "h100-sxm": Peaks("h100-sxm", 989e12, 3.35e12, 80e9),
    "h200": Peaks("h200", 989e12, 4.8e12, 141e9),
    "l40s": Peaks("l40s", 362e12, 0.864e12, 48e9),
}


def stated(name: str) -> Peaks:
    """A device by name.

    Raises:
        UnknownName: with near names.
    """
    return registry.lookup("device", name, STATED)


def measured(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Peaks:
    """Peaks of the device in use: the best of some large products, and of some large copies (read
    and written).
    """
    cuda = device.type == "cuda"
    side, size = (8192, 1 << 30) if cuda else (1536, 1 << 28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best(lambda: torch.mm(a, b, out=out), device, repeats)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device, repeats)
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    name = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    return Peaks(
        f"{name}, {str(dtype).removeprefix('torch.')}",
        2 * side**3 / product,
        2 * size / copy,
        memory,
    )


def _best(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[2:])
