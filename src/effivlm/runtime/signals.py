"""Decoder-side signals: what a context reads is computed here, from one layer's queries and keys,
once per layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm as norm

from effivlm.methods.signals import (
    ColumnSums,
    FreedTextSums,
    FutureQueries,
    HeadMaxSums,
    InputEmbeds,
    Keys,
    LastRow,
    MutualTextSums,
    NormedHidden,
    PostVisionRows,
    Signal,
    TextPeaks,
    TextRank,
    TextSums,
    ThresholdCounts,
    ValueOutputNorms,
    WindowRows,
)
from effivlm.ops import statistics
from effivlm.ops.precision import working_dtype
from effivlm.ops.tails import Tail, tail_statistics
from effivlm.runtime.attention import AttentionCall
from effivlm.runtime.geometry import take, visible
from effivlm.runtime.rows import Row

ATTENTION = (
    LastRow,
    TextSums,
    FreedTextSums,
    MutualTextSums,
    TextPeaks,
    TextRank,
    ColumnSums,
    HeadMaxSums,
    WindowRows,
    PostVisionRows,
    ThresholdCounts,
    Keys,
    FutureQueries,
)


class LayerSource:
    """Computes signals for one row of the batch at one place.

    Args:
        prefill: the prompt's prefill. layer: the layer about to run (the layer that just ran, plus
            one, for caches).
        row: batch row. held: its tokens among the M in play.
        place: ``number`` of the image, ``hidden``, ``visual``, ``text`` (IntraLLM) or ``cached``,
            the cache layer (KVCache); the decoder layer as ``module`` and its ``kwargs``.
    """

    def __init__(self, prefill: Any, layer: int, row: int, held: Row, **place: Any) -> None:
        self.prefill, self.layer, self.row, self.held = prefill, layer, row, held
        self.place = place

    def __call__(self, signal: Signal) -> Tensor:
        """The tensor of a signal; one prompt's values are shared by every method that asks at the
        same place.
        """
        return self.remembered(signal, lambda: _COMPUTE[type(signal)](self, signal))

    def remembered(self, what: Any, compute: Callable[[], Any]) -> Any:
        """A value that is computed once at this place."""
        place = (self.layer, self.row, self.place.get("number"))
        memo = self.prefill.memo.setdefault(place, {})
        if what not in memo:
            memo[what] = compute()
        return memo[what]

    def thresholds(self, start: int) -> tuple[float, ...]:
        """The thresholds that cache methods in play have on the rows from ``start`` on."""
        thresholds = self.prefill.recipe.thresholds if "cached" in self.place else ()
        return thresholds if thresholds and start == self.held.after_vision else ()

    # ----------------------------------------------------------------------------- queries and keys
    @property
    def call(self) -> AttentionCall:
        """The attention call of the layer before."""
        call = self.prefill.tap.last(self.layer - 1)
        if call is None:
            raise RuntimeError(f"the attention of decoder layer {self.layer - 1} was not seen")
        return call

    def query(self, call: AttentionCall | None = None) -> Tensor:
        """[H, m, d] post-RoPE queries of this row's tokens."""
        return self.held.pick((call or self.call).query[self.row])

    def key(self, call: AttentionCall | None = None) -> Tensor:
        """[KV, m, d] post-RoPE keys of this row's tokens."""
        return self.held.pick((call or self.call).key[self.row])

    def mask(self) -> Callable[[Tensor], Tensor] | None:
        """Rows -> [R, m] bool, where the model's attention is not plainly causal (bidirectional
        images, windows).
        """
        if not self.prefill.special:
            return self.window(self.layer - 1)
        mask = self.call.mask
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            return None
        table, alive = mask[self.row, 0], self.held.slots

        def shown(rows: Tensor) -> Tensor:
            part = table[alive[rows]][:, alive]
            return part if part.dtype == torch.bool else part == 0

        return shown

    def window(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """Rows -> [R, m] bool, where the prompt is longer than the layer's sliding window."""
        window, prompt = self.prefill.host.windows[layer], self.prefill.prompt
        if window is None or prompt.length <= window:
            return None
        place = self.held.index
        return lambda rows: visible(place[rows], place, window)

    def rows(self, index: Tensor) -> Tensor:
        """[H, R, m] attention probabilities of chosen rows."""
        q = self.query()[:, index]
        return statistics.row_probabilities(q, self.key(), index, self.call.scaling, self.mask())


def _last_row(s: LayerSource, signal: Any) -> Tensor:
    last = torch.tensor([s.held.count - 1], device=s.held.slots.device)
    if signal.of == "previous":
        return s.rows(last)[:, 0]
    module, kwargs = s.place["module"], s.place["kwargs"]
    hidden, rel = s.place["hidden"], s.prefill.prompt.rel
    tables = kwargs["position_embeddings"]
    tables = tables if rel is None else tuple(take(x, rel, -2, -3) for x in tables)
    call = s.prefill.tap.peek(
        module.self_attn,
        ("text", s.layer),
        hidden_states=module.input_layernorm(hidden),
        position_embeddings=tables,
        attention_mask=None,
    )
    q, k = s.query(call), s.key(call)
    return statistics.row_probabilities(q[:, last], k, last, call.scaling, s.window(s.layer))[:, 0]


def _text(s: LayerSource, rows: tuple[int, ...] | None = None) -> Tensor:
    text: Tensor = s.place["text"]
    return text if rows is None else text[torch.tensor(rows, device=text.device)]


def _text_sums(s: LayerSource, signal: Any) -> Tensor:
    return _summed(s, _text(s, signal.rows))


def _freed_text_sums(s: LayerSource, signal: Any) -> Tensor:
    index, place = _text(s, signal.rows), s.held.index
    return statistics.freed_sums(
        s.query()[:, index], s.key(), index, place, s.call.scaling, signal.theta, s.mask()
    )


def _mutual_text_sums(s: LayerSource, signal: Any) -> Tensor:
    index = _text(s)
    return statistics.mutual_sums(s.query()[:, index], s.key(), index, s.call.scaling, s.mask())


def _text_peaks(s: LayerSource, signal: Any) -> Tensor:
    index = _text(s)
    return statistics.peaks(s.query()[:, index], s.key(), index, s.call.scaling, s.mask())


def _text_rank(s: LayerSource, signal: Any) -> Tensor:
    index, columns = _text(s, signal.rows), s.place["visual"]
    return statistics.row_rank(
        s.query()[:, index], s.key(), index, columns, s.call.scaling, s.mask()
    )


def _column_sums(s: LayerSource, signal: Any) -> Tensor:
    if s.call.query.is_cuda:
        return statistics.column_sums(s.query(), s.key(), s.call.scaling, mask=s.mask())
    return _tail(s, 0).sums


def _tail(s: LayerSource, start: int) -> Tail:
    """One pass over the rows from ``start`` on for all that is read of them."""

    def passed() -> Tail:
        q = s.query() if start == 0 else s.query()[:, start:]
        return tail_statistics(q, s.key(), s.call.scaling, s.thresholds(start), s.mask())

    return s.remembered(("tail", start), passed)


def _head_max_sums(s: LayerSource, signal: Any) -> Tensor:
    if "cached" in s.place:  # a cache: all images, and the text after the last
        behind = torch.arange(s.held.after_vision, s.held.count, device=s.held.slots.device)
        index = behind if signal.rows == "text" else s.held.visual
    else:
        index = s.place[signal.rows]
    return statistics.head_max_sums(
        s.query()[:, index], s.key(), index, s.call.scaling, mask=s.mask()
    )


def _summed(s: LayerSource, index: Tensor) -> Tensor:
    return statistics.row_sums(s.query()[:, index], s.key(), index, s.call.scaling, mask=s.mask())


def _window_rows(s: LayerSource, signal: Any) -> Tensor:
    return _tail(s, max(0, s.held.count - signal.size)).sums


def _post_vision(s: LayerSource, signal: Any) -> Tensor:
    return _tail(s, s.held.after_vision).sums


def _threshold(s: LayerSource, signal: Any) -> Tensor:
    place = s.thresholds(s.held.after_vision).index(signal.p)
    return _tail(s, s.held.after_vision).small[place]


def _input_embeds(s: LayerSource, signal: Any) -> Tensor:
    return s.prefill.prompt.embeds[s.row, s.held.index]


def _normed(s: LayerSource, signal: Any) -> Tensor:
    return s.prefill.host.text.norm(s.held.pick(s.place["hidden"][s.row]))


def _keys(s: LayerSource, signal: Any) -> Tensor:
    return s.key()


def _value_output(s: LayerSource, signal: Any) -> Tensor:
    """[KV, m]: L1 norm of each value through the output projection of its query heads, mean over
    the group.
    """
    layer = s.place["cached"]
    values = s.held.pick(layer.values[s.row])  # [KV, m, d]
    weight = s.place["module"].self_attn.o_proj.weight  # [D, H * d]
    heads, length, width = values.shape
    per_head = weight.view(weight.shape[0], heads, -1, width)  # [D, KV, G, d]
    out = torch.zeros(heads, length, dtype=working_dtype(values), device=values.device)
    for h in range(heads):
        for g in range(per_head.shape[2]):
            out[h] += norm(values[h] @ per_head[:, h, g].T, 1, -1, dtype=out.dtype)
    return out / per_head.shape[2]


def _future_queries(s: LayerSource, signal: Any) -> Tensor:
    cos, sin = (s.held.pick(x[s.row % len(x)]) for x in s.place["kwargs"]["position_embeddings"])
    rotary: nn.Module = s.prefill.host.text.rotary_emb
    kinds = s.prefill.host.kinds  # Gemma 3 has one rotary table per kind of layer
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None and kinds:
        frequencies = getattr(rotary, f"{kinds[s.layer - 1]}_inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise NotImplementedError(
            f"{type(rotary).__name__} shows no frequencies: queries cannot be moved to coming"
            " positions"
        )
    coming = s.prefill.position[..., s.row, 0]
    start = (
        coming[-3:].max() if coming.ndim else coming
    )  # a fourth, first axis counts text: nothing rotates by it
    return statistics.future_queries(
        s.query(), cos, sin, frequencies, start, signal.sinks, signal.future
    )


_COMPUTE: dict[type[Signal], Callable[[LayerSource, Any], Tensor]] = {
    LastRow: _last_row,
    TextSums: _text_sums,
    FreedTextSums: _freed_text_sums,
    MutualTextSums: _mutual_text_sums,
    TextPeaks: _text_peaks,
    TextRank: _text_rank,
    ColumnSums: _column_sums,
    HeadMaxSums: _head_max_sums,
    WindowRows: _window_rows,
    PostVisionRows: _post_vision,
    ThresholdCounts: _threshold,
    InputEmbeds: _input_embeds,
    NormedHidden: _normed,
    Keys: _keys,
    ValueOutputNorms: _value_output,
    FutureQueries: _future_queries,
}
