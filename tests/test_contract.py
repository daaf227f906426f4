"""Every registered method on every family: the contract of docs/design.md section 11, on tiny random models."""

import pytest
import torch
import twin
from tiny import FAMILIES, WHOLE, build, generate, grid, prompt
from twin import STEPS, Watched, close, kept_masks
from typer.testing import CliRunner

from effivlm import cli, registry
from effivlm.budget import parse_budget
from effivlm.contract import families, gate, rules
from effivlm.methods.base import EncoderReducer, IntraLLM, PreLLM, Selection
from effivlm.methods.baselines import RandomPre, Uniform
from effivlm.runtime.session import Session
from effivlm.runtime.support import Unsupported, check_supported
from effivlm.setting import parse_setting

torch.set_num_threads(1)
EVERY = sorted(n for n in registry.methods() if n != "none")
METHODS = [n for n in EVERY if gate.rules_of(n) is gate.RULES]
PAIRS = [(m, f) for m in METHODS for f in FAMILIES]


def keeps(rule, name, family):
    """Run a rule; a pair that is refused is skipped with its reason."""
    try:
        rule(name, family)
    except Unsupported as error:
        pytest.skip(str(error))


SAMPLE = (rules.dropping_equals_masking, rules.batch_of_two_is_two_singles)
# sharing is tested below with all settings in one pass, which is stronger
CASES = [
    pytest.param(
        rule,
        name,
        family,
        id=f"{rule.check.__name__}-{name}-{family}",
        marks=grid(family, name) if family in WHOLE or rule.check in SAMPLE else grid(family),
    )
    for name in EVERY
    for family in FAMILIES
    for rule in gate.rules_of(name)
    if rule.covers(family) and rule.check is not rules.shared_is_separate
]


@pytest.mark.parametrize(("rule", "name", "family"), CASES)
def test_methods(rule, name, family):
    """Every rule of the gate, every method, every family."""
    keeps(rule.check, name, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", families.RULES, ids=lambda r: r.__name__)
def test_families(rule, family):
    """Every rule of the gate for families."""
    rule(family)


SHARED = ("gemma3", "internvl", "llava", "qwen3_vl")  # a hundred settings each


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in SHARED else pytest.mark.grid) for f in FAMILIES]
)
def test_shared_is_separate(family):
    """One pass over all settings, with combinations, gives the tokens and accounts of separate runs."""
    settings = []
    for text in [
        "none",
        *(rules.text_of(m, s) for m in METHODS for s in (0.4, 0.7)),
        "random_pre@0.5 + fastv@0.5 + snapkv@0.5",
        "fastv@0.5 + h2o@0.5",
    ]:
        setting = parse_setting(text)
        try:
            check_supported(setting, registry.families()[family])
        except Unsupported:
            continue
        settings.append(setting)
    assert len(settings) > len(METHODS)
    rules.check_shared(settings, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "random_pre@0.4 + random_intra@0.5:layer=1 + random_kv@0.5",
        "uniform@0.5 + fastv@0.5:layer=3 + h2o@0.4",
    ],
)
def test_combinations(family, text):
    """Cuts before and inside the LLM and in the cache together equal the masks together."""
    model, inputs = build(family), prompt(family)
    with Watched(model, text) as session:
        tokens, logits, _ = generate(model, inputs, STEPS)
    prefill, decode = kept_masks(session, 4)
    side = session.seen.prompt.side
    writes = {"deepstack": {session.host.family.side[1]: side.levels}} if side else None
    close(
        logits,
        twin.run(
            build(family, "eager"),
            inputs,
            tokens,
            prefill,
            decode,
            session.seen.prompt.embeds,
            writes,
        ),
    )


BEFORE = [
    n
    for n in METHODS
    if issubclass(registry.methods()[n], PreLLM) and not issubclass(registry.methods()[n], IntraLLM)
]
INSIDE = [
    n
    for n in METHODS
    if issubclass(registry.methods()[n], IntraLLM) and not issubclass(registry.methods()[n], PreLLM)
]


