"""Every caller's path: right, or one clear error. The masked twin, or plain transformers, driven through the same call is the truth."""

import copy
import pickle
import threading

import pytest
import torch
from paths import CACHELESS, PAIRS, STAGES, under
from tiny import EACH, batch, generate
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twin import STEPS, Watched, close, kept_masks, run

from effivlm import compress, registry
from effivlm.families.loading import example
from effivlm.families.tiny import double, exact, randomise
from effivlm.methods.base import Weights
from effivlm.runtime.cache import CACHE
from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.support import Unsupported

torch.set_num_threads(1)


def loop(model, inputs, first=None, steps=3, **kwargs):
    """Logits of a forward call by hand and of a few tokens fed one by one to the cache it returns."""
    out = model(**inputs, **kwargs) if first is None else first
    logits = [out.logits[:, -1:]]
    for t in range(steps):
        token = torch.full((len(inputs["input_ids"]), 1), 11 + t)
        out = model(input_ids=token, **{CACHE: getattr(out, CACHE)})
        logits.append(out.logits)
    return torch.cat(logits, 1)


def supported(family, setting, model=None):
    """A closed session, or a skip with the reason."""
    try:
        return compress(exact(family) if model is None else model, setting)
    except Unsupported as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------ calls by hand
@pytest.mark.parametrize(("family", "setting"), PAIRS)
def test_a_forward_call_and_a_loop_by_hand(family, setting):
    got, want = under(family, setting, loop)
    close(got, want)


@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("setting", CACHELESS)
def test_a_forward_call_without_a_cache(family, setting):
    """The same logits as with one."""
    model, inputs = exact(family), double(family)
    with supported(family, setting), torch.no_grad():
        close(model(**inputs, use_cache=False).logits, model(**inputs, use_cache=True).logits)


@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("setting", CACHELESS)
def test_generating_without_a_cache(family, setting):
    """Every step is a prompt of its own; the first one's choices hold for all."""
    model, inputs = exact(family), double(family)
    with supported(family, setting) as session:
        want = generate(model, inputs, 4)
        got = generate(model, inputs, 4, use_cache=False)
        assert torch.equal(got[0], want[0])
        close(got[1], want[1])
        assert len({a.visual_per_layer for a in session.accounts}) == 1


@pytest.mark.parametrize("setting", ["snapkv@0.4", "divprune@0.6 + fastv@0.6 + h2o@0.4"])
def test_a_cache_method_without_a_cache_is_refused_by_name(setting):
    model, inputs = exact("llava"), double("llava")
    name = setting.split(" + ")[-1]
    with (
        pytest.raises(UnsupportedCall, match=f"{name} compresses the cache.*use_cache=False"),
        compress(model, setting),
    ):
        generate(model, inputs, 2, use_cache=False)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_rows_and_logits_to_keep_are_those_of_the_callers_indices(family):
    """Every token that survives has the masked twin's logits at its own index."""
    got, want = under(
        family, "divprune@0.5 + fastv@0.6", lambda m, x: m(**x, use_cache=True).logits
    )
    inputs = double(family)
    text = inputs["input_ids"][0] != exact(family).config.image_token_id
    close(got[:, text], want[:, text])
    rows = torch.tensor([0, int(text.nonzero()[-1]), int(text.nonzero()[-2])])
    some, _ = under(
        family,
        "divprune@0.5 + fastv@0.6",
        lambda m, x: m(**x, use_cache=True, logits_to_keep=rows).logits,
    )
    close(some, got[:, rows])


# ------------------------------------------------------------------------------ beams and sequences
@pytest.mark.parametrize(("family", "setting"), PAIRS)
def test_beams_and_returned_sequences_over_a_batch(family, setting):
    one, other = double(family, 1, seed=5, before=4), double(family, 1)
    both = batch(family, one, other)
    asked = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False}

    def drive(model, inputs):
        return model.generate(**inputs, **asked, return_dict_in_generate=True, output_scores=True)

    got, want = under(family, setting, drive, both)
    assert torch.equal(got.sequences, want.sequences)
    close(got.sequences_scores, want.sequences_scores)


# ------------------------------------------------------------------------------------------ windows
WINDOW = 14
WINDOWED = {
    "llava_next": {"sliding_window": WINDOW},
    "idefics2": {"sliding_window": WINDOW},
    "internvl": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen2_vl": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 4,
    },
}


def windowed(family, attn="sdpa"):
    config = registry.families()[family].tiny()
    for key, value in WINDOWED[family].items():
        setattr(config.text_config, key, value)
    config._attn_implementation = attn
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, 0)
    model = model.double().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("setting", [*STAGES, "streaming_llm@0.4", "adakv@0.4", "fitprune@0.5"])
