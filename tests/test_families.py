"""Layouts, groups and resizing of every family, proved against what transformers computes."""

import re

import pytest
import tiny
import torch
from traits import traits

from effivlm import registry
from effivlm.families.loading import config_of, example, family_of, load, shapes
from effivlm.measure.predict import table
from effivlm.runtime.host import host_of, vision_blocks

torch.set_num_threads(1)
FAMILIES = registry.families()
WITH_GRID = [n for n, f in FAMILIES.items() if "no_grid" not in f.traits]
LOST = {"mantis": 1}  # first patches of an image that never become tokens
RESIZABLE = [n for n, f in FAMILIES.items() if f.resize is not None]


def case(name, count=2, model=None, **sizes):
    """Model, inputs, arguments of get_image_features, pieces."""
    model, family = model or tiny.build(name), FAMILIES[name]
    inputs = example(family, model.config, count, **sizes)
    call = host_of(model).image_call(inputs)
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
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.update(x=a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    features(model, call)
    handle.remove()
    return seen["x"]


def of_group(family, config, patch):
    """Group in encoder order of patch number ``patch`` of the flattened encoder input, prefixes not counted."""
    group = family.group(config)
    if isinstance(group, int):
        return patch // group
    return patch // len(group) * (int(group.max()) + 1) + int(group[patch % len(group)])


def check_sources(name, monkeypatch, shrunk=False, **sizes):
    """Nudge every patch; the tokens that change are those whose source is its group (among them, if shrunk afterwards)."""
    model, _, call, pieces = case(name, **sizes)
    family = FAMILIES[name]
    isolate(model, family, monkeypatch)
    source = torch.cat([p.source for p in pieces])
    want, hidden = features(model, call), encoder_input(model, call, monkeypatch)
    prefix, packed = family.prefix(model.config), hidden.ndim == 2
    assert len(source) == len(want)
    total = len(hidden) if packed else hidden.shape[0] * (hidden.shape[1] - prefix)
    block, reached = vision_blocks(model)[0], set()
    for patch in range(total):

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
        assert set(expected) <= set(changed) if shrunk else changed == expected, (
            patch,
            changed,
            expected,
        )
        reached |= set(expected)
    return source, reached


@pytest.mark.parametrize(("rows", "columns"), [(40, 56), (56, 30), (28, 28), (20, 90)])
def test_source_in_mosaics_of_an_image_alone(rows, columns, monkeypatch):
    check_sources("llava_onevision", monkeypatch, count=1, sizes=[(rows, columns)])


def test_source_in_a_mosaic_that_is_shrunk_is_a_patch_it_is_made_of(monkeypatch):
    model = tiny.build.__wrapped__("llava_onevision")
    model.config.vision_aspect_ratio = model.model.config.vision_aspect_ratio = "anyres_max_1"
    source, reached = check_sources(
        "llava_onevision", monkeypatch, shrunk=True, count=1, model=model, sizes=[(56, 56)]
    )
    assert (
        len(source) == 16 + 4 * 5 and len(reached) == 16 + 4 * 4
    )  # 8 x 8 patches became 4 x 4 tokens and newlines


def test_order_in_qwen25_windows_is_not_raster_order():
    _, _, _, pieces = case("qwen2_5_vl")
    assert not torch.equal(pieces[0].source, torch.arange(len(pieces[0].source)))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_mosaic_rows_end_in_newlines(name):
    _, _, _, (piece,) = case(name, 1, sizes=[(40, 56)])
    mosaic = piece.place[piece.unit == 1].view(-1, 9, 2)  # 56 px are 8 patches
    assert mosaic[:, -1].isnan().all() and not mosaic[:, :-1].isnan().any() and len(mosaic) == 6
    assert (piece.source == -1).nonzero()[:, 0].tolist() == [16 + 9 * r + 8 for r in range(6)]
    assert int(piece.source[16]) == 16 + 4  # unpadding took the mosaic's first row


def test_full_blocks_of_qwen25_see_the_whole_image():
    """A patch outside the first window reaches the first window in the blocks named, and in no other."""
    model, _, call, _ = case("qwen2_5_vl", 1)
    blocks = vision_blocks(model)
    full = FAMILIES["qwen2_5_vl"].full_blocks(model.config, len(blocks))
    for i, block in enumerate(blocks):
        seen = []

        def hook(module, args, output, seen=seen):
            seen.append(output)

        def nudge(module, args, kwargs):
            x = args[0].clone()
            x[-1] += torch.linspace(-3, 3, x.shape[-1])
            return (x, *args[1:]), kwargs

        handles = [block.register_forward_hook(hook)]
        features(model, call)
        handles.append(block.register_forward_pre_hook(nudge, with_kwargs=True))
        features(model, call)
        for h in handles:
            h.remove()
        assert (not torch.allclose(seen[0][0], seen[1][0], atol=1e-6)) == (i in full), i


@pytest.mark.parametrize("name", RESIZABLE)
@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1), (5, 4)])
def test_resized_images_have_the_tokens_asked_for(name, grid):
    model, _, call, pieces = case(name)
    before = {k: v.clone() for k, v in call.items()}
    small = FAMILIES[name].resize(model, call, [grid] * len(pieces))
    new = FAMILIES[name].layout(model, small)
    size, lost = grid[0] * grid[1], LOST.get(name, 0)
    assert [len(p.source) for p in new] == [size - lost] * len(pieces)
    assert len(features(model, small)) == (size - lost) * len(pieces)
    assert all(
        torch.equal(call[k], v) for k, v in before.items()
    )  # the caller's tensors are untouched
    sources = [i * size + j for i in range(len(pieces)) for j in range(lost, size)]
    assert sorted(torch.cat([p.source for p in new]).tolist()) == sources


