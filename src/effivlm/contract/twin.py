"""The slow, obvious twin: an uncompressed transformers model in which what a setting drops is
masked instead.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from effivlm.errors import EffivlmError
from effivlm.runtime.cache import CACHE
from effivlm.runtime.prefill import Prefill
from effivlm.runtime.session import Session
from effivlm.runtime.tokens import Prompt

STEPS = 6


class ContractError(EffivlmError, AssertionError):
    """A method, or the runtime under it, that breaks the contract; the message says how."""


def require(kept: bool, message: str) -> None:
    """Raise ContractError with the message unless ``kept``."""
    if not kept:
        raise ContractError(message)


def close(a: Tensor, b: Tensor, tol: float = 1e-4, what: str = "") -> None:
    """Require logits [B, steps, V], or any tensors of one shape, to agree; says where they first
    do not.
    """
    apart = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
    error = float(apart.max())
    if error < tol:
        return
    where = [int(i) for i in (apart >= tol).nonzero()[0]]
    named = f"row {where[0]}, step {where[1]}" if len(where) == 3 else f"index {where}"
    raise ContractError(
        f"{what + ': ' if what else ''}logits differ by {error:.2g}, first at {named}"
    )


def same_tokens(one: Prompt, other: Prompt, rows: tuple[int, int] = (0, 0)) -> None:
    """Require two prefills to have kept the same tokens at every layer, counted from the prompt's
    first real token; names layer and first difference.
    """
    for layer in one.kept:
        a, b = (_kept(p, layer, row) for p, row in zip((one, other), rows, strict=True))
        if a == b:
            continue
        at = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        pair = [x[at] if at < len(x) else "nothing" for x in (a, b)]
        raise ContractError(
            f"layer {layer} keeps {len(a)} and {len(b)} tokens; number {at} is token {pair[0]} and"
            f" {pair[1]}"
        )


def _kept(prompt: Prompt, layer: int, row: int) -> list[int]:
    index, valid = prompt.kept[layer]
    counts = prompt.real[row, index[row]]
    counts = counts if valid is None else counts & valid[row]
    return (index[row][counts] - int(prompt.real[row].int().argmax())).tolist()


@contextlib.contextmanager
def whole_softmax() -> Iterator[None]:
    """Eager attention in transformers takes its softmax in float32; in float64 inside."""
    plain = torch.nn.functional.softmax

    def softmax(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return plain(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    with mock.patch.object(torch.nn.functional, "softmax", softmax):
        yield


def generate(
    model: Any, inputs: Mapping[str, Tensor], n: int = STEPS, **kw: Any
) -> tuple[Tensor, Tensor, Any]:
    """Greedy decoding by transformers: tokens [B, n], logits [B, n, V] and the cache."""
    with torch.no_grad(), whole_softmax():
        out = model.generate(
            **inputs,
            max_new_tokens=n,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **kw,
        )
    return (
        out.sequences[:, inputs["input_ids"].shape[1] :],
        torch.stack(out.logits, 1),
        getattr(out, CACHE),
    )


class Watched(Session):
    """A session that remembers its last prefill: the prompt, what the cache held when it was over
    (before a sliding window forgets), and rows that intra-LLM merges wrote.
    """

    def __exit__(self, *exc: object) -> None:
        """Remember, and close."""
        if not exc or exc[0] is None:
            self.kept = self.current
            self.entries: list[Any] = self.kept.held
            self.writes: dict[Any, Any] = {}
            for layer, _, index, rows in self.kept.prompt.written:
                at = self.writes.setdefault(layer, {})
                at.update(zip(index.tolist(), rows, strict=True))
        super().__exit__(*exc)

    @property
    def seen(self) -> Prefill:
        """The last prefill, also when the session has closed."""
        return self.kept if self.turn.prefill is None else self.current


def positions(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Positions of the uncompressed prompt, as `generate` derives them."""
    base = model.base_model
    if hasattr(base, "get_rope_index"):
        given = {
            k: inputs[k]
            for k in ("image_grid_thw", "attention_mask", "mm_token_type_ids")
            if k in inputs
        }
        return base.get_rope_index(inputs["input_ids"], **given)[0]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


