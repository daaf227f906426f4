"""What the runtime promises beyond the contract: restoration, re-entry, statistics, faults that must be caught."""

import inspect

import pytest
import torch
import twin
from tiny import EACH, batch, build, generate, prompt
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effivlm.methods.base import Merge, PreLLM, Selection
from effivlm.methods.pre_llm.cdpruner import CDPruner
from effivlm.methods.signals import ColumnSums, TextEmbeds
from effivlm.ops import statistics
from effivlm.runtime import prefill, signals
from effivlm.runtime.audit import AuditError
from effivlm.runtime.cache import CACHE
from effivlm.runtime.session import Session
from effivlm.runtime.support import Unsupported
from effivlm.setting import parse_setting

torch.set_num_threads(1)


def hooks(model):
    modules = list(model.modules())
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return (
        counts,
        sorted(model.base_model.__dict__),
        sorted(model.get_decoder().__dict__),
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
    )


SETTING = "visionzip@0.5 + fastv@0.5 + h2o@0.5"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_everything_is_restored(family):
    model, inputs = build(family), prompt(family)
    generate(model, inputs, 1)  # transformers installs its own output hooks when first run
    before = hooks(model)
    with Session(model, SETTING):
        assert hooks(model) != before
        generate(model, inputs, 2)
    assert hooks(model) == before


def test_everything_is_restored_after_an_exception():
    model, inputs = build("llava"), prompt("llava")
    generate(model, inputs, 1)
    before = hooks(model)
    with pytest.raises(RuntimeError, match="planted"), Session(model, "divprune@0.5") as session:
        session.host.layers[2].register_forward_pre_hook(
            lambda *a: (_ for _ in ()).throw(RuntimeError("planted"))
        )
        generate(model, inputs, 2)
    for handle in list(model.get_decoder().layers[2]._forward_pre_hooks):
        del model.get_decoder().layers[2]._forward_pre_hooks[handle]
    assert hooks(model) == before
    generate(model, inputs, 2)


def test_two_sessions_on_one_model_are_refused_and_reentry_works():
    model, inputs = build("llava"), prompt("llava")
    with Session(model, "uniform@0.5") as first:
        with (
            pytest.raises(RuntimeError, match="already under a compress"),
            Session(model, "uniform@0.5"),
        ):
            pass
        generate(model, inputs, 2)
    with first:
        generate(model, inputs, 2)
    assert first.accounts[0].realised["visual"] == 0.5


def test_two_models_do_not_see_each_other():
    a, b = build("llava"), build("internvl")
    plain = generate(b, prompt("internvl"), 2)[1]
    with Session(a, SETTING), Session(b, "none"):
        generate(a, prompt("llava"), 2)
        assert torch.equal(generate(b, prompt("internvl"), 2)[1], plain)
    with Session(a, SETTING):
        assert torch.equal(generate(b, prompt("internvl"), 2)[1], plain)


@pytest.mark.parametrize("family", EACH)
def test_statistics_equal_the_dense_matrices(family):
    """Column sums gathered by the tap against eager's attention maps of every decoder layer."""
    model, inputs, seen = build(family), prompt(family), {}
    with torch.no_grad():
        maps = build(family, "eager")(**inputs, output_attentions=True).attentions
    original = prefill.score_layer

    def spy(part, caches, counts):
        seen[caches[0].layer] = caches[0][ColumnSums()]
        return original(part, caches, counts)

    prefill.score_layer = spy
    try:
        with Session(model, "h2o@0.5"), torch.no_grad():
            model(**inputs, use_cache=True)
    finally:
        prefill.score_layer = original
    for i, full in enumerate(maps):
        assert (seen[i] - full[0].sum(1)).abs().max() < 2e-4, i


