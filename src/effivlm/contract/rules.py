"""The rules, one function each: a method's name and a family's name in, ContractError out where the
rule is broken.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effivlm import registry
from effivlm.budget import BudgetError
from effivlm.contract import twin
from effivlm.contract.twin import (
    STEPS,
    Watched,
    close,
    generate,
    kept_masks,
    require,
    same_tokens,
)
from effivlm.contract.weight_rules import is_weights, weights_text
from effivlm.families.tiny import batch, double, exact
from effivlm.methods.base import (
    EncoderReducer,
    IntraLLM,
    KVCache,
    KVFormat,
    Method,
    PreEncoder,
    PreLLM,
)
from effivlm.runtime.plan import Plan
from effivlm.runtime.session import Session
from effivlm.runtime.support import check_supported
from effivlm.setting import Setting, parse_setting

SHARE = 0.4


def text_of(name: str, share: float = SHARE) -> str:
    """The method with a budget, where it takes one; tiny encoders have few blocks to merge in."""
    cls = registry.lookup("method", name, registry.methods())
    if is_weights(name):
        return weights_text(name)
    share = max(share, 0.6) if issubclass(cls, EncoderReducer) else share
    return name if cls.budget == "none" else f"{name}@{share}"


def setting_for(name: str, family: str, share: float = SHARE) -> Setting:
    """The method's setting.

    Raises:
        Unsupported: if the family cannot carry it out.
    """
    setting = parse_setting(text_of(name, share))
    check_supported(setting, registry.families()[family])
    return setting


# ------------------------------------------------------------------------------- counts and masking
@functools.lru_cache(maxsize=1)
def _watched(name: str, family: str) -> tuple[Setting, Watched, Tensor, Tensor, Any]:
    """One run that several rules look at: setting, closed session, tokens, logits, cache."""
    setting = setting_for(name, family)
    with Watched(exact(family), setting) as session:
        return setting, session, *generate(exact(family), double(family), STEPS)


def counts_are_those_promised(name: str, family: str) -> None:
    """Budgets are met, accounts say what the cache's tensors hold."""
    setting, session, _, _, cache = _watched(name, family)
    _check_counts(setting, session, cache)


def kept_indices_are_sound_and_text_stays(name: str, family: str) -> None:
    """Ascending, unique, in range, with every text token, at every layer."""
    seen = _watched(name, family)[1].seen.prompt
    text = set((~seen.visual[0]).nonzero()[:, 0].tolist())
    for layer, (index, _) in seen.kept.items():
        sound = bool((index[0].diff() > 0).all()) and int(index.max()) < seen.visual.shape[1]
        require(sound, f"layer {layer}: kept indices are not ascending, unique and in range")
        lost = sorted(text - set(index[0].tolist()))
        require(not lost, f"layer {layer}: text token {lost[:1]} was dropped")


def dropping_equals_masking(name: str, family: str) -> None:
    """Through six decode steps, against the uncompressed model that hides the same tokens."""
    setting, session, tokens, logits, _ = _watched(name, family)
    if any(getattr(p.method, "merges_cache", False) or p.at(KVFormat) for p in setting.parts):
        return  # merged and rounded keys have no masked twin; the method's own tests cover them
    seen, inputs = session.seen.prompt, double(family)
    prefill, decode = kept_masks(session, session.host.heads)
    eager, writes = exact(family, "eager"), dict(session.writes)
    if seen.side is not None:
        writes["deepstack"] = {session.host.family.side[1]: seen.side.levels}
    close(logits, twin.run(eager, inputs, tokens, prefill, decode, seen.embeds, writes))


def dropping_changes_something(name: str, family: str) -> None:
    """So that an equality above cannot be that of doing nothing."""
    run = _watched(name, family)
    if any(p.at(KVFormat) for p in run[0].parts):
        return  # nothing is dropped, and a window may hide all that is rounded
    moved = _moved(family, *run[:4])
    if moved <= 1e-4:  # a window may hide all that a cache method drops at this share
        setting = setting_for(name, family, 0.1)
        with Watched(exact(family), setting) as session:
            moved = _moved(family, setting, session, *generate(exact(family), double(family))[:2])
    require(moved > 1e-4, "dropping tokens changed nothing")


