"""Decoding with fixed slots per layer, so that one step can be captured as a CUDA graph and
launched again and again.

After compression every layer's entries move into a buffer with room for the answer: slots 0 to n -
1 take the n generated tokens, the prompt's entries follow (attention does not care about the order
of its keys). All that changes from step to step is in tensors: the token, its position, the slot it
is written to, and which slots count. A query's heads of one group attend as rows of one product, so
keys and values are read once and never repeated.

Without a GPU the same steps run one by one; that is how the tests compare them with plain decoding.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effivlm.runtime.cache import CACHE, stack
from effivlm.runtime.generate import Generated, Prefilled, finished
from effivlm.runtime.packed import PackedLayer
from effivlm.runtime.slots import SlotLayer

WARM = 3  # steps before the capture, on a side stream, as CUDA graphs ask


class FixedLayer(SlotLayer):
    """A layer's buffer. ``step`` [1] long: slot of the coming token, shared by all layers."""

    step: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, layer: SlotLayer, step: Tensor, limit: int) -> None:
        super().__init__()
        if isinstance(layer, PackedLayer):
            raise NotImplementedError(
                "fixed slots hold numbers as they are, and this cache is stored in"
                f" {layer.format.bits} bits: decode with runtime.generate.decode"
            )
        self.seen, self.prompt, self.step, self.is_initialized = (
            layer.seen,
            layer.prompt,
            step,
            True,
        )
        pad = (0, 0, limit, 0)
        self.keys, self.values = (nn.functional.pad(x, pad) for x in layer.stored())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token in place."""
        self.keys.index_copy_(2, self.step, key_states)
        self.values.index_copy_(2, self.step, value_states)
        return self.keys, self.values


class FixedDecoder:
    """Greedy decoding of several prefills of one prompt length side by side, in fixed slots.

    Args:
        model: a transformers vision-language model, outside any session.
        done: its prefills, compressed; they stay as they are.
        limit: new tokens.

    Raises:
        NotImplementedError: for models with sliding windows. ValueError: for a cache that holds
            generated tokens.
    """

    def __init__(self, model: nn.Module, done: Sequence[Prefilled], limit: int) -> None:
        self.model: Any = model
        self.text: Any = self.model.get_decoder()
        if "sliding_attention" in (getattr(self.text.config, "layer_types", None) or ()):
            raise NotImplementedError(
                "fixed slots cannot follow sliding windows: decode with runtime.generate.decode"
            )
        first = torch.cat([d.logits for d in done]).argmax(-1, keepdim=True)
        self.start = first, torch.cat([d.position for d in done], -2)
        self.token, self.position = (x.clone() for x in self.start)
        self.step = torch.zeros(1, dtype=torch.long, device=first.device)
        self.limit, self.out = limit, first.repeat(1, limit)
        real = torch.cat([d.real for d in done])
        held: Any = stack([d.cache for d in done])
        self.masks: dict[Any, Tensor] = {}
        pairs = [self._fixed(layer, real) for layer in held.layers]
        self.cache = copy.copy(held)
        self.cache.layers = [layer for layer, _ in pairs]
        self.sites = {
            id(m): mask
            for part, (_, mask) in zip(self.text.layers, pairs, strict=True)
            for m in part.modules()
        }

    def _fixed(self, layer: SlotLayer, real: Tensor) -> tuple[FixedLayer, Tensor]:
        """The layer in a buffer, and which of its slots count: [B, 1 or KV, 1, S], shared between
        layers that agree.
        """
        if layer.index is None or layer.seen != layer.prompt:
            raise ValueError(
                "a cache that was decoded from before cannot move to fixed slots: give a fork of"
                " the prefill"
            )
        new = FixedLayer(layer, self.step, self.limit)
        index = layer.index if layer.index.ndim == 3 else layer.index[:, None]
        counts = real[:, None].expand(-1, index.shape[1], -1).gather(-1, index)
        if layer.valid is not None:
            counts = counts & layer.valid.view(index.shape)
        key = (counts.shape, counts.cpu().numpy().tobytes())
        if key not in self.masks:
            self.masks[key] = nn.functional.pad(counts, (self.limit, 0))[:, :, None]
        return new, self.masks[key]

    @torch.inference_mode()
    def run(self, stop: Sequence[int], graph: bool) -> list[Generated]:
        """One answer per row, in order; all ``limit`` tokens are made, and answers end at a stop
        token afterwards.

        Args:
            stop: ids that end an answer.
            graph: capture one step and replay it (CUDA only).
        """
        with self.attending():
            again = self.captured() if graph else self.once
            self.reset()
            for _ in range(self.limit - 1):
                again()
        return [finished(row, set(stop)) for row in self.out.tolist()]

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Let the decoder's attention mask and group queries as fixed slots need it."""
        name = self.text.config._attn_implementation
        saved = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
        ALL_ATTENTION_FUNCTIONS[name] = self._attend
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)
            if saved is not None:
                ALL_ATTENTION_FUNCTIONS[name] = saved

    def reset(self) -> None:
        """Back to the first token; what later slots hold no longer counts."""
        self.token.copy_(self.start[0])
        self.position.copy_(self.start[1])
        self.step.zero_()
        for mask in self.masks.values():
            mask[..., : self.limit] = False

    @torch.inference_mode()
    def once(self) -> None:
        """One step: everything it reads and writes stays where it is."""
        for mask in self.masks.values():
            mask.index_fill_(-1, self.step, True)
        embeds = self.model.get_input_embeddings()(self.token)
        nothing = self.step.new_ones(
            len(embeds), 1, 1, 1, dtype=torch.bool
        )  # 4-D: no mask is built; `_attend` has its own
        hidden = self.text(
            inputs_embeds=embeds,
            position_ids=self.position,
            attention_mask=nothing,
            use_cache=True,
            **{CACHE: self.cache},
        ).last_hidden_state
        self.token.copy_(self.model.lm_head(hidden)[:, -1].argmax(-1, keepdim=True))
        self.step.add_(1)
        self.position.add_(1)
        self.out.index_copy_(1, self.step, self.token)

    def captured(self) -> Callable[[], None]:
        """One step as a CUDA graph. Run it inside `attending`, after `reset`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.reset()
                self.once()
        torch.cuda.current_stream().wait_stream(side)
        self.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        return graph.replay

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one query; heads of a group are rows of one product. query [B, H, 1, d], key
        [B, KV, S, d].
        """
        if softcap is not None:
            raise NotImplementedError(
                "fixed slots do not cap logits: decode with runtime.generate.decode"
            )
        batch, heads, _, width = query.shape
        grouped = query.view(batch, key.shape[1], heads // key.shape[1], width)
        mask = self.sites[id(module)].expand(-1, key.shape[1], grouped.shape[2], -1)
        out = nn.functional.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
        return out.reshape(batch, 1, heads, width), None