def test_nan_in_dropped_tokens_never_reaches_the_output():
    """Embeddings of dropped tokens are poisoned after selection."""
    model, inputs = build("llava"), prompt("llava")
    with Session(model, "divprune@0.4"):
        want = generate(model, inputs, 4)[1]
    original = prefill.Prefill._cut_before

    def poison(self, kept, kwargs):
        gone = self.prompt.visual.clone()
        for image, offsets in zip(self.prompt.images, kept, strict=True):
            gone[image.row, image.slots[offsets]] = False
        self.prompt.embeds = self.prompt.embeds.masked_fill(gone[..., None], torch.nan)
        original(self, kept, kwargs)

    prefill.Prefill._cut_before = poison
    try:
        with Session(model, "divprune@0.4"):
            assert torch.equal(generate(model, inputs, 4)[1], want)
    finally:
        prefill.Prefill._cut_before = original


def test_nan_in_tokens_dropped_inside_the_llm_never_reaches_the_output(monkeypatch):
    """Hidden states of dropped tokens are poisoned after selection."""
    model, inputs = build("llava"), prompt("llava")
    with Session(model, "fastv@0.4"):
        want = generate(model, inputs, 4)[1]
    poisoned = []

    original = prefill.cut_layer

    def poison(*args):
        hidden, keep = original(*args)
        poisoned.append(int((~keep).sum()))
        return hidden.masked_fill(~keep[..., None], torch.nan), keep

    monkeypatch.setattr(prefill, "cut_layer", poison)
    with Session(model, "fastv@0.4"):
        assert torch.equal(generate(model, inputs, 4)[1], want)
    assert poisoned == [20]


@pytest.mark.parametrize("setting", ["snapkv@0.4", "adakv@0.4", "fastv@0.5 + h2o@0.3"])
def test_nan_in_dropped_cache_entries_never_reaches_the_output(setting, monkeypatch):
    """Dropped entries are poisoned before the layer is narrowed; AdaKV's heads hold unequal counts, padded by some of them."""
    model, inputs = build("qwen2_5_vl"), prompt("qwen2_5_vl")
    with Session(model, setting):
        want = generate(model, inputs, 4)[1]
    original = prefill.apply_choices

    def poison(layer, rows, choices):
        gone = torch.ones_like(layer.keys[..., 0], dtype=torch.bool)
        for row, (held, choice) in enumerate(zip(rows, choices, strict=True)):
            gone[row][:, held.slots] = ~choice.keep
        layer.keys, layer.values = (
            x.masked_fill(gone[..., None], torch.nan) for x in (layer.keys, layer.values)
        )
        original(layer, rows, choices)

    monkeypatch.setattr(prefill, "apply_choices", poison)
    with Session(model, setting):
        assert torch.equal(generate(model, inputs, 4)[1], want)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("family", EACH)
def test_one_and_three_images_equal_the_masked_twin(family, images):
    """Cuts at every stage; the contract's own prompts have two images."""
    model, inputs = build(family), prompt(family, images, seed=3)
    with twin.Watched(model, "random_pre@0.5 + fastv@0.5:layer=1 + h2o@0.5") as session:
        tokens, logits, _ = generate(model, inputs, twin.STEPS)
    prefill, decode = twin.kept_masks(session, model.get_decoder().config.num_attention_heads)
    seen = session.seen.prompt
    assert len(seen.images) >= images  # Idefics 3 counts every tile
    writes = {"deepstack": {session.host.family.side[1]: seen.side.levels}} if seen.side else None
    twin.close(
        logits,
        twin.run(build(family, "eager"), inputs, tokens, prefill, decode, seen.embeds, writes),
    )


