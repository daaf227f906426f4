"""A clock that divides one run's time among its stages, with nothing counted twice and nothing left
out.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

METHOD = "method"
OPEN = (
    "vision",
    "prefill",
)  # stages whose hooks are told apart; decode hooks belong to the decode step


class Clock:
    """Divides the time between `start` and `stop` among stages and the method's hooks within them.

    At every change of stage one mark is made: a CUDA event on a GPU, which needs no
    synchronisation, or the monotonic clock on a CPU. The device is synchronised only at `start` and
    `stop`.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.device = device.type == "cuda", device
        self.stage: str | None = None
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a run."""
        self._wait()
        self.marks, self.stage, self.began = [], None, time.perf_counter()

    def stop(self) -> dict[str, float]:
        """End it.

        Returns:
            Seconds by stage, and ``total`` from a clock of its own.
        """
        self._mark("end")
        self._wait()
        total = time.perf_counter() - self.began
        self.stage = None
        out: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            out[name] = out.get(name, 0.0) + self._between(begin, end)
        return out | {"total": total}

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Count what happens inside as a stage, except what `wrap` takes out of it."""
        self.stage = stage
        self._mark(stage)
        try:
            yield
        finally:
            self.stage = None
            self._mark("between")

    def wrap(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts as the method's time, or (``what="model"``) as the stage that runs
        it.
        """

        @functools.wraps(function, assigned=())
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.stage not in OPEN:
                return function(*args, **kwargs)
            before = self.marks[-1][0]
            self._mark(METHOD if what == METHOD else self.stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._mark(before)

        return counted

    def _mark(self, name: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.cuda else end - begin

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
