"""Tiny models with random weights, one per family, and prompts for them."""

import functools

import torch
from transformers import AutoModelForImageTextToText

from effivlm import registry
from effivlm.families.loading import collate, example
from effivlm.runtime.cache import CACHE

FAMILIES = sorted(registry.families())


def randomise(model, seed):
    """Default initialisation gives flat attention; spread the weights so that dropping a token matters."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        r = torch.randn(p.shape, generator=g, dtype=torch.float64)
        if p.ndim >= 2:
            r *= 1.3 / max(p[0].numel(), 1) ** 0.5
        elif ("norm" in name and name.endswith("weight")) or "lambda" in name:
            r = r * 0.2 + (0.0 if type(model).__name__.startswith("Gemma3") and "vision" not in name else 1.0)
        else:
            r *= 0.2
        p.data.copy_(r)


@functools.cache
def build(family, attn="sdpa", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = registry.families()[family].tiny()
    config._attn_implementation = attn
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, seed)
    model = model.to(dtype).requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if getattr(model.generation_config, "cache_implementation", None):
        model.generation_config.cache_implementation = None
    return model


def prompt(family, images=2, **kw):
    f = registry.families()[family]
    return example(f, f.tiny(), images=images, **kw)


def batch(family, *prompts):
    return collate(prompts)


def generate(model, inputs, n=6, **kw):
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **kw)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), getattr(out, CACHE)
