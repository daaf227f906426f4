"""The context manager: hooks around an unchanged model, the state of a prompt from call to call,
and back to what was there.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from effivlm.methods.base import EncoderReducer, PreEncoder
from effivlm.methods.signals import Signal
from effivlm.runtime.account import Audit
from effivlm.runtime.answers import scored
from effivlm.runtime.attention import Tap
from effivlm.runtime.cache import CACHE, cache_of
from effivlm.runtime.entry import around, begun, check_cache, followed, taken
from effivlm.runtime.geometry import decode_mask
from effivlm.runtime.hooks import Wrap, unwrapped
from effivlm.runtime.host import UnsupportedCall, host_of
from effivlm.runtime.patches import Patches
from effivlm.runtime.prefill import Prefill
from effivlm.runtime.recipe import Recipe
from effivlm.runtime.slots import Lease, SlotLayer
from effivlm.runtime.support import (
    check_call,
    check_processed,
    check_supported,
    refused_copy,
    refused_switch,
    whole_prompts,
)
from effivlm.runtime.trace import PromptTrace, traces
from effivlm.runtime.turn import Turn
from effivlm.runtime.vision import VisionStage
from effivlm.runtime.weights import CompressedWeights, check_weights
from effivlm.setting import Part, Setting, parse_setting


class Session:
    """One model under one setting: ``with compress(model, setting) as session:
    model.generate(**inputs)``.

    Threads may share it: their calls take turns, and each has an audit of its own.

    Args:
        model: a transformers vision-language model of a supported family, wrapped or not.
        setting: a `Setting` or its text form, such as ``visionzip@0.1 + snapkv@0.4``.
        trunk: leave out what the setting does inside the LLM and to the cache (sharing).
        watch: cache methods that are scored during prefill but not applied (sharing).
        branches: settings that will resume from this prefill; the layers they need are recorded
            (sharing).
        signals: encoder signals to gather beside the setting's own (sharing).
        wrap: what every hook is wrapped in (measuring).
        weights: the setting's compressed weights, put in for the block; None: the model has them.

    Raises:
        SettingError: for a setting that cannot be read or carried out on the family.
        BudgetError: for a budget that no image could meet.
        UnknownName: for a method that is not there.
        UnsupportedCall: for a model that cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting | str,
        trunk: bool = False,
        watch: Sequence[Part] = (),
        branches: Sequence[Setting] = (),
        signals: Iterable[Signal] = (),
        wrap: Wrap = unwrapped,
        weights: CompressedWeights | None = None,
    ) -> None:
        self.setting = setting if isinstance(setting, Setting) else parse_setting(setting)
        self.host = host_of(model)
        check_supported(self.setting, self.host.family, len(self.host.layers))
        check_processed(self.setting)
        self.recipe = Recipe.of(self.setting, trunk, tuple(watch), tuple(branches))
        self.tap, self.weights = Tap(self.host), weights
        parts = [p for p in self.setting.parts if not p.full]
        needed = frozenset(s for p in parts for s in p.method.signals) | frozenset(signals)
        resizing, reducing = (
            next(iter(self.setting.stage(s)), None) for s in (PreEncoder, EncoderReducer)
        )
        self.vision = VisionStage(self.host, self.tap, needed, resizing, reducing, wrap)
        self.wrap, self.hook = wrap, functools.partial(wrap, "method")
        self.patches, self.lease = Patches(), Lease()
        self.turn, self.lock = Turn(), threading.RLock()

    # ----------------------------------------------------------------------------------- attachment
    def __enter__(self) -> Self:
        """Install every hook; a failure on the way removes what was installed."""
        if "_effivlm_session" in self.host.base.__dict__:
            raise RuntimeError(
                "this model is already under a compress() session: leave it before opening another"
            )
        try:
            if self.weights is not None:
                self.patches.on_close(self.weights.__enter__().__exit__)
            check_weights(self.host, self.setting)
            self._install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove every hook, whatever happened inside."""
        self.lease.end()
        self.tap.close()
        self.vision.close()
        self.patches.close()
        self.turn.close()

    def _install(self) -> None:
        host, patches, hook = self.host, self.patches, self.hook
        self.lease = Lease()
        patches.set(host.base, "_effivlm_session", self)
        for module in host.compiled:  # compiled code does not see hooks that came later
            if "_orig_mod" in module._modules:
                patches.set(module, "forward", module._orig_mod)
            else:
                patches.set(module, "_compiled_call_impl", None)
        for owner in {id(x): x for x in (host.model, host.base, host.text)}.values():
            patches.wrap(owner, "set_attn_implementation", refused_switch)
            patches.wrap(owner, "__reduce_ex__", refused_copy)
        patches.wrap(host.model, "_prefill", whole_prompts)
        patches.wrap(host.model, "generate", around(self._generating))
        patches.wrap(host.model, "forward", around(self._scoring))
        patches.wrap(host.base, "forward", around(self._calling))
        patches.wrap(host.base, "get_image_features", around(self._encoding))
        patches.wrap(host.text, "_deepstack_process", lambda f: functools.partial(self._stack, f))
        patches.before(host.text, hook(self._enter_text))
        for i, layer in enumerate(host.layers):
            patches.before(layer, hook(functools.partial(self._enter_layer, i)))
            patches.after(layer, hook(functools.partial(self._leave_layer, i)))
        patches.after(host.text, hook(self._leave_text))
        self.vision.open()
        self.tap.open()

    # ------------------------------------------------------------------------------------- reading
    @property
    def accounts(self) -> list[Any]:
        """What the prompts of the last call cost, one `Account` per prompt."""
        return self.turn.accounts

    @property
    def audit(self) -> Audit:
        """The accounts of the last call, in a form to print."""
        return Audit(self.accounts)

    @property
    def trace(self) -> list[PromptTrace]:
        """What became of every visual token of the last prompt, one trace for each of its rows.

        Raises:
            UnsupportedCall: before the first prompt, and after the block.
        """
        prefill = self.turn.prefill
        if prefill is None:
            raise UnsupportedCall(
                "no prompt to trace: read session.trace inside the with block, after a call"
            )
        return traces(prefill.prompt, prefill.held, self.layers)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.host.layers)

    @property
    def current(self) -> Prefill:
        """The last prefill."""
        assert self.turn.prefill is not None
        return self.turn.prefill

    def mark_visual(self, visual: Tensor) -> None:
        """Say which positions of the next prompt show images, where the model cannot be asked:
        merged ``inputs_embeds``.

        Args:
            visual: [B, L] bool; each unbroken run is one image, all False a prompt without any.
        """
        self.turn.mark(visual)

    # ----------------------------------------------------------------------- calls from outside
    def _generating(self, inner: Any, call: dict[str, Any], go: Callable[[], Any]) -> Any:
        check_call(self.setting, self.host.model, call)
        with self.turn.collecting():
            return go()

    def _scoring(self, inner: Any, call: dict[str, Any], go: Callable[[], Any]) -> Any:
        with self.lock, self.turn.reading(call.get("logits_to_keep", 0)):
            if call.get("labels") is None or not self.setting.acting:
                return go()
            return scored(inner, self.host, self.recipe, self.turn, call)

    def _calling(self, inner: Any, call: dict[str, Any], go: Callable[[], Any]) -> Any:
        with self.lock, self.turn.taking(taken(self.host, self.setting, self.turn, call)):
            return go()

    def _encoding(self, inner: Any, call: dict[str, Any], go: Callable[[], Any]) -> Any:
        with self.lock:
            ready = self.turn.ready
            if ready is None:
                ready = self.hook(self.vision.encode)(self.wrap("model", inner), call)
            self.turn.see(ready)
        return copy.copy(ready.output)

    @contextmanager
    def running(self, prefill: Prefill) -> Iterator[None]:
        """Layers called inside belong to ``prefill``."""
        with self.lock, self.turn.running(prefill):
            prefill.watch()
            yield

    # ------------------------------------------------------------ the text model and its layers
    def _enter_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache, call = cache_of(kwargs), self.turn.call
        past = cache.get_seq_length() if cache is not None else 0
        if past and not (self.turn.brings_images and bool(call.visual.any())):
            self.turn.end()
            followed(cache, self.lease, past, kwargs)
            return args, kwargs
        if cache is None and self.host.caches(kwargs.get("use_cache")):
            cache = kwargs[CACHE] = DynamicCache(config=self.host.text.config)
        check_cache(self.setting, self.recipe, cache, past)
        prefill = begun(self.host, self.recipe, self.tap, self.lease, self.turn, kwargs, past)
        self.turn.begin(prefill)
        prefill.enter(kwargs)
        return args, kwargs

    def _enter_layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        prefill, cache = self.turn.running_prefill, cache_of(kwargs)
        layer = cache.layers[i] if cache is not None and i < len(cache.layers) else None
        layer = layer if isinstance(layer, SlotLayer) else None
        if prefill is not None:
            hidden = prefill.before_layer(i, module, args[0], kwargs, layer)
            return (hidden, *args[1:]), kwargs
        if layer is not None and not (layer.whole and not layer.window):
            kwargs["attention_mask"] = decode_mask(
                layer,
                kwargs.get("attention_mask"),
                args[0].shape[1],
                self.host.heads,
                self.host.attention,
            )
        return args, kwargs

    def _leave_layer(
        self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        prefill, cache = self.turn.running_prefill, cache_of(kwargs)
        if prefill is not None and cache is not None and isinstance(cache.layers[i], SlotLayer):
            prefill.after_layer(i, module, kwargs, cache.layers[i])

    def _leave_text(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        prefill = self.turn.running_prefill
        if prefill is None:
            return None
        prefill.finish(cache_of(kwargs))
        self.turn.finish(prefill)
        if self.turn.last_row_only:
            return None
        if isinstance(output, tuple):
            return (prefill.prompt.full(output[0]), *output[1:])
        output.last_hidden_state = prefill.prompt.full(output.last_hidden_state)
        return output

    def _stack(self, inner: Any, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """Features are added after the first layers."""
        if self.turn.running_prefill is not None:
            visual, features = self.turn.running_prefill.deep_stack(visual, features)
        return inner(hidden, visual, features)
