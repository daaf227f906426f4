"""What was asked against what is in the tensors; a mismatch is an error, never a table row."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from effivlm.methods.base import Entries, Merge, Method
from effivlm.runtime.cache import SlotLayer
from effivlm.runtime.tokens import Prompt


class AuditError(RuntimeError):
    """The tensors do not hold what the setting promises, or a method broke its contract."""


@dataclass(frozen=True)
class Account:
    """What one prompt cost under a setting, counted in the tensors.

    Attributes:
        prompt_tokens: logical prompt length. visual_tokens: visual tokens of the uncompressed
            prompt.
        visual_per_layer: visual tokens entering each decoder layer.
        tokens_per_layer: all tokens entering each decoder layer.
        kv_per_layer: prompt entries held per layer after prefill, mean over KV heads.
        kv_bytes_per_layer: bytes of those entries. kv_held_per_layer: bytes of the tensors they are
            stored in, which pad KV heads that keep unequal counts to the longest; neither has the
            padding that other rows of a batch force.
    """

    prompt_tokens: int
    visual_tokens: int
    visual_per_layer: tuple[int, ...]
    tokens_per_layer: tuple[int, ...]
    kv_per_layer: tuple[float, ...]
    kv_bytes_per_layer: tuple[int, ...]
    kv_held_per_layer: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all prompt entries held."""
        return sum(self.kv_bytes_per_layer)

    @property
    def kv_bytes_held(self) -> int:
        """Bytes of the tensors that store them."""
        return sum(self.kv_held_per_layer)

    @property
    def realised(self) -> dict[str, float]:
        """Retained shares in every unit: ``visual`` (at the last layer), ``visual_mean``,
        ``prompt_kv``.
        """
        layers, n = len(self.visual_per_layer), max(self.visual_tokens, 1)
        return {
            "visual": self.visual_per_layer[-1] / n if self.visual_tokens else 1.0,
            "visual_mean": sum(self.visual_per_layer) / (layers * n) if self.visual_tokens else 1.0,
            "prompt_kv": (
                sum(self.kv_per_layer) / (len(self.kv_per_layer) * self.prompt_tokens)
                if self.kv_per_layer
                else 1.0
            ),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with total bytes and the realised shares."""
        return asdict(self) | {
            "kv_bytes": self.kv_bytes,
            "kv_bytes_held": self.kv_bytes_held,
            "realised": self.realised,
        }

    def lines(self) -> list[str]:
        """A table: equal neighbouring layers share a line, and a last line has the totals; bytes
        held where heads are padded.
        """
        rows: list[tuple[list[int], tuple[str, ...]]] = []
        columns = 3 if self.kv_bytes_held != self.kv_bytes else 2
        held = list(
            zip(self.kv_per_layer, self.kv_bytes_per_layer, self.kv_held_per_layer, strict=True)
        )
        for i, (tokens, visual) in enumerate(
            zip(self.tokens_per_layer, self.visual_per_layer, strict=True)
        ):
            kv = (f"{held[i][0]:g}", *(f"{n:,}" for n in held[i][1:])) if held else ("-",) * 3
            cells = (str(tokens), str(visual), *kv[:columns])
            if rows and rows[-1][1] == cells:
                rows[-1][0].append(i)
            else:
                rows.append(([i], cells))
        total = (
            "",
            "",
            f"{sum(self.kv_per_layer):g}",
            f"{self.kv_bytes:,}",
            f"{self.kv_bytes_held:,}",
        )
        named = [(f"{at[0]}-{at[-1]}" if len(at) > 1 else str(at[0]), *cells) for at, cells in rows]
        titles = ("layers", "tokens", "visual", "KV entries", "KV bytes", "held")
        table = [titles[: 3 + columns], *named, ("all", *total[: 2 + columns])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in table
        ]


class Audit(tuple[Account, ...]):
    """The accounts of the last prefill, one per prompt of the batch; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Tokens entering each layer, KV entries and bytes per layer (of every one of the layers on
        a line).
        """
        if not self:
            return "nothing has been generated under this session yet"
        out: list[str] = []
        for number, account in enumerate(self, start=1):
            which = f"prompt {number} of {len(self)}" if len(self) > 1 else "prompt"
            out += [
                f"{which}: {account.prompt_tokens} tokens, {account.visual_tokens} of them visual",
                *account.lines(),
            ]
        return "\n".join(out)


@dataclass(frozen=True)
class PlannedCut:
    """One image's cut at a decoder layer: which method cuts which image (index into
    ``Prompt.images``) to how many.
    """

    method: Method
    image: int
    keep: int


@dataclass
class Promise:
    """What a prefill will hold, known from budgets before any layer has run.

    Attributes:
        before: per image, tokens entering the LLM. cuts: layer -> planned cuts.
    """

    before: list[int]
    cuts: dict[int, list[PlannedCut]] = field(default_factory=dict)

    def visual(self, prompt: Prompt, row: int, layer: int) -> int:
        """Visual tokens of a row entering a layer."""
        total = 0
        for number, image in enumerate(prompt.images):
            if image.row == row:
                counts = [self.before[number]]
                counts += [
                    c.keep
                    for at in sorted(self.cuts)
                    if at <= layer
                    for c in self.cuts[at]
                    if c.image == number
                ]
                total += min(counts)
        return total

    def tokens(self, prompt: Prompt, row: int, layer: int) -> int:
        """All tokens of a row entering a layer, padding apart."""
        return int((prompt.real[row] & ~prompt.visual[row]).sum()) + self.visual(prompt, row, layer)


def audit_prompt(prompt: Prompt, promise: Promise, layers: int, cache: Any) -> list[Account]:
    """Compare what the tensors hold with the promise, and count the cost of every row.

    Raises:
        AuditError: on any mismatch.
    """
    rows = range(len(prompt.keys))
    padding = [int((~prompt.real[row]).sum()) for row in rows]
    widths = [
        max(promise.tokens(prompt, row, i) + padding[row] for row in rows) for i in range(layers)
    ]
    check_layers("tokens", widths, [prompt.lengths[i] for i in range(layers)])
    return [_account(prompt, promise, layers, row, cache) for row in rows]


def _account(prompt: Prompt, promise: Promise, layers: int, row: int, cache: Any) -> Account:
    visual, tokens = [], []
    for i in range(layers):
        index, valid = prompt.kept[i]
        ok = (
            prompt.real[row, index[row]]
            if valid is None
            else prompt.real[row, index[row]] & valid[row]
        )
        visual.append(int((prompt.visual[row, index[row]] & ok).sum()))
        tokens.append(int(ok.sum()))
    check_layers("visual tokens", [promise.visual(prompt, row, i) for i in range(layers)], visual)
    held, size, stored = [], [], []
    for layer in cache.layers if cache is not None else ():
        counts = _held(prompt, layer, row)
        one = layer.keys.shape[1] * 2 * layer.keys.shape[-1] * layer.keys.element_size()
        held.append(float(counts.float().mean()))
        size.append(round(held[-1] * one))
        stored.append(int(counts.max()) * one)
    real, seen = int(prompt.real[row].sum()), int(prompt.visual[row].sum())
    return Account(
        real, seen, tuple(visual), tuple(tokens), tuple(held), tuple(size), tuple(stored)
    )


def _held(prompt: Prompt, layer: SlotLayer, row: int) -> Tensor:
    """[KV], or [] if all heads hold the same: prompt entries a layer holds for a row, counted in
    its tensors.
    """
    assert layer.index is not None
    stored = layer.stored()[0].shape[-2] - (layer.seen - layer.prompt)
    if layer.index.shape[-1] != stored:
        raise AuditError(
            f"a cache layer holds {stored} prompt entries and indexes {layer.index.shape[-1]}"
        )
    ok = prompt.real[row][layer.index[row]]
    if layer.valid is not None:
        ok = ok & layer.valid[row]
    return ok.sum(-1)


def check_selection(method: Method, keep: Tensor, merged: Merge | None, k: int, n: int) -> None:
    """A selection is ascending, unique, in range, of the promised size; merges stand on kept tokens
    and are finite.

    Raises:
        AuditError: naming the method and what is wrong.
    """
    name, count = method.name, len(keep)
    if keep.dtype != torch.long or keep.ndim != 1:
        raise AuditError(
            f"{name} returned keep of {keep.dtype} {tuple(keep.shape)}: expected 1-D long indices"
        )
    if count and (int(keep.min()) < 0 or int(keep.max()) >= n):
        raise AuditError(
            f"{name} kept indices in [{int(keep.min())}, {int(keep.max())}], but was given {n}"
            " tokens"
        )
    if bool((keep.diff() <= 0).any()):
        raise AuditError(
            f"{name} returned indices that are not strictly ascending: sort them and drop repeats"
        )
    if count > k or (method.exact and count != k):
        raise AuditError(f"{name} was asked to keep {k} of {n} tokens and kept {count}")
    if merged is not None:
        _check_merge(name, merged, keep, n)


def _check_merge(name: str, merged: Merge, keep: Tensor, n: int) -> None:
    if not len(merged.target) == len(merged.source) == len(merged.weight):
        raise AuditError(f"{name} returned a merge of unequal lengths")
    if len(merged.target) and not bool(torch.isin(merged.target, keep).all()):
        raise AuditError(f"{name} merges into tokens it does not keep")
    if len(merged.source) and (int(merged.source.min()) < 0 or int(merged.source.max()) >= n):
        raise AuditError(f"{name} merges tokens outside the {n} it was given")
    if not bool(merged.weight.isfinite().all()):
        raise AuditError(f"{name} returned merge weights that are not finite")


def check_entries(method: Method, entries: Entries, k: int, length: int, heads: int) -> None:
    """Cache entries have the right shape and, summed over heads, the promised count.

    Raises:
        AuditError: naming the method and what is wrong.
    """
    keep = entries.keep
    if keep.shape != (heads, length) or keep.dtype != torch.bool:
        raise AuditError(
            f"{method.name} returned entries {keep.dtype} {tuple(keep.shape)}: expected bool"
            f" {(heads, length)}"
        )
    total, promised = int(keep.sum()), k * heads
    if total > promised or (method.exact and total != promised):
        raise AuditError(
            f"{method.name} was asked to keep {promised} entries over {heads} heads and kept"
            f" {total}"
        )
    if entries.merged is not None:
        m = entries.merged
        if not bool(keep[m.head, m.target].all()):
            raise AuditError(f"{method.name} merges into cache entries it does not keep")


def check_layers(what: str, promised: Sequence[int], found: Sequence[int]) -> None:
    """Per-layer counts in the tensors are those promised.

    Raises:
        AuditError: naming the first layer that differs.
    """
    for layer, (a, b) in enumerate(zip(promised, found, strict=True)):
        if a != b:
            raise AuditError(
                f"layer {layer} holds {b} {what}, the setting promises {a} "
                f"(all layers: promised {list(promised)}, found {list(found)})"
            )