def _moved(
    family: str, setting: Setting, session: Watched, tokens: Tensor, logits: Tensor
) -> float:
    """How far a setting's logits are from those of the uncompressed model."""
    inputs = double(family)
    early = (PreEncoder, EncoderReducer, PreLLM, IntraLLM)
    if any(p.at(s) for p in setting.parts for s in early):
        changed = (logits[:, :1] - generate(exact(family), inputs, 1)[1]).abs().max()
    else:
        every = {i: torch.ones_like(inputs["input_ids"]).bool() for i in range(session.layers)}
        plain = twin.run(exact(family, "eager"), inputs, tokens, every, every)
        changed = (logits[:, 1] - plain[:, 1]).abs().max()
    return float(changed)


def _check_counts(setting: Setting, session: Watched, cache: Any) -> None:
    (part,), seen, account = setting.parts, session.seen.prompt, session.accounts[0]
    text = int((~seen.visual).sum())
    for i, layer in enumerate(cache.layers):
        held, kept = layer.stored()[0].shape[2] - STEPS + 1, account.kv_per_layer[i]
        if not layer.window:
            require(
                held == layer.index.shape[-1],
                f"layer {i} holds {held} entries and indexes {layer.index.shape[-1]}",
            )
            require(
                layer.valid is not None or held == kept,
                f"layer {i} holds {held} entries, the account says {kept}",
            )
        if not part.at(KVCache):
            entered = text + account.visual_per_layer[i]
            require(
                kept == entered,
                f"layer {i} caches {kept} entries of the {entered} tokens that entered it",
            )
    if not part.method.exact or part.budget is None:
        return
    if part.budget.unit == "visual" and not isinstance(part.method, EncoderReducer):
        want, got = (
            sum(part.budget.count(len(image.slots)) for image in seen.images),
            account.visual_per_layer[-1],
        )
        require(got == want, f"{got} visual tokens enter the last layer, the budget is {want}")
    if part.budget.unit == "prompt_kv":
        want, got = (
            session.layers * part.budget.count(seen.visual.shape[1]),
            sum(account.kv_per_layer),
        )
        require(got == want, f"{got} cache entries are held over all layers, the budget is {want}")


# ------------------------------------------------------------------------------------- equivalences
def keep_all_is_bit_identical(name: str, family: str) -> None:
    """A share of 1.0 gives the same bits, and leaving the session restores the model."""
    if registry.methods()[name].budget == "none":
        return
    setting, model, inputs = setting_for(name, family, 1.0), exact(family), double(family)
    tokens, logits, _ = generate(model, inputs, 3)
    with Session(model, setting):
        again = generate(model, inputs, 3)
    require(
        torch.equal(tokens, again[0]) and torch.equal(logits, again[1]),
        "a share of 1.0 changes the output",
    )
    require(
        torch.equal(logits, generate(model, inputs, 3)[1]),
        "the model is not what it was before the session",
    )


def batch_of_two_is_two_singles(name: str, family: str) -> None:
    """Left padding, other images, other budgets: each row is its own run; three images and one."""
    setting, model = setting_for(name, family), exact(family)
    one, other = double(family, 3, seed=5, before=4, after=3), double(family, 1)
    if any(p.at(PreEncoder) for p in setting.parts) and "image_sizes" in one:
        return  # tiles of one call must have one size
    single = []
    for x in (one, other):
        with Watched(model, setting) as alone:
            single.append((alone, generate(model, x, 2)[1], alone.accounts[0]))
    with Watched(model, setting) as session:
        both = generate(model, batch(family, one, other), 2)[1]
    for i, (alone, logits, account) in enumerate(single):
        same_tokens(session.seen.prompt, alone.seen.prompt, (i, 0))
        same = dataclasses.astuple(session.accounts[i]) == dataclasses.astuple(account)
        require(same, f"row {i} of a batch costs {session.accounts[i]}, alone {account}")
        close(both[i : i + 1], logits, 2e-4, f"row {i} of a batch")


def eager_is_sdpa(name: str, family: str) -> None:
    """The same decisions and logits whatever the attention back end."""
    setting, inputs, results = setting_for(name, family), double(family, 2), []
    for attention in ("sdpa", "eager"):
        model = exact(family, attention)
        with Watched(model, setting) as session:
            results.append((session, generate(model, inputs, 2)[1], session.accounts))
    same_tokens(results[0][0].seen.prompt, results[1][0].seen.prompt)
    require(results[0][2] == results[1][2], f"sdpa costs {results[0][2]}, eager {results[1][2]}")
    close(results[0][1], results[1][1], 2e-4)