@pytest.mark.parametrize("before", BEFORE)
def test_any_cut_before_the_llm_with_any_inside_has_the_joint_share(before):
    """``a@1/2 + b@1/3``: a share of a share, of every image; what the tensors hold is what the budgets multiply to."""
    model, inputs = build("llava"), prompt("llava", 1)
    half, third = parse_budget("1/2", "visual"), parse_budget("1/3", "visual")
    for inside in INSIDE:
        method = registry.methods()[inside]
        if issubclass(method, EncoderReducer) or "visual" not in method.units:
            continue  # cuts in the encoder come first, whatever the order of parts; vtw's share is one of layers
        with Session(model, f"{before}@1/2 + {inside}@1/3") as session:
            generate(model, inputs, 1)
        account = session.accounts[0]
        entered, left = account.visual_per_layer[0], account.visual_per_layer[-1]
        promised = half.count(account.visual_tokens), third.count(entered)
        assert entered == promised[0] or (
            not registry.methods()[before].exact and entered < promised[0]
        ), inside
        assert left == promised[1] or (not method.exact and left < promised[1]), inside
        assert account.realised["visual"] == left / account.visual_tokens


# ---------------------------------------------------------------------------------------------------- effivlm check
class Repeats(Uniform):
    """Keeps an index twice, in the place of another: an error of the kind that the audit refuses."""

    name = "repeats"

    def select_image(self, tokens, k):
        """Wrong on purpose."""
        keep = super().select_image(tokens, k).keep
        return Selection(torch.cat([keep[:1], keep[:-1]]) if k > 1 else keep)


class Restless(RandomPre):
    """Draws from the global generator: another choice every time."""

    name = "restless"

    def select_image(self, tokens, k):
        """Wrong on purpose."""
        return Selection(torch.randperm(len(tokens.embeds))[:k].sort().values)


def check(monkeypatch, method, families):
    monkeypatch.setattr(gate, "FAMILIES", families)
    known = {**registry.methods(), method.name: method}
    monkeypatch.setattr(registry, "methods", lambda: known)
    result = CliRunner().invoke(cli.app, ["check", method.name])
    return result.exit_code, result.output


@pytest.mark.parametrize("method", [Uniform, registry.methods()["fastervlm"]])
def test_check_passes_a_sound_method_and_names_what_is_unsupported(monkeypatch, method):
    code, text = check(monkeypatch, method, ["idefics2", "llava"])
    assert code == 0, text
    assert "llava: keeps all 13 rules" in text
    assert ("idefics2: unsupported" in text) == (method is not Uniform)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        (Repeats, "counts are those promised: AuditError: repeats returned indices"),
        (Restless, "seed and global random state"),
    ],
)
def test_check_names_the_rule_a_method_breaks(monkeypatch, method, broken):
    code, text = check(monkeypatch, method, ["llava"])
    assert code == cli.BROKEN_CONTRACT and f"llava: breaks {broken}" in text, text


def test_check_takes_a_family(monkeypatch):
    """Its own rules, then every method's on it; a layout that is wrong is named."""
    import dataclasses

    known = {**registry.families()}
    mine = {n: registry.methods()[n] for n in ("none", "uniform", "snapkv")}
    monkeypatch.setattr(registry, "methods", lambda: mine)
    result = CliRunner().invoke(cli.app, ["check", "llava"])
    assert result.exit_code == 0, result.output
    assert "llava: keeps all 9 rules" in result.output and "snapkv: keeps all" in result.output
    plain = known["llava"].layout

    def swapped(model, call):
        return [dataclasses.replace(p, source=p.source.flip(0)) for p in plain(model, call)]

    known["llava"] = dataclasses.replace(known["llava"], layout=swapped)
    monkeypatch.setattr(registry, "families", lambda: known)
    result = CliRunner().invoke(cli.app, ["check", "llava"])
    assert result.exit_code == cli.BROKEN_CONTRACT
    assert "llava: breaks sources are the groups tokens are made of" in result.output
