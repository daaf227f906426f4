"""One prompt on its way through the LLM: entered, cut, stored, finished, in that order."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.runtime.account import Account
from effivlm.runtime.attention import Tap
from effivlm.runtime.audit import AuditError, Checks, audit_prompt
from effivlm.runtime.before_llm import Notes, before_llm
from effivlm.runtime.cache import slot_layers
from effivlm.runtime.counts import in_cache
from effivlm.runtime.geometry import (
    BLANK,
    Side,
    narrowed,
    positions,
    prefill_mask,
    repacked,
    take,
)
from effivlm.runtime.host import Host
from effivlm.runtime.in_cache import (
    Scored,
    apply_choices,
    at_the_end,
    choose,
    compress_all,
    known_statistics,
    layer_caches,
    score_layer,
    store,
)
from effivlm.runtime.in_llm import Place, cut_layer, first_cuts, plan_cuts
from effivlm.runtime.merges import merged_before
from effivlm.runtime.promise import Promise
from effivlm.runtime.recipe import Recipe, Recorded
from effivlm.runtime.rows import Row
from effivlm.runtime.signals import ATTENTION, LayerSource
from effivlm.runtime.slots import Lease, SlotLayer
from effivlm.runtime.tokens import Decisions, Prompt
from effivlm.runtime.vision import Encoded
from effivlm.setting import Part


@dataclass
class Prefill:
    """Everything that belongs to one prompt.

    Attributes:
        host: the model. recipe: what is asked. tap: sees the attention. lease: given to the cache.
        prompt: tokens in play. encoded: its images, or None.
        position: [B, 1] or [axes, B, 1], position of the first generated token in the model's own
            numbering.
        real: [B, past + L] bool, False for padding, earlier turns included.
        special: the model made this prompt's masks itself (bidirectional images).
        promise: counts by budget. notes: scratch of hybrid methods.
        counts: entries each cache method keeps, as far as known.
        scores: what cache methods read, layer by layer. inputs: recorded layers (sharing).
        delta: what decode positions are reduced by under repacking, or None.
        memo: signals by place, dropped as layers pass. masks: made for this prompt, by window.
        checks: what tensors are asked at the end.
        accounts: the cost of every row, once finished. held: per layer, what the cache held then.
    """

    host: Host
    recipe: Recipe
    tap: Tap
    lease: Lease
    prompt: Prompt
    encoded: Encoded | None
    position: Tensor
    real: Tensor
    special: bool = False
    promise: Promise = field(default_factory=lambda: Promise([]))
    notes: Notes = field(default_factory=dict)
    counts: dict[Part, list[list[int]]] = field(default_factory=dict)
    scores: dict[Part, list[Scored]] = field(default_factory=dict)
    inputs: dict[int, Recorded] = field(default_factory=dict)
    record: frozenset[int] = frozenset()
    delta: Tensor | None = None
    memo: dict[Any, dict[Any, Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor | None] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)
    accounts: list[Account] = field(default_factory=list)
    held: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.host.layers)

    # ------------------------------------------------------------------- stage 1: the prompt enters
    def enter(self, kwargs: dict[str, Any]) -> None:
        """Choose what enters the LLM and narrow the text model's arguments to it, in place."""
        prompt, embeds = self.prompt, kwargs["inputs_embeds"]
        kept = before_llm(prompt, self.encoded, self.recipe.before, self.layers, self.notes)
        self.promise = plan_cuts(prompt, kept, self.recipe.inside, self.layers)
        self.record = first_cuts(prompt, kept, self.recipe.branches, self.layers)
        self.watch()
        if any(len(k) < len(i.slots) for k, i in zip(kept, prompt.images, strict=True)):
            self._cut_before(kept, kwargs)
        elif prompt.embeds is not embeds:
            kwargs["inputs_embeds"] = prompt.embeds

    def _cut_before(self, kept: list[Tensor], kwargs: dict[str, Any]) -> None:
        prompt = self.prompt
        keep = ~prompt.visual
        for image, offsets in zip(prompt.images, kept, strict=True):
            keep[image.row, image.slots[offsets]] = True
        index = prompt.narrow(keep)
        position = positions(kwargs, prompt.past)
        kwargs["inputs_embeds"] = take(prompt.embeds, index, 1, 0)
        kwargs["position_ids"] = take(position, index, -1, -2)
        if self.recipe.repack:
            kwargs["position_ids"], self.delta = repacked(position, index, prompt.counts)
        if kwargs.get("cache_position") is not None:  # transformers before 5.4
            kwargs["cache_position"] = kwargs["cache_position"][: index.shape[1]]
        if not self.special:  # every layer is given its own
            kwargs["attention_mask"] = torch.ones(BLANK, dtype=torch.bool, device=index.device)
        if prompt.side is not None:
            side = prompt.side.at(prompt.index)
            kwargs |= zip(self.host.family.side, (side.visual, side.levels), strict=True)

    def watch(self) -> None:
        """Tell the tap which decoder layers' queries and keys will be read."""
        watched = {i - 1 for i in self.record if i}
        for layer, cuts in self.promise.cuts.items():
            if layer and any(isinstance(s, ATTENTION) for c in cuts for s in c.method.signals):
                watched.add(layer - 1)
        if any(isinstance(s, ATTENTION) for p in self.recipe.observers for s in p.method.signals):
            watched |= set(range(self.layers))
        self.tap.watch("text", watched)

    # --------------------------------------------------------------------- stage 2: a decoder layer
    def before_layer(
        self,
        i: int,
        module: nn.Module,
        hidden: Tensor,
        kwargs: dict[str, Any],
        layer: SlotLayer | None = None,
    ) -> Tensor:
        """The layer's input: cut, and its masks and positions narrowed to it, in place; ``layer``
        of the cache, which may hold earlier turns.
        """
        prompt = self.prompt
        if self.record and i >= min(self.record):
            here = i in self.record
            call = self.tap.last(i - 1) if here else None
            self.inputs[i] = Recorded(hidden if here else None, dict(kwargs), call)
        if i in self.promise.cuts:
            hidden = self._cut_inside(i, module, hidden, kwargs)
        self.tap.drop("text", i - 1)
        self.memo.clear()
        if prompt.rel is not None:
            rotary = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = tuple(take(x, prompt.rel, -2, -3) for x in rotary)
        if prompt.cut or (layer is not None and not layer.whole):
            given = kwargs.get("attention_mask")
            kwargs["attention_mask"] = self._mask(i, hidden, given, layer)
        # layers use it only to guess packed sequences, which gaps would mimic
        kwargs["position_ids"] = None
        prompt.kept[i] = (prompt.index, prompt.valid)
        prompt.lengths[i] = hidden.shape[1]
        return hidden

    def _cut_inside(
        self, i: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        prompt = self.prompt

        def source(row: int, held: Row, **place: Any) -> LayerSource:
            return LayerSource(self, i, row, held, module=module, kwargs=kwargs, **place)

        place = Place(prompt, i, self.promise.before, source, self.notes)
        hidden, keep = cut_layer(place, self.promise.cuts[i], hidden)
        self.counts.clear()  # a method that is not exact may have kept less than was promised
        if keep is None:
            return hidden
        sub = prompt.narrow_inside(keep)
        self.masks.clear()
        return take(hidden, sub, 1, 0)

    def _mask(self, i: int, hidden: Tensor, given: Any, layer: SlotLayer | None) -> Tensor | None:
        """This layer's mask over the tokens in play, and over what its cache holds of earlier
        turns.
        """
        prompt, window = self.prompt, self.host.windows[i]
        query, key, valid = prompt.index, prompt.index, prompt.valid
        place: Any = id(given) if self.special else window
        if prompt.past:
            assert layer is not None
            query = query + prompt.past
            key, valid, place = *layer.joined(query, valid), i
        if place not in self.masks:
            if self.special and isinstance(given, Tensor):
                made: Tensor | None = narrowed(given, prompt.index, key, valid)
            else:
                plain = not (prompt.past or prompt.padded) and valid is None
                kind, dtype = self.host.attention, hidden.dtype
                made = prefill_mask(kind, query, key, self.real, valid, window, plain, dtype)
            if made is not None and made.ndim == 4 and key.ndim == 3:
                made = made.repeat_interleave(self.host.heads // key.shape[1], 1)
            self.masks[place] = made
        return self.masks[place]

    # --------------------------------------------------------------------------- stage 3: the cache
    def after_layer(
        self, i: int, module: nn.Module, kwargs: dict[str, Any], layer: SlotLayer
    ) -> None:
        """The layer has stored its entries: score them, and compress what can be compressed now."""
        prompt = self.prompt
        index, valid = prompt.kept[i]
        stored = layer.stored()[0].shape[-2]
        if layer.index is None and stored != index.shape[1]:
            raise AuditError(
                f"decoder layer {i} stored {stored} cache entries for {index.shape[1]} tokens"
            )
        layer.take_in(index, valid, prompt.length, self.host.windows[i])
        layer.follow(self.lease)

        def source(row: int, held: Row) -> LayerSource:
            place = {"module": module, "kwargs": kwargs, "cached": layer}
            return LayerSource(self, i + 1, row, held, **place)

        for part in self.recipe.observers:
            caches = layer_caches(prompt, layer, i, self.layers, part, self.notes, source)
            if part not in self.counts:
                self.counts[part] = in_cache(part, self.promise.lengths(prompt, self.layers))
            counts = self.counts[part][i]
            scored = score_layer(part, caches, counts)
            self.scores.setdefault(part, []).append(scored)
            if part is self.recipe.live and not at_the_end(part):
                choices = choose(part, caches, scored, counts, self.checks)
                apply_choices(layer, prompt.rows(index, valid), choices)

    def compress(self, cache: Any, part: Part) -> None:
        """Compress a prefilled cache (or a fork of it) in place, by what ``part`` read during
        prefill.
        """
        scored, lengths = self.scores[part], self.promise.lengths(self.prompt, self.layers)
        counts = in_cache(part, lengths, known_statistics(part, scored))
        compress_all(self.prompt, slot_layers(cache), part, scored, counts, self.notes)

    def account(self, cache: Any) -> list[Account]:
        """The cost of every row. Raises AuditError when tensors and promise differ."""
        return audit_prompt(self.prompt, self.promise, self.layers, cache, self.checks)

    # ----------------------------------------------------------------------------- stage 4: the end
    def finish(self, cache: Any) -> None:
        """The last layer has run: compress what needed all layers, then audit."""
        self.tap.drop("text")
        self.masks.clear()
        live, form = self.recipe.live, self.recipe.form
        if cache is not None and live is not None and at_the_end(live):
            self.compress(cache, live)
        if cache is not None and form is not None:
            store(self.prompt, cache, form)
        self.accounts = self.account(cache)
        slots = [x for x in getattr(cache, "layers", ()) if isinstance(x, SlotLayer)]
        self.held = [(layer.index, layer.valid) for layer in slots]
        if slots and self.delta is not None:
            slots[0].repack(self.delta)

    # ------------------------------------------------- deep stacks: features added after layers
    def deep_stack(self, visual: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The visual mask and feature rows of one level, for the tokens in play."""
        if self.prompt.rel is None:
            return visual, features
        side = Side(visual, [features]).at(self.prompt.rel)
        return side.visual, side.levels[0]

    # ------------------------------------------------------------------------------------- resuming
    def again(self, recipe: Recipe, promise: Promise, start: int) -> "Prefill":
        """This prefill before decoder layer ``start``, under another recipe; `entered` gives its
        prompt.
        """
        old, prompt = self.prompt, self.entered()
        prompt.kept.update((i, old.kept[i]) for i in range(start))
        prompt.lengths.update((i, old.lengths[i]) for i in range(start))
        scores = {p: [*self.scores.get(p, [])[:start]] for p in recipe.observers}
        fresh: dict[str, Any] = {k: {} for k in ("inputs", "memo", "masks", "counts")}
        fresh |= {"notes": copy.deepcopy(self.notes), "record": frozenset(), "scores": scores}
        fresh |= {"accounts": [], "checks": Checks()}
        return replace(self, recipe=recipe, promise=promise, prompt=prompt, **fresh)

    def entered(self) -> Prompt:
        """The prompt as it entered the first decoder layer."""
        index, valid = self.prompt.kept[0]
        cut = valid is not None or index.shape[1] < self.prompt.length
        blank: dict[str, Any] = {"kept": {}, "lengths": {}, "written": [], "cut": cut}
        blank |= {"decisions": Decisions(), "merges": merged_before(self.prompt.merges)}
        return replace(self.prompt, index=index, valid=valid, rel=None, **blank)
