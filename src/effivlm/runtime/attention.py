"""The attention tap: sees post-RoPE queries and keys of chosen layers as they pass, under eager,
SDPA and flash alike.

It overrides entries of transformers' shared attention table under their own names while a session
is open, so config names, mask creation and flash dispatch stay untouched; modules that are not
watched pass straight through.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effivlm.ops.precision import working, working_dtype
from effivlm.runtime.host import Host, UnsupportedCall

Site = tuple[str, int]  # ("text" | "vision", layer)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. Queries and keys are post-RoPE; keys are not repeated for grouped
    queries.

    Attributes:
        mask: what the layer was given.
        segments: cumulative lengths when several images are packed in one call, or None.
    """

    query: Float[Tensor, "B H Lq d"]
    key: Float[Tensor, "B KV Lk d"]
    mask: Shaped[Tensor, "..."] | None
    scaling: float
    segments: Int[Tensor, "n"] | None


class Peeked(Exception):
    """Raised by the tap to leave an attention module once its queries and keys are known."""


class Taps:
    """What stands in the attention table under a name while sessions are open: every call is shown
    to the tap whose module makes it. Sessions may open and close in any order.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
        # None for "eager": every model file has its own
        self.inner: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name)
        self.open: list[Tap] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The attention, seen."""
        for tap in self.open:
            site = tap.sites.get(id(module))
            if site is not None:
                attention_mask = tap.see(site, module, query, key, attention_mask, kwargs)
                break
        attend = self.inner or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, key, value, attention_mask, **kwargs)

    @staticmethod
    def join(name: str, tap: "Tap") -> "Taps":
        """Show the calls under a name to a tap."""
        taps = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
        if not isinstance(taps, Taps):
            taps = ALL_ATTENTION_FUNCTIONS[name] = Taps(name)
        taps.open.append(tap)
        return taps

    def leave(self, tap: "Tap") -> None:
        """Stop, and put back what was there once nobody is left."""
        self.open.remove(tap)
        local = ALL_ATTENTION_FUNCTIONS._local_mapping
        if not self.open and local.get(self.name) is self:
            local.pop(self.name)
            if self.before is not None:
                ALL_ATTENTION_FUNCTIONS[self.name] = self.before


class Tap:
    """Keeps the calls of watched sites of one model.

    Attributes:
        sites: module -> site. watched: sites whose calls are kept. calls: what was seen.
        bias: site -> for each coming call, [B or 1, 1, 1, Lk] added to its logits.
    """

    def __init__(self, host: Host) -> None:
        self.sites: dict[int, Site] = {
            id(m): ("text", i) for i, layer in enumerate(host.layers) for m in layer.modules()
        }
        self.sites |= {
            id(m): ("vision", i) for i, block in enumerate(host.blocks) for m in block.modules()
        }
        self.names = host.attentions
        self.watched: set[Site] = set()
        self.calls: dict[Site, list[AttentionCall]] = {}
        self.bias: dict[Site, list[Tensor]] = {}
        self.peeking = False
        self.joined: list[Taps] = []

    def open(self) -> None:
        """Join the attention table."""
        self.joined = [Taps.join(name, self) for name in self.names]

    def close(self) -> None:
        """Leave it."""
        for taps in self.joined:
            taps.leave(self)
        self.joined, self.calls, self.bias = [], {}, {}

    def watch(self, kind: str, layers: Iterable[int]) -> None:
        """Keep the calls of these sites of a kind, and of no others of it."""
        self.watched = {s for s in self.watched if s[0] != kind} | {(kind, i) for i in layers}

    def weigh(self, site: Site, bias: list[Tensor]) -> None:
        """Add ``bias`` to the logits of a site's coming calls."""
        self.bias[site] = bias

    def weigh_nothing(self) -> None:
        """Drop every bias."""
        self.bias.clear()

    def last(self, layer: int) -> AttentionCall | None:
        """The last call seen at a decoder layer."""
        calls = self.calls.get(("text", layer))
        return calls[-1] if calls else None

    def put(self, layer: int, call: AttentionCall) -> None:
        """Let a decoder layer's call of an earlier run count as seen."""
        self.calls[("text", layer)] = [call]

    def drop(self, kind: str, layer: int | None = None) -> None:
        """Forget the calls of a site, or of all of a kind."""
        for site in [s for s in self.calls if s[0] == kind and layer in (None, s[1])]:
            del self.calls[site]

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

    def see(
        self,
        site: Site,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """Keep a call if its site is watched; the mask it goes on with."""
        if site in self.watched:
            scaling, segments = _scaling(query, kwargs), kwargs.get("cu_seq_lens_q")
            call = AttentionCall(query, key, mask, scaling, segments)
            self.calls.setdefault(site, []).append(call)
            if self.peeking:
                raise Peeked
        if self.bias.get(site):
            return _biased(mask, self.bias[site].pop(0), query, module)
        return mask


def _biased(mask: Any, bias: Tensor, query: Tensor, module: nn.Module) -> Tensor:
    config: Any = module.config
    name = config._attn_implementation
    if "flash" in name:
        raise UnsupportedCall(
            f"proportional attention adds a bias to the encoder's logits, which {name} cannot: "
            "load the model with attn='sdpa', or set prop_attn=false"
        )
    bias = bias.to(query.dtype)
    if mask is None:
        return bias.expand(-1, 1, query.shape[2], -1)
    floor = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, floor)
    return mask + bias


def _scaling(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(scaling) if scaling is not None else query.shape[-1] ** -0.5


# --------------------------------------------------------------- encoder statistics (bidirectional)
def segments_of(
    call: AttentionCall,
) -> list[tuple[Float[Tensor, "B H P d"], Float[Tensor, "B KV P d"]]]:
    """(query, key) of every independent image in a call."""
    if call.segments is None:
        return [(call.query, call.key)]
    ends = call.segments.tolist()
    return [(call.query[:, :, a:b], call.key[:, :, a:b]) for a, b in pairwise(ends)]


def received(
    query: Float[Tensor, "B H P d"],
    key: Float[Tensor, "B KV P d"],
    scaling: float,
    block: int = 256,
) -> Float[Tensor, "B P"]:
    """Attention every patch receives, mean over heads and queries, float32; one block of
    rows at a time.
    """
    batch, heads, patches, _ = query.shape
    key = working(key.repeat_interleave(heads // key.shape[1], 1)).transpose(-1, -2)
    out = torch.zeros(batch, patches, dtype=working_dtype(query), device=query.device)
    for rows in query.split(block, dim=2):
        out += (working(rows) @ key * scaling).softmax(-1).sum((1, 2))
    return out / (heads * patches)


def first_row(
    query: Float[Tensor, "B H P d"], key: Float[Tensor, "B KV P d"], scaling: float
) -> Float[Tensor, "B P"]:
    """Attention of row 0 ([CLS]), mean over heads, float32; [CLS] itself is in the
    denominator.
    """
    key = working(key.repeat_interleave(query.shape[1] // key.shape[1], 1))
    return (working(query[:, :, :1]) @ key.transpose(-1, -2) * scaling).softmax(-1)[:, :, 0].mean(1)
