"""What a call brings to a prefill: which tokens are visual, which are padding, what images were
encoded as, a cache that can hold what is left. What cannot be followed is refused here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effivlm.runtime.attention import Tap
from effivlm.runtime.cache import cache_of, fits, slotted
from effivlm.runtime.geometry import Side, everything, positions, shifted
from effivlm.runtime.host import Host, UnsupportedCall, placeholders
from effivlm.runtime.layout import find_images, marked_images, prompt_keys
from effivlm.runtime.prefill import Prefill
from effivlm.runtime.recipe import Recipe
from effivlm.runtime.slots import Lease, SlotLayer
from effivlm.runtime.tokens import Image, Prompt
from effivlm.runtime.turn import Call, Turn
from effivlm.runtime.vision import Encoded
from effivlm.setting import Setting


def around(body: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What puts ``body(inner, call, go)`` in a function's place: the function, a call's arguments
    by name, and the call itself.

    The signature stays the function's, for `generate` reads it; it is read once, for that is slow
    and decode steps are many.
    """

    def placed(inner: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            bound = dict(signature.bind(*args, **kwargs).arguments)
            call = {**bound, **bound.pop("kwargs", {})}
            return body(inner, call, functools.partial(inner, *args, **kwargs))

        return outer

    return placed


def taken(host: Host, setting: Setting, turn: Turn, call: dict[str, Any]) -> Call:
    """What a call of the base model brings.

    Raises:
        UnsupportedCall: for embeddings in which images cannot be seen, and for videos.
    """
    cache, marks = cache_of(call), turn.marked()
    new = cache is None or not cache.get_seq_length()
    mask = call.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    again = turn.extends(call.get("input_ids"))  # what was generated may hold any token
    visual = placeholders(host, call, new and not again) if marks is None else marks
    unseen = marks is None and new and call.get("input_ids") is None and not bool(visual.any())
    if unseen and setting.acting:
        raise UnsupportedCall(
            "inputs_embeds in which no image placeholder can be seen: if image features are merged"
            " into them already, say where with session.mark_visual(mask), [B, L] bool, before the"
            " call (all False for a prompt without images)"
        )
    return Call(visual, real, call.get("input_ids"), encoded, marks is not None)


def check_cache(setting: Setting, recipe: Recipe, cache: Any, past: int) -> None:
    """Slot layers in an empty cache.

    Raises:
        UnsupportedCall: for a cache method without a cache, a cache whose layers have one length,
            and stages that cannot follow images in a later turn.
    """
    late = recipe.live or recipe.form
    if cache is None:
        if late is not None:
            raise UnsupportedCall(
                f"{late} compresses the cache, and this call keeps none: leave out use_cache=False"
            )
    elif past:
        if late is not None or recipe.inside or recipe.repack:
            raise UnsupportedCall(
                f"images in a later turn under {setting}: only what happens before the LLM can"
                " follow a cached conversation; send it in one prompt"
            )
    elif fits(cache):
        slotted(cache)
    elif setting.acting:
        raise UnsupportedCall(
            f"{type(cache).__name__} cannot hold layers of different lengths, which {setting}"
            " needs: leave out cache_implementation and past_key_values (a DynamicCache)"
        )


def begun(
    host: Host,
    recipe: Recipe,
    tap: Tap,
    lease: Lease,
    turn: Turn,
    kwargs: dict[str, Any],
    past: int,
) -> Prefill:
    """The prefill of the prompt in the text model's arguments, after ``past`` tokens."""
    call, embeds = turn.call, kwargs["inputs_embeds"]
    shape, device = (embeds.shape[0], embeds.shape[1]), embeds.device
    visual, everyone = call.visual.to(device), real_of(call, shape, past, device)
    real = everyone[:, past:]
    encoded = turn.claim()
    prompt = Prompt(
        visual,
        real,
        _images(host, call, visual, real, encoded),
        prompt_keys(call.ids, embeds, real),
        embeds,
        _side(host, kwargs),
        everything(shape, device),
        padded=not bool(real.all()),
        past=past,
        markers=host.family.markers,
        decisions=turn.decisions(call.ids, cache_of(kwargs) is None),
    )
    mask = kwargs.get("attention_mask")
    special = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    after = positions(kwargs, past)[..., -1:] + 1
    return Prefill(host, recipe, tap, lease, prompt, encoded, after, everyone, special)


def followed(cache: Any, lease: Lease, past: int, kwargs: dict[str, Any]) -> None:
    """Tokens after a prompt: nothing is cut; compressed layers are under ``lease`` from now on."""
    layers = [x for x in cache.layers if isinstance(x, SlotLayer)]
    for layer in layers:
        layer.follow(lease)
    delta, new = layers[0].delta if layers else None, kwargs["inputs_embeds"].shape[1]
    if delta is not None:
        kwargs["position_ids"] = shifted(kwargs.get("position_ids"), delta, past, new)


def real_of(call: Call, shape: tuple[int, int], past: int, device: torch.device) -> Tensor:
    """[B, past + L] bool: tokens that are not the batch's padding."""
    ones = torch.ones(shape[0], past + shape[1], dtype=torch.bool, device=device)
    return ones if call.real is None or call.real.shape != ones.shape else call.real.to(device)


def _side(host: Host, kwargs: dict[str, Any]) -> Side | None:
    """The text model's deep-stack inputs, by the names the family gives them."""
    if not host.family.side:
        return None
    visual, levels = (kwargs.get(name) for name in host.family.side)
    return None if visual is None or levels is None else Side(visual, levels)


def _images(
    host: Host, call: Call, visual: Tensor, real: Tensor, encoded: Encoded | None
) -> list[Image]:
    if not bool(visual.any()):
        return []
    if call.marked:
        return marked_images(visual, real)
    if encoded is None:
        raise UnsupportedCall(
            "the prompt holds images that were encoded outside this session: pass pixel_values"
            " inside the with block"
        )
    return find_images(visual, real, encoded.pieces, host.family)
