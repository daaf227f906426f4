"""What else used the machine while something was timed; a timing under load says so."""

import os
import subprocess
import time
from pathlib import Path

import torch

SPARE = 0.15  # CPU cores that others may use before it is worth a note
CONTEXT = 2 << 30  # bytes on a GPU that a CUDA context and its libraries may take


class Watch:
    """CPU time of all other processes between two readings; the load average where the system does
    not tell.
    """

    def __init__(self) -> None:
        self.began = self._read()

    def note(self) -> str:
        """What others used since the start; empty where it is little."""
        now = self._read()
        wall = max(now[0] - self.began[0], 1e-9)
        if now[1] is None or self.began[1] is None:
            load = os.getloadavg()[0] - torch.get_num_threads()
            return f"load {load:.1f} above ours on {os.cpu_count()} cores" if load > 1 else ""
        others = (now[1] - self.began[1] - (now[2] - self.began[2])) / wall
        tick = 2 / os.sysconf("SC_CLK_TCK") / wall  # readings are rounded to ticks
        return (
            f"others used {others:.1f} of {os.cpu_count()} CPU cores"
            if others > SPARE + tick
            else ""
        )

    @staticmethod
    def _read() -> tuple[float, float | None, float]:
        own = os.times()
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
            user, nice, system, _, _, irq, soft = (int(x) for x in fields[:7])
            busy: float | None = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            busy = None
        return time.monotonic(), busy, own.user + own.system


def gpu_note(device: torch.device) -> str:
    """Other processes on the GPU; empty where there are none, or no GPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    foreign = total - free - torch.cuda.memory_reserved(device)
    if foreign > CONTEXT:
        return f"others hold {foreign / 2**30:.1f} GiB of the GPU"
    command = [
        "nvidia-smi",
        f"--id={device.index or 0}",
        "--query-compute-apps=pid",
        "--format=csv,noheader",
    ]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{len(found)} processes on the GPU" if len(found) > 1 else ""