def test_a_window_counts_original_positions(family, setting):
    """Text models that make sliding-window masks themselves, prompts longer than the window; through six decode steps."""
    model, inputs = windowed(family), double(family)
    try:
        with Watched(model, setting) as session:
            tokens, logits, _ = generate(model, inputs, STEPS)
    except Unsupported as error:
        pytest.skip(str(error))
    prefill, decode = kept_masks(session, 4)
    seen = session.seen.prompt
    close(
        logits,
        run(
            windowed(family, "eager"), inputs, tokens, prefill, decode, seen.embeds, session.writes
        ),
    )


def test_column_sums_respect_the_window():
    from effivlm.methods.signals import ColumnSums
    from effivlm.runtime import prefill

    seen, original = {}, prefill.score_layer
    model, inputs = windowed("internvl"), double("internvl")
    with torch.no_grad():
        maps = windowed("internvl", "eager")(**inputs, output_attentions=True).attentions

    def spy(part, caches, counts):
        seen[caches[0].layer] = caches[0][ColumnSums()]
        return original(part, caches, counts)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), compress(model, "h2o@0.5"):
        patch.setattr(prefill, "score_layer", spy)
        model(**inputs, use_cache=True)
    for i, full in enumerate(maps):
        assert (seen[i] - full[0].sum(1)).abs().max() < 1e-4, i


