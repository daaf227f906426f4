"""What every method and every family must keep: the same demands for `effivlm check` and for the
tests.
"""

import dataclasses
from collections.abc import Callable, Iterator

from effivlm import registry
from effivlm.contract import families as family_rules
from effivlm.contract import options, processing_rules, rules, weight_rules
from effivlm.families.tiny import FAMILIES
from effivlm.runtime.support import Unsupported

Check = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of methods, and the families it is checked on where it need not be all."""

    check: Check
    sample: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The rule in words."""
        return self.check.__name__.replace("_", " ")

    def covers(self, family: str) -> bool:
        """Whether the rule is checked on a family; on one outside this package it always is."""
        return not self.sample or family in self.sample


RULES = (
    Rule(rules.text_form_and_paper, ("llava",)),
    Rule(rules.counts_are_those_promised),
    Rule(rules.kept_indices_are_sound_and_text_stays),
    Rule(rules.dropping_equals_masking),
    Rule(rules.dropping_changes_something),
    # a full budget is not attached, whatever the family; `none_changes_no_bit` is a family's own
    Rule(rules.keep_all_is_bit_identical, ("llava", "qwen3_vl", "gemma3")),
    Rule(rules.batch_of_two_is_two_singles),
    Rule(rules.eager_is_sdpa),
    Rule(rules.shared_is_separate),
    Rule(rules.repack_is_a_shorter_prompt, ("llava", "qwen2_vl", "internvl")),
    Rule(rules.image_last_text_only_and_one_token, ("llava", "qwen2_5_vl")),
    Rule(rules.seed_and_global_random_state, ("llava",)),
    Rule(options.every_option_is_read_or_refused, ("llava",)),
)


FEW = ("llava", "gemma3", "aya_vision")  # norms of 1 + weight, and one norm for both halves
WEIGHT_RULES = (
    Rule(rules.text_form_and_paper, ("llava",)),
    Rule(weight_rules.promise_is_kept_and_something_changes, FEW),
    Rule(weight_rules.originals_come_back, FEW),
    Rule(weight_rules.only_decoder_layers_change, FEW),
    Rule(weight_rules.combines_with_tokens_and_cache, ("llava",)),
)


PROCESSING_RULES = (
    Rule(rules.text_form_and_paper, ("llava",)),
    Rule(processing_rules.sessions_refuse_it),
    Rule(processing_rules.budget_is_met_and_pixels_change, tuple(processing_rules.CHECKPOINTS)),
)


def rules_of(method: str) -> tuple[Rule, ...]:
    """The rules a method must keep."""
    if processing_rules.is_processing(method):
        return PROCESSING_RULES
    return WEIGHT_RULES if weight_rules.is_weights(method) else RULES


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a method on a family, or of a family by itself.

    Attributes:
        who: the family, or the method on it. kept: how many rules hold. broken: those that do not,
            with what was wrong. unsupported: why the pair is refused.
    """

    who: str
    kept: int
    broken: tuple[str, ...]
    unsupported: str = ""

    def lines(self) -> Iterator[str]:
        """The verdict in words."""
        if self.unsupported:
            yield f"{self.who}: unsupported: {self.unsupported.split(': ', 1)[-1]}"
        elif not self.broken:
            yield f"{self.who}: keeps all {self.kept} rules"
        yield from (f"{self.who}: breaks {what}" for what in self.broken)


def check(name: str) -> Iterator[Verdict]:
    """Put a method through every rule on every family, or a family through its own rules and every
    method's.

    Raises:
        UnknownName: with near names.
    """
    known = {**registry.families(), **registry.methods()}
    registry.lookup("method or family", name, known)
    if name in registry.methods():
        for family in FAMILIES:
            if any(rule.covers(family) for rule in rules_of(name)):
                yield _method_on(name, family, family)
        return
    held = [(r.__name__.replace("_", " "), _broken(r, name)) for r in family_rules.RULES]
    broken = tuple(f"{title}: {why}" for title, why in held if why)
    yield Verdict(name, len(held) - len(broken), broken)
    for method in registry.methods():
        if method != "none" and any(rule.covers(name) for rule in rules_of(method)):
            yield _method_on(method, name, method)


def _method_on(method: str, family: str, who: str) -> Verdict:
    covering, broken = [r for r in rules_of(method) if r.covers(family)], []
    for rule in covering:
        try:
            why = _broken(rule.check, method, family)
        except Unsupported as error:
            return Verdict(who, 0, tuple(broken), str(error))
        if why:
            broken.append(f"{rule.title}: {why}")
    return Verdict(who, len(covering) - len(broken), tuple(broken))


def _broken(rule: Callable[..., None], *names: str) -> str:
    """What breaks a rule, or nothing."""
    try:
        rule(*names)
    except Unsupported:
        raise
    except Exception as error:  # it may fail in any way; that is what is reported
        return f"{type(error).__name__}: {error}"
    return ""