# --------------------------------------------------------------------------------------- the audit catches methods
def broken(select):
    class Broken(PreLLM):
        name, paper, exact = "broken", None, True

        def select_image(self, tokens, k):
            return select(tokens, k)

    return Broken()


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda t, k: Selection(torch.arange(k).flip(0)), "not strictly ascending"),
        (
            lambda t, k: Selection(torch.arange(k + 1)),
            "asked to keep 8 of 16 tokens and kept 9",
        ),
        (
            lambda t, k: Selection(torch.arange(k - 1)),
            "asked to keep 8 of 16 tokens and kept 7",
        ),
        (lambda t, k: Selection(torch.arange(k) + 100), "was given 16 tokens"),
        (lambda t, k: Selection(torch.zeros(k, dtype=torch.long)), "not strictly ascending"),
    ],
)
def test_broken_selections_are_errors(select, message):
    import dataclasses

    setting = parse_setting("uniform@0.5")
    part = dataclasses.replace(setting.parts[0], method=broken(select))
    setting = dataclasses.replace(setting, parts=(part,))
    model, inputs = build("llava"), prompt("llava")
    with pytest.raises(AuditError, match=message), Session(model, setting):
        generate(model, inputs, 2)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_merge_before_the_llm_is_written_into_what_enters_it(family):
    """A row made of two, embeddings and deep-stack features alike; the masked twin takes a session's embeddings and cannot see it."""
    import dataclasses

    class Pair(PreLLM):
        name, paper, exact = "pair", None, True

        def select_image(self, tokens, k):
            ends, weight = torch.tensor([0, len(tokens.embeds) - 1]), torch.tensor([0.25, 0.75])
            return Selection(torch.arange(k), Merge(torch.zeros(2).long(), ends, weight))

    setting = parse_setting("uniform@0.5")
    part = dataclasses.replace(setting.parts[0], method=Pair())
    setting = dataclasses.replace(setting, parts=(part,))
    model, inputs = build(family), prompt(family, 1)
    entered = {}

    def see(module, args, kwargs):
        levels = [f.clone() for f in kwargs.get("deepstack_visual_embeds") or ()]
        visual = inputs["input_ids"][0] == model.config.image_token_id
        first = int(visual.nonzero()[0])
        entered[len(entered)] = kwargs["inputs_embeds"][0].clone(), first, int(visual.sum()), levels

    def run():
        handle = model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        handle.remove()

    run()
    with Session(model, setting):
        run()
    (plain, first, n, features), (merged, _, _, levels) = entered[0], entered[1]
    pairs = [(plain[first : first + n], merged[first])]
    pairs += [(f, level[0]) for f, level in zip(features, levels, strict=True)]
    assert len(pairs) == (4 if family == "qwen3_vl" else 1)
    for before, row in pairs:
        torch.testing.assert_close(row, 0.25 * before[0] + 0.75 * before[n - 1])


def test_a_layer_run_twice_with_the_live_cache_is_an_error():
    """The field's double KV write: re-running a layer to read its attention."""
    model, inputs = build("llava"), prompt("llava")
    layer = model.get_decoder().layers[1]
    original = layer.self_attn.forward

    def twice(*args, **kwargs):
        original(*args, **kwargs)
        return original(*args, **kwargs)

    layer.self_attn.forward = twice
    try:
        with (
            pytest.raises(AuditError, match="stored 94 cache entries for 47 tokens"),
            Session(model, "none"),
        ):
            generate(model, inputs, 2)
    finally:
        del layer.self_attn.forward


def test_images_encoded_outside_are_an_error():
    model, inputs = build("llava"), prompt("llava")
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    given = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with (
        pytest.raises(RuntimeError, match="encoded outside this session"),
        Session(model, "uniform@0.5"),
        torch.no_grad(),
    ):
        model(**given, mm_encoder_outputs={"image": features})


def test_images_encoded_outside_are_not_taken_for_others_that_wait():
    """Another picture, encoded inside the session and never fed, is at hand when a foreign one comes."""
    model, inputs, other = build("llava"), prompt("llava"), prompt("llava", seed=5)
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    given = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with (
        pytest.raises(RuntimeError, match="encoded outside this session"),
        Session(model, "uniform@0.5"),
        torch.no_grad(),
    ):
        model.model.get_image_features(pixel_values=other["pixel_values"], return_dict=True)
        model(**given, mm_encoder_outputs={"image": features})


def test_video_is_refused():
    model, inputs = build("qwen2_vl"), prompt("qwen2_vl", 0)
    inputs["input_ids"][0, 4] = model.config.video_token_id
    with pytest.raises(NotImplementedError, match="video"), Session(model, "uniform@0.5"):
        generate(model, inputs, 2)


def test_unsupported_pairs_say_why():
    with pytest.raises(
        Unsupported,
        match="visionzip cannot be used with idefics2: its visual tokens are not patches",
    ):
        Session(build("idefics2"), "visionzip@0.5")