# ----------------------------------------------------------------------- caches in and out of a block
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("setting", [*STAGES, "adakv@0.4", "uniform@0.5:positions=repack"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_a_cache_used_after_its_block(family, setting, new):
    """The logits it gives inside, or a refusal; in another session on the model it goes on."""
    model, inputs, ids = exact(family), double(family), torch.arange(11, 11 + new)[None]
    with torch.no_grad():
        with supported(family, setting):
            cache = getattr(model(**inputs, use_cache=True), CACHE)
            outside, other = copy.deepcopy(cache), copy.deepcopy(cache)
            want = model(input_ids=ids, **{CACHE: cache}).logits
        try:
            close(model(input_ids=ids, **{CACHE: outside}).logits, want)
        except UnsupportedCall as error:
            assert "inside the with block" in str(error)
            assert setting != "none" or family == "gemma3"
        with compress(model, "none"):
            close(model(input_ids=ids, **{CACHE: other}).logits, want)


@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("setting", ["none", "divprune@0.5", "snapkv@0.5"])
def test_a_cache_of_before_continued_inside(family, setting):
    """Text is never cut: the plain model's logits."""
    model, inputs = exact(family), double(family)
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        plain = getattr(model(**inputs, use_cache=True), CACHE)
        inside = copy.deepcopy(plain)
        want = model(input_ids=ids, **{CACHE: plain}).logits
        with supported(family, setting):
            close(model(input_ids=ids, **{CACHE: inside}).logits, want)


# ------------------------------------------------------------------------------- merged embeddings
@pytest.mark.parametrize("setting", ["divprune@0.5", "fastv@0.5:layer=1", "snapkv@0.4"])
@pytest.mark.parametrize("family", ["llava", "mantis", "idefics3"])
def test_merged_embeddings_need_a_mask(family, setting):
    model, inputs = exact(family), double(family)
    seen = {}
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    merged = {"inputs_embeds": seen["embeds"], "attention_mask": inputs["attention_mask"]}
    visual = inputs["input_ids"] == model.config.image_token_id
    with torch.no_grad(), supported(family, setting) as session:
        want = model(**inputs).logits[:, -1]
        asked = [a.visual_per_layer for a in session.accounts]
        with pytest.raises(UnsupportedCall, match=r"mark_visual"):
            model(**merged)
        session.mark_visual(visual)
        got = model(**merged).logits[:, -1]
        assert [a.visual_per_layer for a in session.accounts] == asked
        close(got, want)
        session.mark_visual(torch.zeros_like(visual))
        assert model(**merged) is not None
        assert session.accounts[0].visual_tokens == 0


# ----------------------------------------------------------------------------------------- wrappers
@pytest.mark.parametrize("setting", STAGES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_an_adapter_acts_as_its_merged_weights(family, setting):
    peft = pytest.importorskip("peft")
    inputs, config = double(family), {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(0)
    model = copy.deepcopy(exact(family))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False)).eval()
    merged = copy.deepcopy(wrapped).merge_and_unload().eval()
    with supported(family, setting, merged) as session:
        want, accounts = generate(merged, inputs, 3)[1], session.accounts
    with compress(wrapped, setting) as session:
        close(generate(wrapped, inputs, 3)[1], want)
        assert session.accounts == accounts


@pytest.mark.parametrize("setting", ["none", "divprune@0.5 + snapkv@0.4"])
def test_a_compiled_model(setting):
    """Compiled code does not see hooks that came later: it is put aside inside the block, and comes back."""
    model, inputs = copy.deepcopy(exact("llava")), double("llava")
    with torch.no_grad(), compress(model, setting):
        want = model(**inputs).logits[:, -1]
    whole, calls = torch.compile(model, backend="eager"), []
    with torch.no_grad():
        plain = whole(**inputs).logits
        with compress(whole, setting) as session:
            close(whole(**inputs).logits[:, -1], want)
            assert session.accounts
        assert "forward" in whole.__dict__ and not hasattr(model.base_model, "_effivlm_session")
        close(whole(**inputs).logits, plain)
        model.compile(backend="eager")
        before = model._compiled_call_impl
        with compress(model, setting):
            close(model(**inputs).logits[:, -1], want)
        assert model._compiled_call_impl is before and not calls
    assert "_prefill" not in model.__dict__


@pytest.mark.parametrize("setting", ["none", "divprune@0.5 + snapkv@0.4"])
def test_dispatched_and_data_parallel_models(setting):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = copy.deepcopy(exact("llava")), double("llava")
    with compress(model, setting):
        want = generate(model, inputs, 3)[1]
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(model, hook)
    forward = model.forward
    with compress(model, setting):
        close(generate(model, inputs, 3)[1], want)
    assert model.forward is forward
    parallel = torch.nn.DataParallel(copy.deepcopy(exact("llava")))
    with torch.no_grad(), compress(parallel, setting):
        close(parallel(**inputs).logits[:, -1], want[:, 0])


# ------------------------------------------------------------------------------- scoring an answer
ANSWER = torch.tensor([[21, 22, 23]])


def with_answer(inputs, tokens=ANSWER):
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    grown = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            grown[name] = torch.cat([inputs[name], torch.zeros_like(tokens)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -tokens.shape[1] :] = tokens
    return {**inputs, **grown}, labels


@pytest.mark.parametrize(("family", "setting"), PAIRS)
def test_an_answer_is_scored_under_the_compressed_cache(family, setting):
    """Loss and logits of `labels=` are those of prefill, compression, and the answer's tokens."""
    if (family, setting) == ("paligemma", "none"):
        pytest.skip("without a session its prompt sees the answer too, unless told by token types")
    model, inputs = exact(family), double(family)
    full, labels = with_answer(inputs)
    with torch.no_grad(), supported(family, setting):
        first = model(**inputs, use_cache=True)
        rest = model(input_ids=ANSWER, **{CACHE: getattr(first, CACHE)}).logits
        rows = torch.cat([first.logits[:, -1:], rest[:, :-1]], 1)
        out = model(**full, labels=labels)
    close(out.logits[:, -4:-1], rows)
    want = torch.nn.functional.cross_entropy(rows[0], ANSWER[0])
    close(out.loss, want)


@pytest.mark.parametrize("family", EACH)
def test_labels_before_the_end_of_the_images(family):
    """Labels whose predicting token was dropped are ignored; cache methods say that they cannot tell prompt and answer apart."""
    model, inputs = exact(family), double(family)
    labels = inputs["input_ids"].clone()
    visual = labels == model.config.image_token_id
    labels[visual] = -100

    def drive(model, inputs):
        return model(**inputs, use_cache=True).logits

    _, want = under(family, "uniform@0.5", drive)
    with torch.no_grad(), Watched(model, "uniform@0.5") as session:
        loss = model(**inputs, labels=labels).loss
        dropped = session.seen.prompt.dropped()
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedCall, match="labels must begin after the last image"),
        compress(model, "snapkv@0.4"),
    ):
        model(**inputs, labels=labels)
    masked = labels.clone()
    masked[:, 1:][dropped[:, :-1]] = -100
    want = torch.nn.functional.cross_entropy(want[0, :-1], masked[0, 1:], ignore_index=-100)
    close(loss, want)


# --------------------------------------------------------------------------------- image at the end
@pytest.mark.parametrize(
    "name",
    sorted(n for n, c in registry.methods().items() if n != "none" and not issubclass(c, Weights)),
)
def test_the_row_that_predicts_stays(name):
    """A prompt whose last token is an image's: it is never dropped, and budgets hold all the same."""
    from effivlm.contract.rules import text_of

    for family in ("llava", "qwen2_5_vl", "idefics3"):
        model, inputs = exact(family), double(family, image_last=True)
        try:
            session = Watched(model, text_of(name))
        except Unsupported:
            continue
        with session:
            generate(model, inputs, 2)
            last = inputs["input_ids"].shape[1] - 1
            for layer, (index, _) in session.seen.prompt.kept.items():
                assert int(index[0, -1]) == last, (family, layer)


# ------------------------------------------------------------------- several prompts, several threads
def test_guidance_reports_every_prompt():
    model, inputs = exact("llava"), double("llava")
    with compress(model, "divprune@0.5") as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, guidance_scale=1.5)
    assert [a.visual_tokens > 0 for a in session.accounts] == [True, False]


