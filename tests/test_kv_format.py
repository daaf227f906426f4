"""The cache in few bits: against loops over every number, step by step, alone, in batches, behind eviction and shared."""

import itertools

import pytest
import torch
from tiny import batch, build, generate

from effivlm.contract.rules import check_shared
from effivlm.contract.twin import whole_softmax
from effivlm.families.tiny import double, exact
from effivlm.ops import groups
from effivlm.runtime.cache import CACHE
from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.packed import PackedLayer, bytes_stored
from effivlm.runtime.session import Session
from effivlm.setting import parse_setting

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_against_a_loop(bits, dtype):
    """Every group: levels between its extremes, read back as the nearest level; within half a step."""
    x = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(bits)).to(dtype)
    for dim in (1, 2):
        codes = groups.encode(x, bits, dim)
        back = groups.decode(codes, bits, dtype)
        assert codes.packed.shape[-1] == 16 * bits // 8 and codes.packed.dtype == torch.uint8
        for group, got in zip(
            x.movedim(dim, -1).flatten(0, 1), back.movedim(dim, -1).flatten(0, 1)
        ):
            low, high = float(group.min()), float(group.max())
            step = float(torch.tensor((high - low) / (2**bits - 1)).to(dtype))
            for value, read in zip(group.tolist(), got.tolist()):
                code = min(2**bits - 1, max(0, round((value - low) / step)))
                slack = step * 2**-6 if dtype == torch.bfloat16 else 1e-5
                assert abs(read - (low + code * step)) <= 4 * slack + abs(high) * 2**-7 * (
                    dtype == torch.bfloat16
                )
                assert abs(read - value) <= step / 2 + 4 * slack + 2**-7 * abs(value) * (
                    dtype == torch.bfloat16
                )


def test_equal_members_and_members_that_do_not_count():
    same = torch.full((1, 4, 8), 3.5)
    assert torch.equal(groups.decode(groups.encode(same, 2, 1), 2, torch.float32), same)
    x = torch.arange(32.0).view(1, 4, 8)
    counts = torch.tensor([False, True, True, True])[None, :, None]
    wild = torch.where(counts, x, 1e9)
    a, b = (groups.encode(t, 4, 1, counts) for t in (x, wild))
    assert torch.equal(a.scale, b.scale) and torch.equal(a.packed[:, 1:], b.packed[:, 1:])
    nothing = groups.encode(wild, 4, 1, counts & False)
    assert not groups.decode(nothing, 4, torch.float32).any()


