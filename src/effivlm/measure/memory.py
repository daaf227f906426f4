"""Memory in bytes: peaks of a run, weights, what a cache holds."""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effivlm.runtime.cache import bytes_held


def reset_peaks(device: torch.device) -> None:
    """Forget earlier peaks, where the system can (Linux and CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except (
        OSError
    ):  # another system, or a container that forbids it: the peak is that of the whole process
        return


def peaks(device: torch.device) -> dict[str, int]:
    """Peaks since `reset_peaks`: ``resident`` of the process; on a GPU also ``allocated`` and
    ``reserved``.
    """
    out = {"resident": resident_peak()}
    if device.type == "cuda":
        out |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return out


def resident_peak() -> int:
    """Largest resident set of this process, bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; shared tensors count once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def kv_bytes(cache: Any) -> int:
    """Bytes of all stored keys and values, padding included."""
    return bytes_held(cache)


def kv_bytes_per_layer(cache: Any) -> list[int]:
    """The same, layer by layer."""
    return [layer.bytes_held() for layer in cache.layers]


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside the ``with`` block returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out