@pytest.mark.parametrize("setting", STAGES)
def test_two_threads_on_one_model(setting):
    model = exact("llava")
    prompts = [double("llava", 1, seed=1), double("llava", 2, seed=2)]
    with supported("llava", setting) as session:
        want, accounts = [], []
        for inputs in prompts:
            want.append(generate(model, inputs, 4)[1])
            accounts.append(session.accounts)
        found, errors = {}, []

        def work(i):
            try:
                for _ in range(3):
                    found[i] = (generate(model, prompts[i], 4)[1], session.accounts)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors
    for i in range(2):
        close(found[i][0], want[i])
        assert found[i][1] == accounts[i]


def test_sessions_of_two_models_close_in_any_order():
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    a, b = exact("llava"), exact("internvl")
    plain = generate(b, double("internvl"), 2)[1]
    one, other = compress(a, "fastv@0.5"), compress(b, "snapkv@0.5")
    one.__enter__()
    other.__enter__()
    one.__exit__()
    assert not torch.equal(generate(b, double("internvl"), 2)[1], plain)
    other.__exit__()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    assert torch.equal(generate(b, double("internvl"), 2)[1], plain)


@pytest.mark.parametrize("setting", STAGES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_nothing_of_an_interrupted_prompt_reaches_the_next(family, setting):
    model = exact(family)
    text, image = double(family, 0, after=7), double(family, 1, seed=3)
    with supported(family, setting):
        want = [generate(model, x, 2)[1] for x in (text, image)]
        for where in (2, 0):
            layer = model.get_decoder().layers[where]
            handle = layer.register_forward_pre_hook(interrupting)
            with pytest.raises(KeyboardInterrupt):
                generate(model, double(family, 2), 2)
            handle.remove()
            for x, logits in zip((text, image), want, strict=True):
                close(generate(model, x, 2)[1], logits)


def interrupting(*args):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------ other decoding, other caches
@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("setting", ["none", "divprune@0.5", "downsample@0.5", "tome@0.6"])
def test_prompt_lookup_and_assisted_decoding(family, setting):
    """What proposes tokens changes nothing but the speed, where no choice depends on the text."""
    model, inputs = exact(family), double(family)
    with supported(family, setting):
        want = generate(model, inputs, 6)[0]
        got = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2
        )
    assert torch.equal(got[:, -6:], want)


@pytest.mark.parametrize("setting", ["snapkv@0.4", "fastv@0.5", "cdpruner@0.5"])
def test_prompt_lookup_is_refused_where_choices_depend_on_the_text(setting):
    model, inputs = exact("llava"), double("llava")
    with (
        pytest.raises(UnsupportedCall, match=r"prompt_lookup_num_tokens: .*proposed tokens"),
        compress(model, setting),
    ):
        model.generate(**inputs, max_new_tokens=3, prompt_lookup_num_tokens=2)


def test_prompt_lookup_in_the_models_own_configuration_is_refused_too():
    model = copy.deepcopy(exact("llava"))
    model.generation_config.prompt_lookup_num_tokens = 2
    with (
        pytest.raises(UnsupportedCall, match="prompt_lookup_num_tokens"),
        compress(model, "snapkv@0.4"),
    ):
        model.generate(**double("llava"), max_new_tokens=3)


@pytest.mark.parametrize("family", EACH)
def test_a_static_cache(family):
    """Right for `none`, refused by name for what makes layers unequal."""
    model, inputs = exact(family), double(family)
    want = generate(model, inputs, 4)[0]
    with compress(model, "none"):
        assert torch.equal(generate(model, inputs, 4, cache_implementation="static")[0], want)
    with (
        pytest.raises(UnsupportedCall, match=r"StaticCache cannot hold .*uniform@0.5"),
        compress(model, "uniform@0.5"),
    ):
        generate(model, inputs, 2, cache_implementation="static")


