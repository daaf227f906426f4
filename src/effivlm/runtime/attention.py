"""The attention tap: sees post-RoPE queries and keys of chosen layers as they pass, under eager,
SDPA and flash alike.

It overrides entries of transformers' shared attention table under their own names while a session
is open, so config names, mask creation and flash dispatch stay untouched; modules that are not
watched pass straight through.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effivlm.ops.precision import working, working_dtype

Site = tuple[str, int]  # ("text" | "vision", layer)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. Queries and keys are post-RoPE; keys are not repeated for grouped
    queries.

    Attributes:
        query: [B, H, Lq, d]. key: [B, KV, Lk, d]. mask: what the layer was given.
        segments: cumulative lengths when several images are packed in one call, or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    segments: Tensor | None


class Peeked(Exception):
    """Raised by the tap to leave an attention module once its queries and keys are known."""


class Tap:
    """Keeps the calls of watched sites. ``bias``: site -> for each coming call, [B or 1, 1, 1, Lk]
    added to its logits.
    """

    def __init__(
        self, text_layers: nn.ModuleList, vision_blocks: nn.ModuleList, model: nn.Module
    ) -> None:
        self.sites = {
            id(m): ("text", i) for i, layer in enumerate(text_layers) for m in layer.modules()
        }
        self.sites |= {
            id(m): ("vision", i) for i, block in enumerate(vision_blocks) for m in block.modules()
        }
        names = {
            getattr(getattr(m, "config", None), "_attn_implementation", None)
            for m in model.modules()
        }
        self.names = sorted(name for name in names if name is not None)
        self.watched: set[Site] = set()
        self.calls: dict[Site, list[AttentionCall]] = {}
        self.bias: dict[Site, list[Tensor]] = {}
        self.peeking = False
        self.saved: dict[str, Any] = {}

    def open(self) -> None:
        """Install the overrides."""
        for name in self.names:
            self.saved[name] = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
            inner = ALL_ATTENTION_FUNCTIONS.get(
                name
            )  # None for "eager": every model file has its own
            ALL_ATTENTION_FUNCTIONS[name] = functools.partial(self._call, inner)

    def close(self) -> None:
        """Put back what was there."""
        for name, old in self.saved.items():
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)
            if old is not None:
                ALL_ATTENTION_FUNCTIONS[name] = old
        self.saved, self.calls, self.bias = {}, {}, {}

    def peek(self, attention: nn.Module, site: Site, **kwargs: Any) -> AttentionCall:
        """Queries and keys an attention module would use, without running its attention or touching
        a cache.
        """
        before, self.peeking = self.calls.pop(site, []), True
        watched = site in self.watched
        self.watched.add(site)
        try:
            attention(**kwargs)
        except Peeked:
            return self.calls.pop(site)[-1]
        finally:
            self.peeking = False
            if not watched:
                self.watched.discard(site)
            if before:
                self.calls[site] = before
        raise RuntimeError(
            f"{type(attention).__name__} did not look up its attention function: cannot read its"
            " queries"
        )

    def _call(
        self,
        inner: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        site = self.sites.get(id(module))
        if site is not None and site in self.watched:
            call = AttentionCall(
                query, key, attention_mask, _scaling(query, kwargs), kwargs.get("cu_seq_lens_q")
            )
            self.calls.setdefault(site, []).append(call)
            if self.peeking:
                raise Peeked
        if site is not None and self.bias.get(site):
            attention_mask = self._biased(attention_mask, self.bias[site].pop(0), query, module)
        attend = inner or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, key, value, attention_mask, **kwargs)

    @staticmethod
    def _biased(mask: Any, bias: Tensor, query: Tensor, module: nn.Module) -> Tensor:
        config: Any = module.config
        name = config._attn_implementation
        if "flash" in name:
            raise NotImplementedError(
                f"proportional attention adds a bias to the encoder's logits, which {name} cannot: "
                "load the model with attn='sdpa', or set prop_attn=false"
            )
        bias = bias.to(query.dtype)
        if mask is None:
            return bias.expand(-1, 1, query.shape[2], -1)
        floor = torch.finfo(query.dtype).min
        mask = (
            torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, floor)
            if mask.dtype == torch.bool
            else mask
        )
        return mask + bias


def _scaling(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(scaling) if scaling is not None else query.shape[-1] ** -0.5


# --------------------------------------------------------------- encoder statistics (bidirectional)
def segments_of(call: AttentionCall) -> list[tuple[Tensor, Tensor]]:
    """(query [B', H, P, d], key [B', KV, P, d]) of every independent image in a call."""
    if call.segments is None:
        return [(call.query, call.key)]
    ends = call.segments.tolist()
    return [(call.query[:, :, a:b], call.key[:, :, a:b]) for a, b in pairwise(ends)]


def received(query: Tensor, key: Tensor, scaling: float, block: int = 256) -> Tensor:
    """[B, P] attention every patch receives, mean over heads and queries, float32; one block of
    rows at a time.
    """
    batch, heads, patches, _ = query.shape
    key = working(key.repeat_interleave(heads // key.shape[1], 1)).transpose(-1, -2)
    out = torch.zeros(batch, patches, dtype=working_dtype(query), device=query.device)
    for rows in query.split(block, dim=2):
        out += (working(rows) @ key * scaling).softmax(-1).sum((1, 2))
    return out / (heads * patches)


def first_row(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[B, P] attention of row 0 ([CLS]), mean over heads, float32; [CLS] itself is in the
    denominator.
    """
    key = working(key.repeat_interleave(query.shape[1] // key.shape[1], 1))
    return (working(query[:, :, :1]) @ key.transpose(-1, -2) * scaling).softmax(-1)[:, :, 0].mean(1)