def shared_is_separate(name: str, family: str) -> None:
    """One pass over two budgets and the whole model equals separate runs."""
    setting_for(name, family)
    check_shared(
        [parse_setting("none"), *(parse_setting(text_of(name, s)) for s in (0.4, 0.7))], family
    )


def check_shared(settings: Iterable[Setting], family: str) -> None:
    """One pass over settings gives the tokens and accounts of separate runs."""
    model, inputs, settings = exact(family), double(family), list(dict.fromkeys(settings))
    outcomes = {o.setting: o for o in Plan(model, settings, width=7).run(inputs, STEPS, [])}
    require(set(outcomes) == set(settings), "the plan left settings out")
    for setting in settings:
        with Session(model, setting) as session:
            tokens = generate(model, inputs, STEPS)[0]
        outcome = outcomes[setting]
        require(
            outcome.error is None and outcome.generated is not None,
            f"{setting} failed when shared: {outcome.error}",
        )
        assert outcome.generated is not None
        require(
            outcome.generated.tokens == tokens[0].tolist(),
            f"{setting} gives other tokens when shared",
        )
        require(
            outcome.account == session.accounts[0],
            f"{setting} costs {outcome.account} shared, {session.accounts[0]} alone",
        )


def repack_is_a_shorter_prompt(name: str, family: str) -> None:
    """Renumbered positions equal masking with positions counted over the survivors."""
    cls = registry.methods()[name]
    if not issubclass(cls, PreLLM | EncoderReducer | PreEncoder) or issubclass(cls, IntraLLM):
        return
    setting_for(name, family)
    model, inputs = exact(family), double(family)
    with Watched(model, parse_setting(f"{text_of(name)}:positions=repack")) as session:
        tokens, logits, _ = generate(model, inputs, STEPS)
    prefill, decode = kept_masks(session, 4)
    position: Tensor = (prefill[0].cumsum(-1) - 1).clamp(min=0)
    if hasattr(session.host.base, "get_rope_index"):  # one position per axis
        position = position.expand(3, *position.shape)
    close(
        logits,
        twin.run(
            exact(family, "eager"),
            inputs,
            tokens,
            prefill,
            decode,
            session.seen.prompt.embeds,
            None,
            position,
        ),
    )


# ------------------------------------------------------------------------- prompts, seeds and words
def image_last_text_only_and_one_token(name: str, family: str) -> None:
    """An image at the end of the prompt, no image at all, a budget of one token."""
    setting, model = setting_for(name, family), exact(family)
    with Session(model, setting) as session:
        generate(model, double(family, 1, after=0), 2)
        require(session.accounts[0].visual_tokens > 0, "an image at the end is not seen")
        generate(model, double(family, 0, after=9), 2)
        require(session.accounts[0].visual_tokens == 0, "a text-only prompt has visual tokens")
    if registry.methods()[name].budget != "none":
        try:
            with Session(model, parse_setting(text_of(name, 0.01))):
                generate(model, double(family, 2), 2)
        except BudgetError as error:
            require(
                "smallest feasible" in str(error),
                f"an infeasible budget does not name the smallest feasible one: {error}",
            )


def seed_and_global_random_state(name: str, family: str) -> None:
    """The same prompt gives the same choice; the global generator is not touched."""
    setting, model, inputs = setting_for(name, family), exact(family), double(family)
    state, chosen = torch.random.get_rng_state(), []
    for _ in range(2):
        with Watched(model, setting):
            cache = generate(model, inputs, 2)[2]
        chosen.append([layer.index.tolist() for layer in cache.layers])
    require(chosen[0] == chosen[1], "the same prompt gives another choice the second time")
    require(torch.equal(state, torch.random.get_rng_state()), "the global random state was touched")


def text_form_and_paper(name: str, family: str) -> None:
    """The text form round-trips; the paper is filled in; the class is documented and frozen."""
    cls: type[Method] = registry.methods()[name]
    setting = parse_setting(text_of(name))
    require(
        parse_setting(str(setting)) == setting,
        f"the text form {str(setting)!r} does not round-trip",
    )
    source = cls.paper.arxiv or "baseline" in cls.paper.title or "openreview" in cls.paper.title
    require(
        bool(cls.paper.title and source),
        "paper needs a title, and an arXiv number or the word baseline",
    )
    require(bool(cls.__doc__) and len(cls.__doc__ or "") > 30, "the class has no docstring")
    frozen = dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen  # noqa: B009
    require(frozen, "the class is not a frozen dataclass")