# --------------------------------------------------------------------- what cannot be, said clearly
def test_flex_attention_and_a_switch_inside_are_refused():
    flex = exact("llava", "flex_attention")
    with pytest.raises(UnsupportedCall, match="flex_attention takes block masks"):
        compress(flex, "none")
    model = exact("llava")
    with compress(model, "none"), pytest.raises(UnsupportedCall, match="cannot change inside"):
        model.set_attn_implementation("eager")


def test_copies_of_a_model_under_a_session_are_refused():
    model = exact("llava")
    with compress(model, "none"):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="outside the with block"):
                copied(model)


@pytest.mark.parametrize("name", ["get_image_features", "forward"])
def test_a_users_own_patches_come_back(name):
    model = copy.deepcopy(exact("llava"))
    owner, calls = model.base_model, []
    inner = getattr(owner, name)

    def mine(*args, **kwargs):
        calls.append(name)
        return inner(*args, **kwargs)

    mine.__signature__ = __import__("inspect").signature(inner)
    setattr(owner, name, mine)
    with compress(model, "divprune@0.5"):
        generate(model, double("llava"), 2)
        assert calls
    assert owner.__dict__[name] is mine


# ----------------------------------------------------------------------------- images in a later turn
@pytest.mark.parametrize("setting", ["none", "divprune@0.5", "tome@0.6", "uniform@0.5"])
@pytest.mark.parametrize("family", EACH)
def test_images_in_a_later_turn(family, setting):
    """A cached conversation, then a new picture: what the original can do, with the new picture compressed."""
    model, first = exact(family), double(family, 1)
    turn = double(family, 1, seed=9)
    later = {k: v for k, v in turn.items() if k != "attention_mask"}
    length = first["input_ids"].shape[1] + turn["input_ids"].shape[1]
    later["attention_mask"] = torch.ones(1, length, dtype=torch.long)

    def drive(model):
        cache = getattr(model(**first, use_cache=True), CACHE)
        return model(**later, **{CACHE: cache}).logits[:, -1]

    try:
        with torch.no_grad():
            want = drive(model)
    except Exception as error:
        pytest.skip(f"the original cannot: {type(error).__name__}")
    with torch.no_grad(), supported(family, setting) as session:
        got = drive(model)
        (account,) = session.accounts
    if setting == "none":
        close(got, want)
    else:
        assert account.visual_per_layer[0] < account.visual_tokens
    assert account.prompt_tokens == turn["input_ids"].shape[1]
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedCall, match="images in a later turn"),
        compress(model, "snapkv@0.4"),
    ):
        drive(model)


def test_a_later_turn_equals_masking():
    """The dropped tokens of both turns masked in the plain model."""
    family = "internvl"
    model, eager = exact(family), exact(family, "eager")
    first, turn = double(family, 1), double(family, 1, seed=9)
    mask = torch.ones(1, first["input_ids"].shape[1] + turn["input_ids"].shape[1])
    later = {**turn, "attention_mask": mask.long()}
    kept = []
    with torch.no_grad(), compress(model, "divprune@0.5") as session:
        cache = getattr(model(**first, use_cache=True), CACHE)
        kept.append(session.current.prompt.kept[0][0][0])
        got = model(**later, **{CACHE: cache}).logits[:, -1]
        kept.append(session.current.prompt.kept[0][0][0])
    alive = torch.zeros(1, mask.shape[1], dtype=torch.bool)
    alive[0, torch.cat([kept[0], kept[1] + first["input_ids"].shape[1]])] = True

    def hide(module, args, kwargs):
        given = kwargs["attention_mask"]
        seen = alive[:, None, None, : given.shape[-1]].expand_as(given).clone()
        rows = torch.arange(given.shape[-2])
        seen[..., rows, given.shape[-1] - given.shape[-2] + rows] = True
        kwargs["attention_mask"] = given.masked_fill(~seen, torch.finfo(given.dtype).min)
        return args, kwargs

    handles = [
        layer.register_forward_pre_hook(hide, with_kwargs=True)
        for layer in eager.get_decoder().layers
    ]
    try:
        with torch.no_grad():
            cache = getattr(eager(**first, use_cache=True), CACHE)
            close(got, eager(**later, **{CACHE: cache}).logits[:, -1])
    finally:
        for handle in handles:
            handle.remove()


def test_examples_are_of_their_family():
    """The helper makes prompts that end in an image when asked."""
    family = registry.families()["llava"]
    inputs = example(family, family.tiny(), images=1, image_last=True)
    assert int(inputs["input_ids"][0, -1]) == family.tiny().image_token_id
