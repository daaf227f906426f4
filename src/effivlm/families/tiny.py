"""Tiny models with random weights, one per family, and prompts for them: what the contract is
checked on.
"""

import functools
from typing import Any

import torch
from torch import nn

from effivlm import registry
from effivlm.families.base import Family
from effivlm.families.loading import collate, example

FAMILIES = sorted(registry.families())


def randomise(model: nn.Module, seed: int) -> None:
    """Default initialisation gives flat attention; spread the weights so that dropping a token
    matters.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        r = torch.randn(p.shape, generator=g, dtype=torch.float64)
        if p.ndim >= 2:
            inputs = p.shape[-1] if "experts" in name else p[0].numel()
            r *= 1.3 / max(inputs, 1) ** 0.5
        elif ("norm" in name and name.endswith("weight")) or "lambda" in name:
            r = r * 0.2 + float(bool(p.any()))  # norms that start from zero add one themselves
        else:
            r *= 0.2
        p.data.copy_(r)


@functools.cache
def build(
    family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A family's tiny model; the same one for the same arguments."""
    return _built(_config(registry.families()[family]), attn, dtype, seed)


@functools.cache
def deep(family: str, layers: int) -> Any:
    """A family's tiny model with so many decoder layers, all of full attention."""
    config = _config(registry.families()[family])
    text = config.get_text_config()
    text.num_hidden_layers = text.max_window_layers = layers
    text.layer_types = ["full_attention"] * layers
    return _built(config, "sdpa", torch.float32, 0)


def _built(config: Any, attn: str, dtype: torch.dtype, seed: int) -> Any:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config._attn_implementation = attn
    config._experts_implementation = "eager"  # the others take no float64
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, seed)
    model = model.to(dtype).requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if getattr(model.generation_config, "cache_implementation", None):
        model.generation_config.cache_implementation = None
    return model


def prompt(family: str, images: int = 2, **sizes: Any) -> dict[str, torch.Tensor]:
    """A prompt of noise images between random text; arguments as of `families.loading.example`."""
    f = registry.families()[family]
    return example(f, _config(f), images=images, **sizes)


def exact(family: str, attn: str = "sdpa") -> Any:
    """The tiny model in float64: discrete choices must not hang on the last bit of a product, which
    differs from processor to processor.
    """
    return build(family, attn, torch.float64)


def double(family: str, images: int = 2, **sizes: Any) -> dict[str, torch.Tensor]:
    """`prompt` with its pixels in float64."""
    given = prompt(family, images, **sizes)
    return {k: x.double() if x.is_floating_point() else x for k, x in given.items()}


def batch(family: str, *prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Several prompts as one left-padded batch."""
    return collate(prompts)


def _config(family: Family) -> Any:
    assert family.tiny is not None
    return family.tiny()
