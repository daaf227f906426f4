"""The model's own budget: which argument of its processor makes the most visual tokens that a
budget allows, and how its cost is told against the uncompressed prompt.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from effivlm.budget import Budget, BudgetError, parse_budget
from effivlm.runtime.audit import AuditError
from effivlm.runtime.host import host_of
from effivlm.runtime.plan import Outcome
from effivlm.runtime.support import no_argument

FEW = 40  # candidates: so many are all tried, more are bisected
Arguments = Mapping[str, Any]  # of a processor
Process = Callable[[Arguments], Mapping[str, Any]]  # arguments beside the defaults -> model inputs


@dataclass(frozen=True)
class Processed:
    """A prompt processed within a budget.

    Attributes:
        inputs: what the processor gave. arguments: what it was given beside its defaults.
        kept: visual tokens of ``inputs``. visual_tokens, prompt_tokens: of the prompt processed by
            the defaults.
    """

    inputs: Mapping[str, Any]
    arguments: Arguments
    kept: int
    visual_tokens: int
    prompt_tokens: int

    def told(self, outcome: Outcome) -> Outcome:
        """An outcome of ``inputs`` whose account is told against the uncompressed prompt; one whose
        tensors held other visual tokens than were processed has failed (`AuditError`).
        """
        if (account := outcome.account) is None:
            return outcome
        if account.visual_tokens != self.kept:
            error = AuditError(
                f"native: the processor made {self.kept} visual tokens, the model took"
                f" {account.visual_tokens}"
            )
            return replace(outcome, generated=None, account=None, error=error)
        told = replace(account, visual_tokens=self.visual_tokens, prompt_tokens=self.prompt_tokens)
        return replace(outcome, account=told)


def processed(
    process: Process, candidates: Sequence[Arguments], budget: Budget, image_token: int
) -> Processed:
    """The prompt with the most visual tokens within a budget.

    Args:
        process: makes model inputs of one prompt, given arguments of the processor.
        candidates: arguments, from most to fewest visual tokens; up to `FEW` are all tried, in
            whatever order they are.
        budget: a share is of all visual tokens of the prompt, a count is of every image.
        image_token: id of the placeholder.

    Raises:
        BudgetError: if even the last candidate makes more, or images cannot be told apart.
    """
    default = process({})
    before = _runs(default, image_token)
    ways: list[Arguments] = [{}, *(() if budget.full or not before else candidates)]
    made = {0: default}

    def lengths(number: int) -> list[int]:
        if number not in made:
            made[number] = process(ways[number])
        return _runs(made[number], image_token)

    def fits(number: int) -> bool:
        return _fits(lengths(number), before, budget)

    def tokens(number: int) -> int:
        return sum(lengths(number))

    numbers, many = range(len(ways)), len(ways) > FEW
    if many:
        found = bisect_left(numbers, True, key=fits)
    else:
        found = max(filter(fits, numbers), key=tokens, default=len(ways))
    if found == len(ways):
        least = found - 1 if many else min(numbers, key=tokens)
        _refuse(tokens(least), described(ways[least]), before, budget)
    length = default["input_ids"].shape[1]
    kept = tokens(found)
    return Processed(made[found], ways[found], kept, sum(before), length)


def _runs(inputs: Mapping[str, Any], image_token: int) -> list[int]:
    """Lengths of the unbroken runs of placeholders of one prompt."""
    ids = inputs["input_ids"][0].tolist()
    return [len(list(run)) for same, run in groupby(ids, image_token.__eq__) if same]


def _fits(now: list[int], before: list[int], budget: Budget) -> bool:
    if budget.tokens is None:
        return sum(now) <= budget.count(sum(before))
    if len(now) != len(before):
        raise BudgetError(
            f"native: {len(before)} images of {budget.text} tokens each cannot be told apart once"
            " they are processed another way: give a share such as @0.25"
        )
    return all(n <= budget.count(m) for n, m in zip(now, before, strict=True))


def _refuse(least: int, how: str, before: list[int], budget: Budget) -> None:
    asked = sum(budget.count(n) for n in before) if budget.tokens else budget.count(sum(before))
    raise BudgetError(
        f"native@{budget.text}: {asked} of {sum(before)} visual tokens cannot be had: the fewest"
        f" that the processor makes of this prompt are {least} ({how}); the smallest feasible share"
        f" is {least / sum(before):.4f}"
    )


def described(arguments: Arguments) -> str:
    """Arguments in words: pictures are their sizes."""
    shown = {k: _sizes(v) if k == "images" else v for k, v in arguments.items()}
    return ", ".join(f"{k}={v}" for k, v in shown.items()) or "the processor's defaults"


def _sizes(images: Sequence[Any]) -> list[str]:
    return [f"{image.width}x{image.height}" for image in images]


def native_arguments(
    model: Any, processor: Any, text: str, images: Sequence[Any], budget: str
) -> dict[str, Any]:
    """What to pass to a processor so that a prompt has the most visual tokens within a budget:
    ``processor(**native_arguments(...), return_tensors="pt")``.

    Args:
        model: a transformers vision-language model of a supported family.
        processor: of the model.
        text: one prompt, as the chat template wrote it.
        images: its pictures (PIL).
        budget: as in a setting: ``0.25``, ``25%``, or ``64`` for at most 64 tokens an image.

    Returns:
        ``text``, ``images`` (one list, of this prompt) and what sets the number of tokens.

    Raises:
        Unsupported: if no such argument is known for the model's family.
        BudgetError: for a budget that cannot be read, or that the processor cannot meet.
    """
    host = host_of(model)
    if host.family.native is None:
        raise no_argument(host.family)
    whole: dict[str, Any] = {"text": text, "images": [list(images)]}
    found = processed(
        lambda arguments: processor(**call_with(whole, arguments), return_tensors="pt"),
        host.family.native(processor, images),
        parse_budget(budget, "visual"),
        host.model.config.image_token_id,
    )
    return call_with(whole, found.arguments)


def call_with(whole: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    """The arguments of a processor's call, a candidate's in place of its defaults; pictures are one
    list a prompt.
    """
    new = {k: [list(v)] if k == "images" else v for k, v in arguments.items()}
    return {**whole, **new}
