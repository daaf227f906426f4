"""Every registered method on every family: the contract of docs/design.md section 11, on tiny random models."""

import dataclasses

import pytest
import torch
import twin
from tiny import FAMILIES, batch, build, generate, prompt
from twin import STEPS, Watched, close, kept_masks

from effivlm import registry
from effivlm.budget import BudgetError
from effivlm.methods.base import EncoderReducer, IntraLLM, KVCache, PreEncoder, PreLLM
from effivlm.runtime.attach import Session
from effivlm.runtime.plan import Plan
from effivlm.runtime.support import Unsupported, check_supported
from effivlm.setting import parse_setting

torch.set_num_threads(1)
METHODS = sorted(n for n in registry.methods() if n != "none")
PAIRS = [(m, f) for m in METHODS for f in FAMILIES]
SHARE = 0.4


def text_of(name, share=SHARE):
    """The method with a budget, where it takes one; tiny encoders have few blocks to merge in."""
    share = max(share, 0.6) if issubclass(registry.methods()[name], EncoderReducer) else share
    return name if registry.methods()[name].budget == "none" else f"{name}@{share}"


def setting_for(name, family, share=SHARE):
    setting = parse_setting(text_of(name, share))
    try:
        check_supported(setting, registry.families()[family])
    except Unsupported as error:
        pytest.skip(str(error))
    return setting


def token_stage(setting):
    return any(p.at(s) for p in setting.parts for s in (PreEncoder, EncoderReducer, PreLLM, IntraLLM))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_counts_indices_and_masking(name, family):
    """Promised counts are the lengths; kept indices are sound; dropping equals masking through six decode steps."""
    setting, model, inputs = setting_for(name, family), build(family), prompt(family)
    with Watched(model, setting) as session:
        tokens, logits, cache = generate(model, inputs, STEPS)
    seen = session.seen.prompt
    check_counts(setting, session, cache)
    check_indices(seen)
    prefill, decode = kept_masks(session, model.get_decoder().config.num_attention_heads)
    eager = build(family, "eager")
    writes = dict(session.writes)
    if "deepstack_visual_embeds" in seen.side:
        writes["deepstack"] = seen.side["deepstack_visual_embeds"]
    if any(getattr(p.method, "merges_cache", False) for p in setting.parts):
        return  # merged keys have no masked twin; the method's own tests cover them
    want = twin.run(eager, inputs, tokens, prefill, decode, seen.embeds, writes)
    close(logits, want)
    plain = generate(model, inputs, 1)[1]
    changed = (
        (logits[:, :1] - plain).abs().max()
        if token_stage(setting)
        else (want[:, 1] - twin_full(eager, inputs, tokens)[:, 1]).abs().max()
    )
    assert changed > 1e-4, "dropping 60 % changed nothing: the test could not fail"


def twin_full(model, inputs, tokens):
    everything = {i: torch.ones_like(inputs["input_ids"]).bool() for i in range(len(model.get_decoder().layers))}
    return twin.run(model, inputs, tokens, everything, everything)


def check_counts(setting, session, cache):
    (part,), seen, account = setting.parts, session.seen.prompt, session.accounts[0]
    text = int((~seen.visual).sum())
    for i, layer in enumerate(cache.layers):
        held = layer.keys.shape[2] - STEPS + 1
        if not layer.window:
            assert held == layer.index.shape[-1] and (layer.valid is not None or held == account.kv_per_layer[i])
        if not part.at(KVCache):
            assert account.kv_per_layer[i] == text + account.visual_per_layer[i]
    if part.method.exact and part.budget and part.budget.unit == "visual" and not isinstance(part.method, EncoderReducer):
        want = sum(part.budget.count(len(image.slots)) for image in seen.images)
        assert account.visual_per_layer[-1] == want
    if part.method.exact and part.budget and part.budget.unit == "prompt_kv":
        assert sum(account.kv_per_layer) == session.layers * part.budget.count(seen.visual.shape[1])


