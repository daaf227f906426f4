"""The context manager: installs generic hooks around unchanged `model.generate`, applies decisions, always restores."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from effivlm.families.loading import family_of
from effivlm.methods.base import EncoderReducer, IntraLLM, KVCache, PreEncoder, PreLLM
from effivlm.methods.signals import Signal
from effivlm.runtime.attention import Tap
from effivlm.runtime.audit import Account, Audit, AuditError, audit_prompt
from effivlm.runtime.cache import CACHE, cache_of, slotted
from effivlm.runtime.decode import decode_mask, repacked, shifted
from effivlm.runtime.encoder import VisionStage, vision_blocks
from effivlm.runtime.hooks import Wrap, unwrapped
from effivlm.runtime.reduce import BlockReduction
from effivlm.runtime.signals import ATTENTION, LayerSource
from effivlm.runtime.stages import (
    allocate,
    at_layer,
    before_llm,
    compress_layer,
    first_cuts,
    layer_caches,
    needs_all_layers,
    plan_cuts,
    score_layer,
)
from effivlm.runtime.state import State, prompt_keys, side_rows
from effivlm.runtime.support import check_supported, whole_prompts
from effivlm.runtime.tokens import Prompt, everything, find_images, find_visual, hide, take, take_mask
from effivlm.setting import Part, Setting, parse_setting


class Session:
    """One model under one setting: ``with Session(model, setting) as session: model.generate(**inputs)``.

    Args:
        model: a transformers vision-language model of a supported family.
        setting: a `Setting` or its text form, such as ``visionzip@0.1 + snapkv@0.4``.
        trunk: leave out what the setting does inside the LLM and to the cache (sharing).
        watch: cache methods that are scored during prefill but not applied (sharing).
        branches: settings that will resume from this prefill; the layers they need are recorded (sharing).
        signals: encoder signals to gather beside the setting's own (sharing).
        wrap: what every hook is wrapped in (measuring).

    Attributes:
        accounts: what the last prefill cost, one `Account` per row of the batch. audit: the same, to print.

    Raises:
        SettingError, BudgetError, UnknownName: for a setting that cannot be read. Others: see `check_supported`.
    """

    def __init__(self, model: nn.Module, setting: Setting | str, trunk: bool = False, watch: Sequence[Part] = (),
                 branches: Sequence[Setting] = (), signals: Iterable[Signal] = (), wrap: Wrap = unwrapped) -> None:  # fmt: skip
        self.setting = parse_setting(setting) if isinstance(setting, str) else setting
        self.model: Any = model
        self.family = family_of(model)
        self.text: Any = self.model.get_decoder()
        self.base: Any = self.model.base_model
        self.layers = len(self.text.layers)
        check_supported(self.setting, self.family, self.layers)
        self.intra = () if trunk else self.setting.stage(IntraLLM)
        self.live = None if trunk else next(iter(self.setting.stage(KVCache)), None)
        self.watch, self.branches = tuple(watch), tuple(branches)
        self.record: frozenset[int] = frozenset()
        self.tap = Tap(self.text.layers, vision_blocks(self.model), self.model)
        resizing, reducing = (next(iter(self.setting.stage(s)), None) for s in (PreEncoder, EncoderReducer))
        needed = frozenset(s for p in self.setting.parts if not p.full for s in p.method.signals) | frozenset(signals)
        reduction = BlockReduction(self.family, self.tap, reducing, wrap)
        self.vision = VisionStage(self.model, self.family, self.tap, needed, resizing, reduction, wrap)
        self.hook = functools.partial(wrap, "method")
        self.handles: list[Any] = []
        self.accounts: list[Account] = []
        self.state: State | None = None

    # ------------------------------------------------------------------------------------------------ attachment
    def __enter__(self) -> "Session":
        """Install every hook; a failure on the way removes what was installed."""
        if getattr(self.base, "_effivlm_session", None) is not None:
            raise RuntimeError("this model is already under a compress() session: leave it before opening another")
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove every hook, whatever happened inside."""
        self._remove()

    def _install(self) -> None:
        self.base._effivlm_session = self
        pre = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        post, hook = functools.partial(nn.Module.register_forward_hook, with_kwargs=True), self.hook
        self.handles = [pre(self.base, hook(self._enter_model)), pre(self.text, hook(self._enter_text))]
        for i, layer in enumerate(self.text.layers):
            self.handles.append(pre(layer, hook(functools.partial(self._enter_layer, i))))
            self.handles.append(post(layer, hook(functools.partial(self._leave_layer, i))))
        self.handles.append(post(self.text, hook(self._leave_text)))
        if hasattr(self.text, "_deepstack_process"):
            self.text._deepstack_process = functools.partial(self._deepstack, self.text._deepstack_process)
        whole_prompts(self.model)
        self.vision.open()
        self.tap.open()

    def _remove(self) -> None:
        self.tap.close()
        self.vision.close()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.text.__dict__.pop("_deepstack_process", None)
        self.model.__dict__.pop("_prefill", None)
        self.base.__dict__.pop("_effivlm_session", None)
        self.state = None

    @property
    def audit(self) -> Audit:
        """The accounts of the last prefill, in a form to print."""
        return Audit(self.accounts)

    @property
    def flash(self) -> bool:
        """Whether the LLM runs flash attention, which takes 2-D masks only."""
        return "flash" in self.text.config._attn_implementation

    @property
    def current(self) -> State:
        """The prefill being processed."""
        assert self.state is not None
        return self.state

    # ---------------------------------------------------------------------------------- stage 0: what is visual
    def _enter_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        cache = cache_of(kwargs)
        prefilling = cache is None or not cache.get_seq_length()
        self.visual = find_visual(self.model.config, kwargs, self.model.get_input_embeddings(), prefilling)
        mask = kwargs.get("attention_mask")
        self.real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.ids = kwargs.get("input_ids")

    # ------------------------------------------------------------------------------- stage 1: the prompt enters
    def _enter_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache, embeds = cache_of(kwargs), kwargs["inputs_embeds"]
        past = cache.get_seq_length() if cache is not None else 0
        if past:
            self._decode(cache, past, kwargs)
            return args, kwargs
        if cache is None and (self.text.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
            cache = kwargs[CACHE] = DynamicCache(config=self.text.config)
        if cache is not None:
            slotted(cache)
        state = self.state = self._begin(embeds, kwargs)
        kept = before_llm(state.prompt, self.vision.encoded, self.setting.stage(PreLLM), self.layers, state.notes)
        state.promise = plan_cuts(state.prompt, kept, self.intra, self.layers)
        self.record = first_cuts(state.prompt, kept, self.branches, self.layers)
        self.watch_layers()
        if any(len(k) < len(i.slots) for k, i in zip(kept, state.prompt.images, strict=True)):
            self._cut_before(state, kept, kwargs, cache)
        elif state.prompt.embeds is not embeds:
            kwargs["inputs_embeds"] = state.prompt.embeds
        return args, kwargs

    def _begin(self, embeds: Tensor, kwargs: dict[str, Any]) -> State:
        """A new prompt: its images, keys and positions."""
        shape, device = (embeds.shape[0], embeds.shape[1]), embeds.device
        visual = self.visual.to(device)
        real = self.real.to(device) if self.real is not None and self.real.shape == shape else torch.ones_like(visual)
        self.tap.calls.clear()
        images = []
        if bool(visual.any()):
            if self.vision.encoded is None:
                raise RuntimeError(
                    "the prompt holds images that were encoded outside this session: pass pixel_values inside the with block"
                )
            images = find_images(visual, self.vision.encoded.pieces, self.family)
        side = {k: kwargs[k] for k in ("visual_pos_masks", "deepstack_visual_embeds") if kwargs.get(k) is not None}
        prompt = Prompt(visual, real, images, prompt_keys(self.ids, embeds, real), embeds, side, everything(shape, device))
        position = kwargs.get("position_ids")
        position = everything(shape, device) if position is None else position
        return State(prompt, position[..., -1:] + 1, isinstance(kwargs.get("attention_mask"), dict))

    def watch_layers(self) -> None:
        """Tell the tap which decoder layers' queries and keys will be read."""
        watched = {s for s in self.tap.watched if s[0] == "vision"}
        for layer, cuts in self.current.promise.cuts.items():
            if layer and any(isinstance(s, ATTENTION) for c in cuts for s in c.method.signals):
                watched.add(("text", layer - 1))
        if any(isinstance(s, ATTENTION) for p in self.observers for s in p.method.signals):
            watched |= {("text", i) for i in range(self.layers)}
        watched |= {("text", i - 1) for i in self.record if i}
        self.tap.watched = watched

    @property
    def observers(self) -> tuple[Part, ...]:
        """Cache methods that score this prefill."""
        return tuple(dict.fromkeys([*self.watch, *([self.live] if self.live else [])]))

    def _cut_before(self, state: State, kept: list[Tensor], kwargs: dict[str, Any], cache: Any) -> None:
        prompt = state.prompt
        keep = ~prompt.visual
        for image, offsets in zip(prompt.images, kept, strict=True):
            keep[image.row, image.slots[offsets]] = True
        index = prompt.narrow(keep)
        position = kwargs.get("position_ids")
        position = everything((prompt.visual.shape[0], prompt.visual.shape[1]), index.device) if position is None else position
        kwargs["inputs_embeds"] = take(prompt.embeds, index, 1, 0)
        kwargs["position_ids"] = take(position, index, -1, -2)
        if self.setting.positions == "repack":
            kwargs["position_ids"], state.delta = repacked(prompt, position)
            if cache is not None:
                cache.delta = state.delta
        if kwargs.get("cache_position") is not None:  # transformers before 5.4
            kwargs["cache_position"] = kwargs["cache_position"][: index.shape[1]]
        mask: Any = take_mask(kwargs.get("attention_mask"), index)
        if mask is None:  # position gaps without a mask and a cache would be read as packed sequences
            mask = torch.ones_like(index)
        kwargs["attention_mask"] = mask if prompt.valid is None else hide(mask, prompt.valid)
        if prompt.side:
            kwargs |= side_rows(prompt.side, prompt.index)

    def _decode(self, cache: Any, past: int, kwargs: dict[str, Any]) -> None:
        new = kwargs["inputs_embeds"].shape[1]
        if new > 1 and bool(self.visual.any()):
            raise NotImplementedError("images after the first prefill (a later turn): send the conversation in one prompt")
        self.state = None
        if getattr(cache, "delta", None) is not None:
            kwargs["position_ids"] = shifted(kwargs.get("position_ids"), cache.delta, past, new)

    # -------------------------------------------------------------------------------- stage 2: a decoder layer
    def _enter_layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        state, hidden = self.state, args[0]
        if state is None:
            layer = cache_of(kwargs).layers[i]
            heads = self.text.config.num_attention_heads
            kwargs["attention_mask"] = decode_mask(layer, kwargs.get("attention_mask"), hidden.shape[1], heads, self.flash)
            return args, kwargs
        prompt = state.prompt
        if self.record and i >= min(self.record):
            call = self.tap.calls.get(("text", i - 1), [None])[-1]
            state.inputs[i] = (hidden, dict(kwargs), call) if i in self.record else (None, dict(kwargs), None)
        if i in state.promise.cuts:
            hidden = self._cut_inside(state, i, module, hidden, kwargs)
        self.tap.calls.pop(("text", i - 1), None)
        state.memo.clear()
        if prompt.rel is not None:
            self._follow(prompt, kwargs)
        kwargs["position_ids"] = None  # layers use it only to guess packed sequences, which gaps would mimic
        prompt.kept[i] = (prompt.index, prompt.valid)
        prompt.lengths[i] = hidden.shape[1]
        return (hidden, *args[1:]), kwargs

    def _cut_inside(self, state: State, i: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        prompt = state.prompt

        def source(row: int, alive: Tensor, **place: Any) -> LayerSource:
            return LayerSource(self, i, row, alive, module=module, kwargs=kwargs, **place)

        hidden, keep = at_layer(prompt, state.promise.cuts[i], hidden, i, source, state.notes, state.promise.before)
        if keep is None:
            return hidden
        sub = prompt.narrow(keep)
        prompt.rel = sub if prompt.rel is None else prompt.rel.gather(1, sub)
        return take(hidden, sub, 1, 0)

    def _follow(self, prompt: Prompt, kwargs: dict[str, Any]) -> None:
        """The text model hands every layer full-length side inputs: gather those of the tokens in play."""
        rel = prompt.rel
        assert rel is not None
        kwargs["position_embeddings"] = tuple(take(x, rel, -2, -3) for x in kwargs["position_embeddings"])
        mask: Any = take_mask(kwargs.get("attention_mask"), rel)
        if prompt.valid is not None:
            if mask is None:
                n = rel.shape[1]
                causal = torch.ones(n, n, dtype=torch.bool, device=rel.device).tril().expand(len(rel), 1, -1, -1)
                mask = torch.ones_like(rel) if self.flash else causal
            mask = hide(mask, prompt.valid)
        kwargs["attention_mask"] = mask

    # ------------------------------------------------------------------------------------- stage 3: the cache
    def _leave_layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state, cache = self.state, cache_of(kwargs)
        if state is None or cache is None:
            return
        prompt, layer = state.prompt, cache.layers[i]
        layer.index, layer.valid = prompt.kept[i]
        if (stored := layer.keys.shape[-2]) != layer.index.shape[1]:
            raise AuditError(f"decoder layer {i} stored {stored} cache entries for {layer.index.shape[1]} tokens")
        layer.seen = layer.prompt = prompt.visual.shape[1]
        types = getattr(self.text.config, "layer_types", None)
        layer.window = self.text.config.sliding_window if types and types[i] == "sliding_attention" else None

        def source(row: int, alive: Tensor, image: Tensor) -> LayerSource:
            return LayerSource(self, i + 1, row, alive, image=image, module=module, kwargs=kwargs, held=layer)

        for part in self.observers:
            caches = layer_caches(prompt, layer, i, self.layers, part, state.notes, source)
            scored = score_layer(part, caches)
            state.scores.setdefault(part, []).append(scored)
            if part is self.live and not needs_all_layers(part):
                compress_layer(prompt, layer, i, part, caches, scored, self._budgets(state, part)[i])

    def _budgets(self, state: State, part: Part) -> list[list[int]]:
        """Entries per KV head, [layers so far or all][rows]."""
        prompt = state.prompt
        lengths = [[state.promise.tokens(prompt, row, i) for row in range(len(prompt.keys))] for i in range(self.layers)]
        return allocate(part, state.scores[part], lengths)

    def compress(self, state: State, cache: Any, part: Part) -> list[Account]:
        """Compress a prefilled cache (or a fork of it) in place, by what ``part`` read during prefill.

        Returns:
            The accounts of the compressed prompt. Raises AuditError when tensors and promise differ.
        """
        prompt, scored, budgets = state.prompt, state.scores[part], self._budgets(state, part)
        for i, layer in enumerate(cache.layers):
            caches = layer_caches(prompt, layer, i, self.layers, part, state.notes)
            compress_layer(prompt, layer, i, part, caches, scored[i], budgets[i])
        return audit_prompt(prompt, state.promise, self.layers, cache)

    def _leave_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.state is not None:
            self.finish(self.state, cache_of(kwargs))

    def finish(self, state: State, cache: Any) -> None:
        """The prefill is over: compress what needed all layers, then audit."""
        self.tap.calls.clear()
        self.vision.encoded = None
        if cache is not None and self.live is not None and needs_all_layers(self.live):
            self.accounts = self.compress(state, cache, self.live)
        else:
            self.accounts = audit_prompt(state.prompt, state.promise, self.layers, cache)

    # -------------------------------------------------------------------- Qwen3-VL: features added after layers
    def _deepstack(self, inner: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        if self.state is not None and self.state.prompt.rel is not None:
            rows = side_rows({"visual_pos_masks": visual, "deepstack_visual_embeds": [features]}, self.state.prompt.rel)
            visual, features = rows["visual_pos_masks"], rows["deepstack_visual_embeds"][0]
        return inner(hidden, visual, features)


compress = Session
