"""Cache settings on tiny models that the contract's default budgets do not reach: own rules, wrappers, merges, variants."""

import weakref

import pytest
import torch
from tiny import build, generate, prompt
from twin import Watched

from effivlm.runtime import generate as stages
from effivlm.runtime.cache import bytes_held, cache_of
from effivlm.runtime.session import Session
from effivlm.setting import SettingError, parse_setting

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_plphp_by_its_own_rule(family):
    """Without a budget: first two layers and the last keep everything, text always stays."""
    model, inputs = build(family), prompt(family, 2)
    with Watched(model, parse_setting("plphp:r=0.3,dr=0.3,alpha=0.99,beta=0.0")) as session:
        generate(model, inputs, 3)
        held = session.accounts[0].kv_per_layer
    full = inputs["input_ids"].shape[1]
    images = [len(image.slots) for image in session.seen.prompt.images]
    assert held[0] == held[1] == held[-1] == full
    assert len(images) == 2 and len(held) > 3
    assert set(held[2:-1]) == {
        full - sum(images) + sum(max(1, int(0.3 * n + 1e-9)) for n in images)
    }


@pytest.mark.parametrize(
    "text",
    [
        "adakv(h2o)@0.3",
        "adakv(snapkv:rows=32,kernel=7,pooling=max)@0.3:floor=0.3",
        "adakv(pyramidkv)@0.3",
        "criticalkv(tova)@0.3",
        "criticalkv(vl_cache)@0.3",
        "layer_adaptive(look_m:merge=none)@0.3:uniform=0.4",
        "vl_cache@0.3:uniform=0.8",
        "look_m@0.3:merge=weighted,modality=true",
        "look_m@0.2:merge=averaged",
        "pyramidkv@0.3:variant=effivlm",
        "vl_cache@0.3:renormalise=false",
        "streaming_llm@0.3:variant=effivlm",
        "snapkv@0.3:rows=32,pooling=max,shared=true",
        "fastv@0.5 + layer_adaptive@0.3",
        "fastv@0.5 + pyramidkv@0.3",
    ],
)
def test_settings_run_and_hold_less(text):
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", 2)
    setting = parse_setting(text)
    assert parse_setting(str(setting)) == setting
    with Session(model, setting) as session:
        logits = generate(model, inputs, 3)[1]
        held = session.accounts[0].kv_per_layer
    assert bool(logits.isfinite().all())
    assert sum(held) < 0.75 * len(held) * inputs["input_ids"].shape[1]


@pytest.mark.parametrize("text", ["adakv(h2o)@0.3", "adakv@0.3", "snapkv@0.3", "plphp@0.4"])
def test_bytes_held_are_those_of_the_tensors(text):
    """Unequal heads are padded per layer: entries times their size, and what the padded tensors take, are both told."""
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", 2)
    with Session(model, text) as session:
        cache = generate(model, inputs, 1)[2]
        account = session.accounts[0]
    stored = [sum(x.untyped_storage().nbytes() for x in layer.stored()) for layer in cache.layers]
    assert account.kv_held_per_layer == tuple(stored) and account.kv_bytes_held == sum(
        stored
    ) == bytes_held(cache)
    one = 2 * cache.layers[0].keys[0, :, 0].numel() * 4
    assert account.kv_bytes_per_layer == tuple(round(n * one) for n in account.kv_per_layer)
    ragged = text.startswith("adakv")
    assert (account.kv_bytes < account.kv_bytes_held) == ragged
    head, *lines = account.lines()
    assert ("held" in head.split()) == ragged and lines[-1].split()[
        -1
    ] == f"{account.kv_bytes_held:,}"
    assert account.as_dict()["kv_bytes_held"] == account.kv_bytes_held


def full_layers_alive(model, inputs, text):
    """Per decoder layer, while it still holds everything: bytes of all layers before it, and how many were ever full at once."""
    full, before, most = [], [], [0]

    def attended(module, args, kwargs, output):
        layers = [
            layer for layer in cache_of(kwargs).layers if layer.keys is not None and len(layer.keys)
        ]
        before.append([layer.bytes_held() for layer in layers])
        full.append(weakref.ref(layers[-1].keys))
        most[0] = max(most[0], sum(ref() is not None for ref in full))

    handles = [
        layer.register_forward_hook(attended, with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        with Session(model, text) as session:  # its hooks run after the ones above
            generate(model, inputs, 1)
    finally:
        for handle in handles:
            handle.remove()
    return before, most[0], session.accounts[0]


def test_layer_local_budgets_compress_each_layer_as_it_finishes():
    """The peak is one full layer and the compressed rest; a budget over all layers needs every layer whole, and so do heads whose counts are read off tensors."""
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", 2)
    layers = len(model.get_decoder().layers)
    for text, local in (
        ("snapkv@0.1", True),
        ("adakv@0.1", False),
        ("pyramidkv@0.1", True),
        ("vl_cache@0.1", False),
    ):
        before, most, account = full_layers_alive(model, inputs, text)
        whole = before[0][0]
        assert (
            whole * account.kv_per_layer[1]
            == account.kv_bytes_per_layer[1] * inputs["input_ids"].shape[1]
        ), text
        for i, held in enumerate(before):
            assert held == (
                [*account.kv_held_per_layer[:i], whole] if local else [whole] * (i + 1)
            ), (text, i)
        assert most == (1 if local else layers), (
            f"{text}: {most} uncompressed layers were alive at once"
        )


@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_in_chunks_is_refused(images):
    """A first chunk must not be compressed as if it were the prompt; a prompt of one chunk, and no session, are fine."""
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl", images, after=20)
    length = inputs["input_ids"].shape[1]
    plain = generate(model, inputs, 2, prefill_chunk_size=8)[1]
    with Session(model, "snapkv@0.3") as session:
        with pytest.raises(NotImplementedError, match=r"prefill_chunk_size=8 .* needs it whole"):
            generate(model, inputs, 2, prefill_chunk_size=8)
        generate(model, inputs, 2, prefill_chunk_size=length)
        assert session.accounts[0].kv_per_layer == (int(0.3 * length),) * session.layers
    torch.testing.assert_close(generate(model, inputs, 2, prefill_chunk_size=8)[1], plain)


def test_unknown_scorer_is_an_error_with_the_known_ones():
    with pytest.raises(
        SettingError, match=r"adakv cannot wrap streaming_llm: expected one of .*h2o"
    ):
        parse_setting("adakv(streaming_llm)@0.3")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_coming_positions_are_those_of_rotation(family):
    """`generate` hands the text model a fourth row of positions (plain text ones): looking ahead must not start there."""
    model, inputs, setting = (
        build(family),
        prompt(family, 2),
        parse_setting("expected_attention@0.4:future=8"),
    )
    with Session(model, setting):
        by_generate = generate(model, inputs, 2)[2]
    with Session(model, setting) as session:
        by_stages = stages.prefill(session, inputs, stages.encode(session, inputs)).cache
    for a, b in zip(by_generate.layers, by_stages.layers, strict=True):
        assert torch.equal(a.index, b.index)