@pytest.mark.parametrize("name", RESIZABLE)
def test_a_constant_image_stays_constant(name):
    model, _, call, pieces = case(name)
    flat = {**call, "pixel_values": torch.full_like(call["pixel_values"], 0.7)}
    small = FAMILIES[name].resize(model, flat, [(2, 3)] * len(pieces))
    torch.testing.assert_close(small["pixel_values"], torch.full_like(small["pixel_values"], 0.7))


def _halves(family, model, call, pieces, across):
    """Pixel values of images whose first half of rows (or columns) of tokens is 1 and whose second half is 0."""
    merge = getattr(model.config.vision_config, "spatial_merge_size", None)
    pixels = torch.zeros_like(call["pixel_values"])
    if merge is None:
        half = pixels.shape[-2 + across] // 2
        pixels.narrow(-2 + across, 0, half).fill_(1)
        return pixels
    first = 0
    for piece in pieces:
        n, side = len(piece.source), int(piece.place[:, across].max()) + 1
        inside = (piece.place[:, across] < side / 2).repeat_interleave(merge**2)
        pixels[first : first + n * merge**2][inside] = 1
        first += n * merge**2
    return pixels


@pytest.mark.parametrize("name", RESIZABLE)
@pytest.mark.parametrize("across", [0, 1])
def test_resizing_keeps_up_up_and_left_left(name, across):
    family = FAMILIES[name]
    square = {"grids": [[1, 8, 8]] * 2} if family.packed else {}
    square |= {"sizes": [(56, 56)] * 2} if family.rows else {}  # padding has no halves
    model, _, call, pieces = case(name, **square)
    small = family.resize(
        model,
        {**call, "pixel_values": _halves(family, model, call, pieces, across)},
        [(2, 2)] * len(pieces),
    )
    shape = family.layout(model, small)
    want = _halves(family, model, small, shape, across)
    assert (
        float((small["pixel_values"] - want).abs().mean()) < 0.06
    )  # only the edge between the halves is soft


def test_tiles_of_one_call_share_a_size():
    model, _, call, _ = case("llava")
    with pytest.raises(NotImplementedError, match="one size"):
        FAMILIES["llava"].resize(model, call, [(2, 2), (3, 3)])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_may_end_with_an_image(name):
    model = tiny.build(name)
    inputs = tiny.prompt(name, images=2, image_last=True)
    assert int(inputs["input_ids"][0, -1]) == model.config.image_token_id
    assert tiny.generate(model, inputs, 2)[0].shape == (1, 2)


@pytest.mark.parametrize("name", sorted(shapes()))
def test_published_shapes_have_the_published_size(name):
    loaded = load(name, device="meta", random_weights=True)
    assert sum(p.numel() for p in loaded.model.parameters()) == shapes()[name][1].parameters
    assert loaded.processor is None and loaded.name == name


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llava-1.5-7b", 576),
        ("llava-next-7b", 576 + 48 * 49),
        ("llava-onevision-7b", 729 + 54 * 55),
        ("qwen2-vl-7b", 576),
        ("qwen2.5-vl-7b", 576),
        ("internvl3-8b", 1280),
        ("llava-next-13b", 576 + 48 * 49),
        ("mantis-8b", 728),  # of 27 x 27 patches the first is cut
        ("idefics2-8b", 5 * 64),
        ("idefics3-8b", 13 * 169),
        ("smolvlm2-2.2b", 13 * 81),
        ("gemma3-4b", 256),
        ("qwen3-vl-8b", 576),
        ("qwen3-vl-30b-a3b", 576),
        ("glm-4.1v-9b", 576),
        ("paligemma-3b-224", 256),
        ("mistral-small-3.1-24b", 37 * 55),
    ],
)
def test_example_images_have_the_published_token_count(name, tokens):
    family, shape = shapes()[name]
    inputs = example(family, config_of(family, shape), 1, before=20, after=30, **shape.image)
    config = config_of(family, shape)
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == tokens
    assert int(inputs["input_ids"].max()) < config.text_config.vocab_size