@pytest.mark.parametrize("family", EACH)
def test_beam_search(family):
    model = build(family)
    # transformers 5.17 repeats image by image for beams, so that a prompt of two images is given the first one twice
    images = 2 if "mm_encoder_outputs" in inspect.signature(model.forward).parameters else 1
    inputs = prompt(family, images)
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
        with Session(model, "none"):
            assert torch.equal(
                model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3), want
            )
        with Session(model, "uniform@0.5 + snapkv@0.5") as session:
            model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    assert len({a.realised["visual"] for a in session.accounts}) == 1 and len(session.accounts) == 3


@pytest.mark.parametrize("setting", ["uniform@0.5", "fastv@0.5:layer=1", "h2o@0.4"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_several_tokens_after_compression(family, setting):
    """A chunk of three tokens on a compressed cache equals feeding them one by one; direct forwards need no positions."""
    from effivlm.runtime.cache import fork

    model, inputs, new = build(family), prompt(family), torch.tensor([[11, 12, 13]])
    with Session(model, setting), torch.no_grad():
        cache = getattr(model(**inputs, use_cache=True), CACHE)
        one, forked = [], fork(cache)
        for t in range(3):
            one.append(model(input_ids=new[:, t : t + 1], **{CACHE: forked}).logits)
        three = model(input_ids=new, **{CACHE: cache}).logits
    assert (three - torch.cat(one, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_generation_continues_a_conversation(family):
    model, inputs = build(family), prompt(family)
    with Session(model, "uniform@0.5 + snapkv@0.6"):
        tokens, _, cache = generate(model, inputs, 3)
        ids = torch.cat([inputs["input_ids"], tokens, torch.tensor([[21, 22, 23]])], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            more["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        generate(model, more, 3, **{CACHE: cache})


def test_half_precision_runs_and_scores_in_float32():
    model, inputs = build("llava", dtype=torch.bfloat16), prompt("llava")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with Session(model, SETTING) as session:
        generate(model, inputs, 3)
    assert session.accounts[0].visual_per_layer == (16, 16, 8, 8)


def test_padding_of_a_batch_is_never_counted():
    model = build("llava")
    both = batch("llava", prompt("llava", 3, before=5), prompt("llava", 1))
    with Session(model, "h2o@0.5") as session:
        generate(model, both, 2)
    assert [a.prompt_tokens for a in session.accounts] == [
        int(r.sum()) for r in both["attention_mask"]
    ]
    assert [a.kv_per_layer[0] for a in session.accounts] == [
        int(r.sum()) // 2 for r in both["attention_mask"]
    ]


def test_row_statistics_against_dense():
    """Blocks, GQA and causality of the pure functions against a dense softmax in float64."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 37, 8, generator=g), torch.randn(2, 37, 8, generator=g)
    logits = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2) * 0.3
    dense = logits.masked_fill(torch.ones(37, 37).triu(1).bool(), -torch.inf).softmax(-1)
    assert (statistics.column_sums(q, k, 0.3, block=8) - dense.sum(1)).abs().max() < 1e-5
    rows = torch.tensor([3, 20, 36])
    assert (
        statistics.row_probabilities(q[:, rows], k, rows, 0.3) - dense[:, rows]
    ).abs().max() < 1e-6
    assert (
        statistics.head_max_sums(q[:, rows], k, rows, 0.3) - dense[:, rows].amax(0).sum(0)
    ).abs().max() < 1e-6
    low = [
        (dense[h, rows] < 0.01 * dense[h, rows].amax(-1, keepdim=True))
        & (torch.arange(37) <= rows[:, None])
        for h in range(4)
    ]
    want = torch.tensor([float(x.sum()) for x in low]) / float((rows + 1).sum())
    assert torch.allclose(
        statistics.threshold_share(q[:, rows], k, rows, 0.3, 0.01), want, atol=1e-6
    )


def test_signals_are_registered_once():
    assert len({s.__name__ for s in signals._COMPUTE}) == len(signals._COMPUTE)


def test_the_audit_prints_what_every_layer_held():
    """What the README shows: rows are the accounts' numbers, bytes are those of the tensors."""
    model = build("llava")
    both = batch("llava", prompt("llava", 3, before=5), prompt("llava", 1))
    with Session(
        model, "uniform@0.5 + fastv@0.5 + plphp:r=0.3,dr=0.3,alpha=0.99,beta=0.0"
    ) as session:
        assert "nothing has been generated" in str(session.audit)
        cache = generate(model, both, 1)[2]
    first, second = session.audit
    assert (first, second) == tuple(session.accounts)
    text = str(session.audit).splitlines()
    assert text[0] == f"prompt 1 of 2: {first.prompt_tokens} tokens, 48 of them visual"
    rows = [line.split() for line in text if line.split()[0] not in ("prompt", "layers", "all")]
    shown = [(at, tokens) for at, tokens, *_ in rows]
    assert (
        shown[0] == ("0-1", str(first.tokens_per_layer[0]))
        and first.tokens_per_layer[0] == first.tokens_per_layer[1]
    )
    assert rows[0][2] == "24" and len(rows) > 4, "layers that differ have lines of their own"
    layer = cache.layers[0]
    one = layer.keys.shape[1] * layer.keys.shape[-1] * 2 * layer.keys.element_size()
    assert first.kv_bytes_per_layer == tuple(int(n * one) for n in first.kv_per_layer)
    totals = [line.split() for line in text if line.split()[0] == "all"]
    assert totals == [
        ["all", f"{sum(a.kv_per_layer):g}", f"{a.kv_bytes:,}"] for a in (first, second)
    ]
    assert first.as_dict()["kv_bytes"] == first.kv_bytes


@pytest.mark.parametrize(
    ("family", "unsaid"), [("llava", ()), ("qwen2_vl", (2, 3)), ("internvl", (2, 3))]
)
def test_the_text_of_a_prompt_is_what_it_says(family, unsaid, monkeypatch):
    """Neither placeholders nor padding nor, where the processor writes any, markers around images."""
    seen, plain = [], CDPruner.select_image
    monkeypatch.setattr(
        CDPruner,
        "select_image",
        lambda m, t, k: seen.append(t[TextEmbeds()]) or plain(m, t, k),
    )
    model, one = build(family), prompt(family, 2)
    mark = model.config.image_token_id
    both = batch(family, one, prompt(family, 1, before=9, after=30))
    with torch.no_grad(), Session(model, "cdpruner@0.5"):
        model(**both)
    ids = one["input_ids"][0]
    said = [i for i in ids.tolist() if i != mark and i - mark not in unsaid]
    want = model.get_input_embeddings()(torch.tensor(said))
    assert torch.equal(seen[0], want) and len(seen[-1]) > len(want)


def test_every_beam_keeps_the_tokens_of_its_own_prompt():
    """Two prompts, three beams each: what the encoder left of a row's image, not of another's."""
    model, both = (
        build("llava"),
        batch("llava", prompt("llava", 1, seed=1), prompt("llava", 1, seed=2)),
    )
    with torch.no_grad(), twin.Watched(model, "tome@0.6") as session:
        generate(model, both, 1)
        one, other = session.seen.prompt.kept[0][0].tolist()
        model.generate(**both, max_new_tokens=2, num_beams=3, do_sample=False)
        assert one != other and session.seen.prompt.kept[0][0].tolist() == [one] * 3 + [other] * 3


@pytest.mark.parametrize("setting", ["none", "uniform@0.5", "snapkv@0.4"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_use_cache_left_out_is_the_configuration(family, setting):
    model, inputs = build(family), prompt(family)
    with Session(model, setting), torch.no_grad():
        a, b = (model(**inputs, **how) for how in ({"use_cache": True}, {"use_cache": None}))
        steps = [
            model(input_ids=torch.tensor([[11]]), **{CACHE: getattr(x, CACHE)}).logits
            for x in (a, b)
        ]
    assert torch.equal(a.logits, b.logits) and torch.equal(*steps)
