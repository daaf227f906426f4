"""Layouts, groups and resizing of every family, proved against what transformers computes."""

import pytest
import tiny
import torch

from effivlm import registry
from effivlm.families.base import raster
from effivlm.families.loading import config_of, example, family_of, load, shapes
from effivlm.runtime.encoder import call_of, vision_blocks

torch.set_num_threads(1)
FAMILIES = registry.families()
WITH_GRID = [n for n, f in FAMILIES.items() if "no_grid" not in f.traits]
RESIZABLE = [n for n, f in FAMILIES.items() if f.resize is not None]
PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_350_839_296,
    "llava-next-7b": 7_063_431_168,
    "llava-onevision-0.5b": 893_618_208,
    "llava-onevision-7b": 8_030_807_584,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "internvl3-1b": 938_158_976,
    "internvl3-8b": 7_944_373_760,
    "internvl2.5-38b": 38_388_164_992,
}


def case(name, count=2, **sizes):
    """Model, arguments of get_image_features, pieces."""
    model, family = tiny.build(name), FAMILIES[name]
    inputs = example(family, model.config, count, **sizes)
    call = call_of(inputs, model.base_model.get_image_features)
    return model, inputs, call, family.layout(model, call)


def features(model, call):
    """[tokens, D] in placeholder order."""
    with torch.no_grad():
        out = model.base_model.get_image_features(**call).pooler_output
    return out.flatten(0, -2) if isinstance(out, torch.Tensor) else torch.cat(tuple(out))


def isolate(model, family, monkeypatch):
    """Switch the encoder blocks off: a token then depends on its own patches only."""
    for block in vision_blocks(model):
        monkeypatch.setattr(block, "forward", lambda hidden_states, *a, **k: hidden_states)


def encoder_input(model, call, monkeypatch):
    """What enters the first encoder block."""
    seen = {}
    block = vision_blocks(model)[0]
    handle = block.register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True)
    features(model, call)
    handle.remove()
    return seen["x"]


def of_group(family, config, patch):
    """Group in encoder order of patch number ``patch`` of the flattened encoder input, prefixes not counted."""
    group = family.group(config)
    if isinstance(group, int):
        return patch // group
    return patch // len(group) * (int(group.max()) + 1) + int(group[patch % len(group)])


def same_tokens(changed, source, family, shrunk):
    """Where a mosaic is shrunk after the encoder a patch reaches its neighbours too: the token itself must be among them."""
    return set(source) <= set(changed) if shrunk else changed == source


def check_sources(name, monkeypatch, stride=1, shrunk=False, **sizes):
    model, _, call, pieces = case(name, **sizes)
    family = FAMILIES[name]
    isolate(model, family, monkeypatch)
    source = torch.cat([p.source for p in pieces])
    want, hidden = features(model, call), encoder_input(model, call, monkeypatch)
    prefix, packed = family.prefix(model.config), hidden.ndim == 2
    assert len(source) == len(want)
    total = len(hidden) if packed else hidden.shape[0] * (hidden.shape[1] - prefix)
    block, reached = vision_blocks(model)[0], set()
    for patch in range(0, total, stride):

        def nudge(module, args, kwargs, patch=patch):
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            if packed:
                x[patch] += torch.linspace(-3, 3, x.shape[-1])
            else:
                per = x.shape[1] - prefix
                x[patch // per, prefix + patch % per] += torch.linspace(-3, 3, x.shape[-1])
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        handle = block.register_forward_pre_hook(nudge, with_kwargs=True)
        changed = ((features(model, call) - want).abs().amax(1) > 1e-6).nonzero()[:, 0].tolist()
        handle.remove()
        expected = (source == of_group(family, model.config, patch)).nonzero()[:, 0].tolist()
        assert same_tokens(changed, expected, family, shrunk), (patch, changed, expected)
        reached |= set(expected)
    return source, reached


@pytest.mark.parametrize("name", WITH_GRID)
def test_source_is_the_group_a_token_is_made_of(name, monkeypatch):
    source, reached = check_sources(name, monkeypatch, count=3)
    assert reached == set((source >= 0).nonzero()[:, 0].tolist())  # every placeholder but newlines was reached