class _Hiding:
    """The hooks of `masked`: count forward passes, and hide keys at every layer."""

    def __init__(
        self, prefill: Any, decode: Any, length: int, embeds: Tensor | None, writes: Any
    ) -> None:
        self.prefill, self.decode, self.length, self.embeds, self.writes = (
            prefill,
            decode,
            length,
            embeds,
            writes,
        )
        self.step = -1

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.step += 1
        if self.step == 0 and self.embeds is not None:
            kwargs["inputs_embeds"] = self.embeds
        if self.step == 0 and self.writes and "deepstack" in self.writes:
            kwargs |= self.writes["deepstack"]
        return args, kwargs

    def hide(self, i: int, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, first = kwargs["attention_mask"], self.step == 0
        keep = (self.prefill if first else self.decode)[i]
        keep = keep[:, None] if keep.ndim == 2 else keep
        total = self.length + self.step
        keep = torch.cat([keep, keep.new_ones(*keep.shape[:-1], total - keep.shape[-1])], -1)[
            ..., -mask.shape[-1] :
        ]
        drop = ~keep[:, :, None, :]
        if first:
            drop = drop & ~torch.eye(mask.shape[-1], dtype=torch.bool)
        # eager attention takes its softmax in float32, where the lowest float64 is -inf and a row
        # of nothing else NaN
        floor = torch.finfo(torch.float32).min
        kwargs["attention_mask"] = mask.clamp(min=floor).masked_fill(drop, floor)
        if first and self.writes and i in self.writes:
            hidden = args[0].clone()
            for at, row in self.writes[i].items():
                hidden[0, at] = row
            args = (hidden, *args[1:])
        return args, kwargs


@contextlib.contextmanager
def masked(
    model: Any,
    prefill: Any,
    decode: Any,
    length: int,
    embeds: Tensor | None = None,
    writes: Any = None,
) -> Iterator[None]:
    """Hide keys by 4-D masks: ``prefill`` layer -> [B, L] bool, ``decode`` layer -> [B, L] or [B,
    H, L] bool.
    """
    assert model.config._attn_implementation == "eager", "the twin needs masks that are never None"
    hiding, text = _Hiding(prefill, decode, length, embeds, writes), model.get_decoder()
    handles = [text.register_forward_pre_hook(hiding.count, with_kwargs=True)]
    for i, layer in enumerate(text.layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, a, k, i=i: hiding.hide(i, a, k), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def run(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokens: Tensor,
    prefill: Any,
    decode: Any,
    embeds: Tensor | None = None,
    writes: Any = None,
    position: Tensor | None = None,
) -> Tensor:
    """[B, STEPS, V] logits of a teacher-forced uncompressed run under the masks."""
    position = positions(model, inputs) if position is None else position
    length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]
    steps = tokens.shape[1]
    hidden = masked(model, prefill, decode, length, embeds, writes)
    with torch.no_grad(), whole_softmax(), hidden:
        out = model(**inputs, position_ids=position, use_cache=True)
        logits = [out.logits[:, -1]]
        for t in range(steps - 1):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(
                input_ids=tokens[:, t : t + 1],
                attention_mask=mask,
                **{CACHE: getattr(out, CACHE)},
                position_ids=position[..., -1:] + 1 + t,
                use_cache=True,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def kept_masks(session: Watched, heads: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What a watched session kept: prefill masks per layer, decode masks per layer (with a head
    axis where heads differ).
    """
    prompt = session.seen.prompt
    prefill, decode = {}, {}
    for i in range(session.layers):
        index, valid = prompt.kept[i]
        prefill[i] = _mask(prompt.visual.shape, index, valid)
        index, valid = session.entries[i]
        if index.ndim == 2:
            decode[i] = _mask(prompt.visual.shape, index, valid)
        else:
            kv = index.shape[1]
            rows = [
                _mask(prompt.visual.shape, index[:, h], None if valid is None else valid[:, h])
                for h in range(kv)
            ]
            decode[i] = torch.stack(rows, 1).repeat_interleave(heads // kv, 1)
    return prefill, decode


def _mask(shape: Any, index: Tensor, valid: Tensor | None) -> Tensor:
    out = torch.zeros(shape, dtype=torch.bool)
    for b in range(shape[0]):
        out[b, index[b] if valid is None else index[b][valid[b]]] = True
    return out
