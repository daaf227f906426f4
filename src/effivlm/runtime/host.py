"""What a session knows about a model, read once: only here is it walked or its config read."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effivlm.errors import EffivlmError
from effivlm.families.base import Family
from effivlm.families.loading import family_of


class UnsupportedCall(EffivlmError, NotImplementedError):
    """A model, an attention back end or a call that compression cannot follow; the message says
    why.
    """


@dataclass(frozen=True)
class Host:
    """Facts of one model.

    Attributes:
        model: the model that generates, out of its wrappers.
        base: what holds `get_image_features`. text: the language model. layers: its decoder layers.
        blocks: the vision encoder's blocks. encoder: the vision encoder.
        family: the family that serves it.
        windows: per decoder layer, its sliding window in tokens, or None.
        heads: query heads of the language model.
        compiled: modules that run a compiled call in the place of their own.
        attentions: names of every attention back end in the model.
    """

    model: Any
    base: Any
    text: Any
    layers: tuple[nn.Module, ...]
    encoder: nn.Module
    blocks: nn.ModuleList
    family: Family
    windows: tuple[int | None, ...]
    heads: int
    compiled: tuple[nn.Module, ...]
    attentions: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every decoder layer, such as ``sliding_attention``; empty where all are alike."""
        return tuple(getattr(self.text.config, "layer_types", None) or ())

    @property
    def attention(self) -> str:
        """Name of the language model's attention back end."""
        return str(self.text.config._attn_implementation)

    def caches(self, use_cache: bool | None) -> bool:
        """Whether a call keeps a cache; None stands for the model's default."""
        return bool(
            getattr(self.text.config, "use_cache", True) if use_cache is None else use_cache
        )

    @property
    def encodes_apart(self) -> bool:
        """Whether the model takes images that were encoded before (transformers 5.18 and later)."""
        return "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters

    def image_call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `get_image_features` among a model's inputs, as `generate` picks."""
        names = inspect.signature(self.base.get_image_features).parameters
        return {k: v for k, v in inputs.items() if k in names and k != "kwargs"}


def host_of(model: nn.Module) -> Host:
    """The facts of a model, whatever it is wrapped in (PEFT, `torch.compile`, data parallel).

    Raises:
        LoadError: if no family serves it. UnsupportedCall: for an attention back end that cannot be
            followed.
    """
    if not isinstance(model, nn.Module):
        inside = ": give its .model" if hasattr(model, "model") else ""
        raise UnsupportedCall(
            f"expected a transformers model, got a {type(model).__name__}{inside}"
        )
    inner: Any = unwrapped_model(model)
    family = family_of(inner)
    text = inner.get_decoder()
    if text.config._attn_implementation == "flex_attention":
        raise UnsupportedCall(
            "flex_attention takes block masks, which cannot follow tokens that are dropped: load"
            " the model with attn='sdpa', 'eager' or 'flash_attention_2'"
        )
    return Host(
        model=inner,
        base=inner.base_model,
        text=text,
        layers=tuple(text.layers),
        encoder=inner.get_encoder(modality="image"),
        blocks=vision_blocks(inner),
        family=family,
        windows=windows_of(text.config, len(text.layers)),
        heads=text.config.num_attention_heads,
        compiled=tuple(_compiled(model)),
        attentions=_attentions(inner),
    )


def _attentions(model: nn.Module) -> tuple[str, ...]:
    configs = (getattr(m, "config", None) for m in model.modules())
    names = {getattr(c, "_attn_implementation", None) for c in configs}
    return tuple(sorted(name for name in names if name is not None))


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers that pass their calls on; adapters stay where they are."""
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def _inside(model: Any) -> nn.Module | None:
    """What a wrapper holds: torch.compile, (distributed) data parallel, PEFT."""
    if "_orig_mod" in model._modules:
        return model._orig_mod
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        devices = model.device_ids or ()
        if len(devices) > 1:
            raise UnsupportedCall(
                f"{type(model).__name__} over {len(devices)} devices runs copies of the"
                " model that a session cannot follow: give one process a device"
            )
        return model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else None


def _compiled(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if (
            "_orig_mod" in module._modules
            or getattr(module, "_compiled_call_impl", None) is not None
        ):
            yield module


def windows_of(config: Any, layers: int) -> tuple[int | None, ...]:
    """Per decoder layer its sliding window in tokens, or None."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])


def vision_blocks(model: Any) -> nn.ModuleList:
    """The encoder's blocks: the first ModuleList below the image encoder (so in every family)."""
    encoder = model.get_encoder(modality="image")
    return next(m for m in encoder.modules() if isinstance(m, nn.ModuleList))


def placeholders(host: Host, call: Mapping[str, Any], prompt: bool) -> torch.Tensor:
    """[B, L] bool: image placeholders, from ids, or from embeddings equal to the placeholder's.

    Args:
        host: the model.
        call: arguments of its base model.
        prompt: the ids are a prompt; generated ids may hold any token.

    Raises:
        UnsupportedCall: for video placeholders in a prompt.
    """
    config, ids = host.model.config, call.get("input_ids")
    if ids is not None:
        video = getattr(config, "video_token_id", None)
        if prompt and video is not None and bool((ids == video).any()):
            raise UnsupportedCall(
                "video placeholders in the prompt: only images are supported; pass frames as images"
            )
        return ids == config.image_token_id
    embeds = call["inputs_embeds"]
    embed: Callable[..., torch.Tensor] = host.model.get_input_embeddings()
    return (embeds == embed(torch.tensor(config.image_token_id, device=embeds.device))).all(-1)