def check_indices(seen):
    for index, _ in seen.kept.values():
        assert bool((index[0].diff() > 0).all()) and index.max() < seen.visual.shape[1]
        assert set((~seen.visual[0]).nonzero()[:, 0].tolist()) <= set(index[0].tolist()), "text was dropped"


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_keep_all_is_bit_identical(name, family):
    """A share of 1.0 gives the same bits, and leaving the session restores the model."""
    if registry.methods()[name].budget == "none":
        pytest.skip("takes no budget")
    setting, model, inputs = setting_for(name, family, 1.0), build(family), prompt(family)
    tokens, logits, _ = generate(model, inputs, 3)
    with Session(model, setting):
        again = generate(model, inputs, 3)
    assert torch.equal(tokens, again[0]) and torch.equal(logits, again[1])
    assert torch.equal(logits, generate(model, inputs, 3)[1])


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_batch_of_two_is_two_singles(name, family):
    """Left padding, other images, other budgets: each row equals its own run; three images and one."""
    setting, model = setting_for(name, family), build(family)
    one, other = prompt(family, 3, seed=5, before=4, after=3), prompt(family, 1)
    if any(p.at(PreEncoder) for p in setting.parts) and "image_sizes" in one:
        pytest.skip("tiles of one call must have one size")
    single = []
    for x in (one, other):
        with Session(model, setting) as session:
            single.append((generate(model, x, 4)[1], session.accounts[0]))
    with Session(model, setting) as session:
        both = generate(model, batch(family, one, other), 4)[1]
    for i, (logits, account) in enumerate(single):
        assert dataclasses.astuple(session.accounts[i]) == dataclasses.astuple(account)
        close(both[i : i + 1], logits, 2e-4)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_eager_is_sdpa(name, family):
    """The same decisions and logits whatever the attention back end."""
    setting, inputs = setting_for(name, family), prompt(family, 2)
    results = []
    for attention in ("sdpa", "eager"):
        model = build(family, attention)
        with Session(model, setting) as session:
            results.append((generate(model, inputs, 2)[1], session.accounts))
    assert results[0][1] == results[1][1]
    close(results[0][0], results[1][0], 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_separate(family):
    """One pass over all settings gives the tokens and accounts of separate runs, with one encoder call a group."""
    model, inputs = build(family), prompt(family)
    settings = []
    for name in ["none", *METHODS]:
        for share in (0.4, 0.7):
            setting = parse_setting(text_of(name, share))
            try:
                check_supported(setting, registry.families()[family])
            except Unsupported:
                continue
            settings.append(setting)
    settings = list(
        dict.fromkeys([*settings, parse_setting("random_pre@0.5 + fastv@0.5 + snapkv@0.5"), parse_setting("fastv@0.5 + h2o@0.5")])
    )
    outcomes = {o.setting: o for o in Plan(model, settings, width=7).run(inputs, STEPS, [])}
    assert set(outcomes) == set(settings)
    for setting in settings:
        with Session(model, setting) as session:
            tokens = generate(model, inputs, STEPS)[0]
        outcome = outcomes[setting]
        assert outcome.error is None, outcome.error
        assert outcome.generated.tokens == tokens[0].tolist(), str(setting)
        assert outcome.account == session.accounts[0], str(setting)


@pytest.mark.parametrize("name", METHODS)
def test_image_last_text_only_and_one_token(name):
    """An image at the end of the prompt, no image at all, a budget of one token."""
    for family in ("llava", "qwen2_5_vl"):
        setting, model = setting_for(name, family), build(family)
        with Session(model, setting) as session:
            generate(model, prompt(family, 1, after=0), 2)
            assert session.accounts[0].visual_tokens > 0
            generate(model, prompt(family, 0, after=9), 2)
            assert session.accounts[0].visual_tokens == 0
        if registry.methods()[name].budget != "none":
            try:
                with Session(model, parse_setting(text_of(name, 0.01))):
                    generate(model, prompt(family, 2), 2)
            except BudgetError as error:
                assert "smallest feasible" in str(error)


@pytest.mark.parametrize("name", METHODS)
def test_seed_and_global_random_state(name):
    """The same prompt gives the same choice; the global generator is not touched."""
    setting, model, inputs = setting_for(name, "llava"), build("llava"), prompt("llava")
    state = torch.random.get_rng_state()
    chosen = []
    for _ in range(2):
        with Watched(model, setting):
            cache = generate(model, inputs, 2)[2]
        chosen.append([layer.index.tolist() for layer in cache.layers])
    assert chosen[0] == chosen[1]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", METHODS)
def test_text_form_and_paper(name):
    """The text form round-trips, also with every field named; the paper is filled in."""
    cls = registry.methods()[name]
    setting = parse_setting(text_of(name))
    assert parse_setting(str(setting)) == setting
    assert cls.paper.title and (cls.paper.arxiv or "baseline" in cls.paper.title or "openreview" in cls.paper.title), name
    assert cls.__doc__ and len(cls.__doc__) > 30
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen


@pytest.mark.parametrize("name", [m for m in METHODS if issubclass(registry.methods()[m], PreLLM | EncoderReducer | PreEncoder)
                                  and not issubclass(registry.methods()[m], IntraLLM)])  # fmt: skip
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_repack_is_a_shorter_prompt(name, family):
    """positions=repack equals masking with positions counted over the survivors."""
    setting_for(name, family)
    model, inputs = build(family), prompt(family)
    with Watched(model, parse_setting(f"{text_of(name)}:positions=repack")) as session:
        tokens, logits, _ = generate(model, inputs, STEPS)
    prefill, decode = kept_masks(session, 4)
    position = (prefill[0].cumsum(-1) - 1).clamp(min=0)
    position = position.expand(3, *position.shape) if family.startswith("qwen") else position
    close(logits, twin.run(build(family, "eager"), inputs, tokens, prefill, decode, session.seen.prompt.embeds, None, position))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text", ["random_pre@0.4 + random_intra@0.5:layer=1 + random_kv@0.5", "uniform@0.5 + fastv@0.5:layer=3 + h2o@0.4"]
)
def test_combinations(family, text):
    """Cuts before and inside the LLM and in the cache together equal the masks together."""
    model, inputs = build(family), prompt(family)
    with Watched(model, text) as session:
        tokens, logits, _ = generate(model, inputs, STEPS)
    prefill, decode = kept_masks(session, 4)
    side = session.seen.prompt.side
    writes = {"deepstack": side["deepstack_visual_embeds"]} if side else None
    close(logits, twin.run(build(family, "eager"), inputs, tokens, prefill, decode, session.seen.prompt.embeds, writes))
