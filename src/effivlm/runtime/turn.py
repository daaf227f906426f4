"""What a session remembers between the calls of one thread: the call on its way, images encoded for
it, the last prompt, and what its prompts cost.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.runtime.account import Account
from effivlm.runtime.prefill import Prefill
from effivlm.runtime.tokens import Decisions
from effivlm.runtime.vision import Encoded


@dataclass(frozen=True)
class Call:
    """One call of the base model.

    Attributes:
        visual: [B, L] bool, image placeholders. real: [B, T] bool, or None without a 2-D mask.
        ids: [B, L] or None. output: images encoded before, as they were given, or None.
        marked: ``visual`` was said by the caller.
    """

    visual: Tensor
    real: Tensor | None
    ids: Tensor | None
    output: Any
    marked: bool


class Turn(threading.local):
    """The state of one thread; every change is a method.

    Attributes:
        prefill: the last one. running_prefill: the one whose layers are running, or None.
        accounts: of the last call. ready: images to be taken instead of encoding again, or None.
    """

    def __init__(self) -> None:
        self.prefill: Prefill | None = None
        self.running_prefill: Prefill | None = None
        self.accounts: list[Account] = []
        self.ready: Encoded | None = None
        self._calls: list[Call] = []
        self._waiting: list[Encoded] = []
        self._seen: Encoded | None = None
        self._marks: Tensor | None = None
        self._depth = 0
        self._rows: list[Any] = []
        self._last: tuple[Tensor | None, Decisions] | None = None

    # ---------------------------------------------------------------------------------------- calls
    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A call of `generate`: the accounts of all its prompts belong together."""
        if not self._depth:
            self._fresh()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._waiting, self._last = [], None

    @contextmanager
    def reading(self, rows: Any) -> Iterator[None]:
        """A call of the whole model, which reads these rows (`logits_to_keep`)."""
        self._rows.append(rows)
        try:
            yield
        finally:
            self._rows.pop()

    @property
    def last_row_only(self) -> bool:
        """Whether nothing but the last row of the text model's output is read."""
        return bool(self._rows) and isinstance(self._rows[-1], int) and self._rows[-1] == 1

    @contextmanager
    def taking(self, call: Call) -> Iterator[None]:
        """A call of the base model; nothing of it outlives it but the finished prefill."""
        self._calls.append(call)
        self._seen = None if call.output is None else self._match(call.output)
        try:
            yield
        finally:
            self._calls.pop()
            self._seen = self.running_prefill = None

    @property
    def call(self) -> Call:
        """The call on its way."""
        return self._calls[-1]

    # --------------------------------------------------------------------------------------- images
    @contextmanager
    def given(self, encoded: Encoded | None) -> Iterator[None]:
        """Images encoded before, for the calls inside."""
        before, self.ready = self.ready, encoded
        if encoded is not None:
            self._waiting.append(encoded)
        try:
            yield
        finally:
            self.ready, self._waiting = before, []

    def see(self, encoded: Encoded) -> None:
        """Images were encoded, inside a call or (by `generate`) ahead of it."""
        if self._calls:
            self._seen = encoded
        else:
            self._waiting.append(encoded)

    @property
    def brings_images(self) -> bool:
        """Whether images were encoded for the call on its way, or marked."""
        return self._seen is not None or self.call.marked

    def claim(self) -> Encoded | None:
        """The images of the call on its way."""
        seen, self._seen = self._seen, None
        return seen

    def take_encoded(self) -> Encoded | None:
        """Images encoded ahead of any call."""
        return self._waiting.pop() if self._waiting else None

    def _match(self, output: Any) -> Encoded | None:
        first = _first(output)
        for encoded in reversed(self._waiting):
            mine = _first(encoded.output)
            if mine is first or (mine.shape == first.shape and torch.equal(mine, first)):
                return encoded
        return None

    # ---------------------------------------------------------------------------------------- marks
    def mark(self, visual: Tensor) -> None:
        """Visual positions of the next prompt."""
        self._marks = visual

    def marked(self) -> Tensor | None:
        """Marks not yet used."""
        marks, self._marks = self._marks, None
        return marks

    # -------------------------------------------------------------------------------------- prompts
    def decisions(self, ids: Tensor | None, cacheless: bool) -> Decisions:
        """New ones, or those of the last prompt if it comes again, without a cache, one token
        longer.
        """
        found, before = Decisions(), self._last
        if cacheless and ids is not None:
            if before is not None and _extends(ids, before[0]):
                found = Decisions(before[1])
            self._last = (ids, found)
        else:
            self._last = None
        return found

    def extends(self, ids: Tensor | None) -> bool:
        """Whether ids are the last prompt, fed without a cache, and one token more."""
        return ids is not None and self._last is not None and _extends(ids, self._last[0])

    def begin(self, prefill: Prefill) -> None:
        """A prompt enters the LLM."""
        self.prefill = self.running_prefill = prefill

    def finish(self, prefill: Prefill) -> None:
        """It has left the last layer."""
        if not self._depth:
            self._fresh()
        self.accounts = [*self.accounts, *prefill.accounts]
        self.running_prefill = None

    def end(self) -> None:
        """Tokens after a prompt: no prefill is running."""
        self.running_prefill = None

    @contextmanager
    def running(self, prefill: Prefill) -> Iterator[None]:
        """Layers called inside belong to ``prefill``."""
        before, self.running_prefill = self.running_prefill, prefill
        try:
            yield
        finally:
            self.running_prefill = before

    def close(self) -> None:
        """The session has closed: only the accounts stay."""
        self.prefill = self.running_prefill = self.ready = None
        self._waiting, self._last, self._seen, self._marks = [], None, None, None

    def _fresh(self) -> None:
        self.accounts = []


def _first(output: Any) -> Tensor:
    features = getattr(output, "pooler_output", output)
    return features[0]


def _extends(ids: Tensor, before: Tensor | None) -> bool:
    if before is None or ids.shape != (before.shape[0], before.shape[1] + 1):
        return False
    return torch.equal(ids[:, :-1], before)