@pytest.mark.parametrize("name", sorted(shapes()))
def test_every_published_shape_can_be_predicted(name):
    """Half of the visual tokens save time, or where weights bound the time, cache."""
    _, plain, half = table(name, ["divprune@0.5"], "h100-sxm", "uniprunebench")
    held = [int(re.search(r"KV (\d+) MiB", line)[1]) for line in (plain, half)]
    assert "divprune@0.5, batch 1: TTFT" in half and held[1] < 0.65 * held[0]


VICUNA = {
    "grouped heads": "one key/value head a query head; grouped heads are the harder case",
}
NEXT = {**VICUNA, **dict.fromkeys(("text model", "norms"), "tiny is the Mistral checkpoint")}
POOLED = {"patches a token": "2 x 2 instead of 4 x 4 patches: the same pooling, fewer pixels"}
UNTIED = {"tied head": "the smaller checkpoint of the family ties its head"}
DIFFERENCES = {  # of a published shape from its family's tiny configuration, and why it may be
    "llava-1.5-7b": VICUNA,
    "llava-1.5-13b": VICUNA,
    "llava-next-7b": NEXT,
    "llava-next-13b": NEXT,
    "gemma3-4b": {**POOLED, "width of heads": "the 12B's are wider than its hidden state"},
    "gemma3-12b": POOLED,
    "smolvlm2-2.2b": VICUNA,
    "llava-onevision-7b": UNTIED,
    "qwen2-vl-7b": UNTIED,
    "qwen2.5-vl-7b": UNTIED,
    "qwen3-vl-8b": {**UNTIED, "width of heads": "the 4B's are wider than its hidden state"},
    "glm-4.1v-9b": {
        "width of heads": "those of the experts' model are wider than its hidden state"
    },
    "internvl3.5-8b": {
        **dict.fromkeys(("text model", "norms", "biases"), "Qwen3: the keys' norms are Qwen3-VL's")
    },
    "internvl2.5-38b": {
        "encoder norms": "the 6B encoder's RMS norms: tiny is the 300M one, of most checkpoints",
        "encoder biases": "the 6B encoder has none before its attention",
    },
}


@pytest.mark.parametrize("name", sorted(shapes()))
def test_tiny_configurations_have_the_published_traits(name):
    """Every difference is a decision with a reason, and every decision still differs."""
    family, shape = shapes()[name]
    tiny_ones, published = (traits(family, c) for c in (family.tiny(), config_of(family, shape)))
    found = {k: (tiny_ones[k], published[k]) for k in published if tiny_ones[k] != published[k]}
    assert set(found) == set(DIFFERENCES.get(name, ())), found


def test_every_family_has_a_published_shape_and_every_difference_is_of_one():
    assert all(f.shapes for f in FAMILIES.values())
    assert set(DIFFERENCES) <= set(shapes())


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_are_shorter_than_the_contracts_prompts(name):
    host = host_of(tiny.build(name))
    windows = [w for w in host.windows if w is not None]
    assert all(w < tiny.prompt(name)["input_ids"].shape[1] for w in windows)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_of_a_model(name):
    model = tiny.build(name)
    assert model.config.model_type in family_of(model).model_types


@pytest.mark.parametrize(
    ("name", "tower", "strategy"),
    [
        ("llava", "clip_vision_model", "full"),
        ("llava_next", "siglip_vision_model", "default"),  # its packer counts whole tiles
        ("llava", "pixtral", "full"),
    ],
)
def test_encoders_of_another_layout_are_refused(name, tower, strategy):
    config = FAMILIES[name].tiny()
    config.vision_config.model_type, config.vision_feature_select_strategy = tower, strategy
    with pytest.raises(NotImplementedError, match=tower):
        FAMILIES[name].prefix(config)


def test_an_image_whose_only_patch_is_cut_is_refused():
    model, _, call, pieces = case("mantis")
    with pytest.raises(NotImplementedError, match="at least two"):
        FAMILIES["mantis"].resize(model, call, [(1, 1)] * len(pieces))