# ---------------------------------------------------------------------------------------------------------- whole runs
def rounded(x, dim, bits):
    """One group along ``dim`` by the definition."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return torch.where(step == 0, low, low + ((x - low) / step).round() * step)


def naive(keys, values, length, form):
    """[KV, S, d] of the exact history -> what is read, group by group, counted from the end of the prompt."""
    keys, values = keys.clone(), values.clone()
    _, held, width = keys.shape
    end = max(0, length - form.residual + (held - length) // form.group * form.group)
    start = length - form.residual
    edges = [max(0, e) for e in range(start % form.group - form.group, end + 1, form.group)]
    for a, b in itertools.pairwise(edges):
        if a < b:
            keys[:, a:b] = rounded(keys[:, a:b], 1, form.bits)
    part = min(form.group, width)
    for c in range(0, width, part):
        old = values[:, : edges[-1], c : c + part]
        values[:, : edges[-1], c : c + part] = rounded(old, 2, form.bits)
    return keys, values


def stepwise(family, inputs, form, steps):
    """Greedy tokens and logits of the plain model whose cache is replaced, before every step, by what `naive` reads."""
    model, logits, tokens = exact(family, "eager"), [], []
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), whole_softmax():
        out = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cache, token = getattr(out, CACHE), out.sequences[:, -1:]
        logits.append(out.logits[0])
        history = [(x.keys[0], x.values[0]) for x in cache.layers]
        position = (
            int(model.model.rope_deltas)
            if getattr(model.model, "rope_deltas", None) is not None
            else 0
        )
        for step in range(steps - 1):
            tokens.append(int(token))
            for layer, (k, v) in zip(cache.layers, history, strict=True):
                k, v = naive(k, v, length, form)
                layer.keys, layer.values = k[None], v[None]
            at = torch.tensor([[length + step + position]])
            at = at.expand(3, 1, 1) if hasattr(model.model, "get_rope_index") else at
            out = model(input_ids=token, position_ids=at, use_cache=True, **{CACHE: cache})
            history = [
                (torch.cat([k, x.keys[0, :, -1:]], 1), torch.cat([v, x.values[0, :, -1:]], 1))
                for x, (k, v) in zip(cache.layers, history, strict=True)
            ]
            logits.append(out.logits[:, -1])
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize(
    "text",
    ["kv_int4:group=8,residual=5", "kv_int2:group=4,residual=0", "kv_int8:group=8,residual=500"],
)
def test_every_step_reads_what_a_loop_would_store(family, text):
    """Groups of the prompt, groups that fill up while answering, a residual longer than the prompt."""
    setting, inputs = parse_setting(text), double(family, 1)
    with Session(exact(family), setting):
        logits = generate(exact(family), inputs, 11)[1]
    want = stepwise(family, inputs, setting.parts[0].method.format, 11)
    torch.testing.assert_close(logits, want.float(), atol=1e-6, rtol=1e-6)
    plain = generate(exact(family), inputs, 11)[1]
    assert (plain - logits).abs().max() > 1e-6 or "residual=500" in text
    assert torch.equal(plain[:, 0], logits[:, 0])  # nothing is rounded before the prompt is over


@pytest.mark.parametrize(
    "text",
    ["kv_int4", "kv_int2:group=8,residual=3", "kv_fp8", "adakv@0.6 + kv_int4:group=8,residual=4"],
)
def test_a_row_of_a_batch_is_stored_as_alone(text):
    one, other = double("llava", 3, seed=5, before=4, after=3), double("llava", 1)
    model, alone = exact("llava"), []
    for inputs in (one, other):
        with Session(model, text) as session:
            alone.append((generate(model, inputs, 12)[1], session.accounts[0]))
    with Session(model, text) as session:
        both = generate(model, batch("llava", one, other), 12)[1]
    for i, (logits, account) in enumerate(alone):
        torch.testing.assert_close(both[i : i + 1], logits, atol=1e-6, rtol=0)
        assert session.accounts[i] == account


@pytest.mark.parametrize("text", ["kv_int4:group=4,residual=3", "adakv@0.5 + kv_fp8"])
def test_rows_move_with_their_codes(text):
    """Beams, repeated and chosen rows: what is read afterwards is what was read, row by row."""
    model, inputs = exact("llava"), batch("llava", double("llava", 3, seed=5), double("llava", 1))
    for move, rows in (
        ("reorder_cache", [1, 0]),
        ("batch_select_indices", [1]),
        ("batch_repeat_interleave", [0, 0, 1, 1]),
    ):
        with Session(model, text):
            cache = generate(model, inputs, 9)[2]
            for layer in cache.layers:
                before, live = [x[rows].clone() for x in layer.stored()], layer.live[rows]
                given = 2 if move == "batch_repeat_interleave" else torch.tensor(rows)
                getattr(layer, move)(given)
                assert all(torch.equal(a, b) for a, b in zip(before, layer.stored(), strict=True))
                assert torch.equal(layer.live, live)
                new = before[0][..., -1:, :]
                grown = layer.update(new, new)[0]
                assert grown.shape[2] == before[0].shape[2] + 1


def test_shared_is_separate_for_formats():
    texts = [
        "none",
        "kv_int4:group=8,residual=4",
        "kv_int2:group=8,residual=4",
        "snapkv@0.4",
        "kv_fp8",
    ]
    texts += [
        "snapkv@0.4 + kv_int4:group=8,residual=4",
        "divprune@0.5 + h2o@0.5 + kv_int4:group=8,residual=4",
    ]
    texts += ["adakv@0.3 + kv_int4:group=8,residual=4", "pyramidkv@0.3 + kv_fp8"]
    for family in ("gemma3",):
        check_shared([parse_setting(t) for t in texts], family)


# ------------------------------------------------------------------------------------------------------------- bytes
def test_bytes_are_those_of_the_tensors_and_of_the_arithmetic():
    model, inputs = (
        build("llava"),
        {k: v.float() if v.is_floating_point() else v for k, v in double("llava").items()},
    )
    length = inputs["input_ids"].shape[1]
    plain = 2 * 4 * length
    for text, number in (("kv_int8", 8), ("kv_int4", 4), ("kv_int2", 2), ("kv_fp8", 8)):
        form = parse_setting(text).parts[0].method.format
        with Session(model, text) as session:
            cache = generate(model, inputs, 1)[2]
        account = session.accounts[0]
        assert all(isinstance(x, PackedLayer) for x in cache.layers)
        for layer, size in zip(cache.layers, account.kv_bytes_per_layer, strict=True):
            heads, width = layer.keys.shape[1], layer.keys.shape[-1]
            rounded = max(0, length - form.residual)
            whole = -(-rounded // form.group) * form.group
            want = (length - rounded) * width * 8 + 2 * whole * width * number // 8
            if not form.floats:
                want += (
                    2 * 4 * (whole // form.group * width + whole * width // min(form.group, width))
                )
            assert size == want * heads == layer.bytes_held() < plain * heads * width
            assert bytes_stored(form, length, width, 4) == want


def test_a_fork_does_not_see_another_forks_tokens():
    model, inputs = exact("llava"), double("llava", 1)
    with Session(model, "kv_int4:group=4,residual=2"):
        cache = generate(model, inputs, 1)[2]
    import copy

    layer = cache.layers[0]
    other, before = copy.copy(layer), layer.stored()[0].clone()
    new = torch.randn(1, layer.keys.shape[1], 7, layer.keys.shape[-1], dtype=layer.keys.dtype)
    other.update(new, new)
    assert (
        torch.equal(layer.stored()[0], before) and other.stored()[0].shape[2] == before.shape[2] + 7
    )
    assert torch.equal(other.stored()[0][:, :, : before.shape[2] - 2], before[:, :, :-2])


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv_int4:group=1", "positive multiple of 2"),
        ("kv_int2:group=6", "positive multiple of 4"),
        ("kv_int4:residual=-1", "must not be negative"),
        ("kv_int4 + kv_fp8", "both store the cache"),
        ("kv_int4@0.5", "takes no budget"),
    ],
)
def test_bad_formats(text, words):
    with pytest.raises(ValueError, match=words):
        parse_setting(text)


def test_what_cannot_be_stored_is_refused_by_name():
    model, inputs = (
        build("llava"),
        {k: v.float() if v.is_floating_point() else v for k, v in double("llava", 1).items()},
    )
    with (
        Session(model, "kv_int4:group=6"),
        pytest.raises(UnsupportedCall, match="do not divide heads"),
    ):
        generate(model, inputs, 2)
    with Session(model, "kv_int4"), pytest.raises(UnsupportedCall, match="use_cache"):
        generate(model, inputs, 2, use_cache=False)
    with Session(model, "kv_int4"), pytest.raises(UnsupportedCall, match="prompt_lookup"):
        generate(model, inputs, 2, prompt_lookup_num_tokens=2)
    assert generate(model, inputs, 2)[0].shape == (1, 2)


def test_prediction_counts_the_bytes_that_are_stored():
    """What `predict` says of a cache in few bits is what the audit counts."""
    from effivlm.measure.predict import Predictor
    from effivlm.registry import families

    model, inputs = (
        build("llava"),
        {k: v.float() if v.is_floating_point() else v for k, v in double("llava").items()},
    )
    predictor = Predictor(model, families()["llava"], inputs, 4, 4)
    for text in ("none", "kv_int4:group=8,residual=4", "snapkv@0.5 + kv_fp8"):
        setting = parse_setting(text)
        with Session(model, setting) as session:
            generate(model, inputs, 1)
        counts = predictor.counts(setting)
        assert predictor._stored(counts) == session.accounts[0].kv_bytes
        work = predictor.works(counts)["decode_per_token"]
        entry = predictor.text.kv_entry(4)
        grown = predictor.text.layers * 2 * entry
        assert work.bytes == predictor.text.weights * 4 + session.accounts[0].kv_bytes + grown
