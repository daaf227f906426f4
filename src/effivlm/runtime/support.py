"""What can be carried out: which settings on which family, which prompts; everything else is
refused before anything runs.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from effivlm.families.base import Family
from effivlm.methods.base import (
    EncoderReducer,
    IntraLLM,
    KVCache,
    KVFormat,
    PreEncoder,
    PreLLM,
    Processing,
)
from effivlm.methods.baselines import NoCompression
from effivlm.methods.signals import FutureQueries, TextEmbeds
from effivlm.runtime.cache import cache_of
from effivlm.runtime.counts import entering, in_layers
from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.vision import ENCODER_SIGNALS
from effivlm.setting import STAGES, Part, Setting, SettingError

MANY = (
    1 << 20
)  # visual tokens: what is infeasible for so many, rounding apart, is infeasible for any image


class Unsupported(SettingError):
    """A method cannot work with a family; the message says why."""


def check_supported(setting: Setting, family: Family, layers: int | None = None) -> None:
    """Refuse methods that cannot apply to a family or, if its number is known, to so many decoder
    layers.

    Raises:
        Unsupported: naming the method, the family and the reason.
        BudgetError: for a budget that no image could meet (names the smallest feasible one), or a
            layer that does not exist.
    """
    traits = set(family.traits) | ({"no_resize"} if family.resize is None else set())
    traits |= {"rows"} if family.rows else set()
    for part in setting.parts:
        if type(part.method) is not NoCompression and not any(map(part.at, STAGES.values())):
            raise Unsupported(
                f"{part.method.name} acts at no stage there is ({', '.join(STAGES)}): derive its"
                " class from one of those in methods.base"
            )
        reasons = dict(part.method.unsupported)
        if any(isinstance(s, ENCODER_SIGNALS) for s in part.method.signals):
            reasons.setdefault(
                "no_encoder_signals",
                "its visual tokens are not patches, so encoder signals cannot be mapped to them",
            )
        if part.at(EncoderReducer):
            reasons.setdefault(
                "no_encoder_signals",
                "its visual tokens are not patches that could be merged one to one",
            )
            reasons["rows"] = "its encoder takes all images as one masked sequence"
        if any(isinstance(s, FutureQueries) for s in part.method.signals):
            reasons["half_rotary"] = (
                "its heads turn with the position in half of their width only, and queries are not"
                " moved to coming positions that way"
            )
        if part.at(Processing) and family.native is None:
            raise no_argument(family)
        if part.at(PreEncoder):
            reasons["no_resize"] = "its encoder takes images of one size only"
        for trait in sorted(traits & set(reasons)):
            raise Unsupported(
                f"{part.method.name} cannot be used with {family.name}: {reasons[trait]}"
            )
    if layers is not None:
        for part in setting.stage(IntraLLM):
            _check_feasible(part, layers)


def no_argument(family: Family) -> Unsupported:
    """Why the model's own budget cannot be set."""
    return Unsupported(
        f"native cannot be used with {family.name}: no argument of its processor is known that sets"
        " how many visual tokens there are"
    )


def check_processed(setting: Setting) -> None:
    """Refuse a setting that says how images are processed where they are processed already.

    Raises:
        Unsupported: saying what to do instead.
    """
    for part in setting.stage(Processing):
        budget = part.budget.text if part.budget else ""
        raise Unsupported(
            f"{part} acts where the processor prepares pixels, and a session around a model gets"
            " them prepared: leave it out and pass to the processor what"
            f" effivlm.native_arguments(model, processor, text, images, {budget!r}) gives (such as"
            " size=... or max_patches=...); `effivlm run` does so by itself"
        )


def _check_feasible(part: Part, layers: int) -> None:
    method, budget, n = part.method, part.budget, MANY
    assert isinstance(method, IntraLLM)
    if budget is not None and budget.tokens is not None and budget.unit == "visual_mean":
        return  # how much of an image a number of tokens is differs from image to image
    if budget is not None and (
        part.at(EncoderReducer) or part.at(PreLLM)
    ):  # earlier stages leave a count to the schedule
        for stage in (EncoderReducer, PreLLM):
            n = entering(part, stage, layers, n) if part.at(stage) else n
        budget = replace(budget, share=None, tokens=budget.count(MANY))
    in_layers(part, layers, n, budget)


def check_call(setting: Setting, model: Any, call: dict[str, Any]) -> None:
    """Refuse a call of `generate` whose first step holds more than the prompt, where the setting
    would read that as prompt.

    Args:
        setting: what is asked.
        model: whose own generation configuration counts where the call has none.
        call: the arguments of `generate` by name.

    Raises:
        UnsupportedCall: for assisted and prompt-lookup decoding under methods that read the text or
            compress the cache.
    """
    config = call.get("generation_config") or model.generation_config
    asked = {
        name: call.get(name, getattr(config, name, None))
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    }
    found = [name for name, value in asked.items() if value is not None]
    readers = [p for p in setting.acting if reads_prompt(p)]
    if found and readers:
        raise UnsupportedCall(
            f"{found[0]}: the first step of assisted decoding holds proposed tokens beside the"
            f" prompt, and {readers[0].method.name} would choose by them or could not give them"
            " back: leave it out"
        )


def reads_prompt(part: Part) -> bool:
    """Whether what a part does depends on the text or on what the LLM makes of the prompt."""
    late = part.at(IntraLLM) or part.at(KVCache) or part.at(KVFormat)
    return late or TextEmbeds() in part.method.signals


def refused_switch(inner: Any) -> Callable[..., NoReturn]:
    """A model's `set_attn_implementation` inside a session."""

    def set_attn_implementation(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedCall(
            "the attention back end cannot change inside a compress() session: leave the with block"
            " first"
        )

    return set_attn_implementation


def refused_copy(inner: Any) -> Callable[..., NoReturn]:
    """How a model inside a session is copied or pickled."""

    def reduce(*args: Any) -> NoReturn:
        raise TypeError(
            "this model is under a compress() session, whose hooks would be copied with it: copy or"
            " pickle it outside the with block"
        )

    return reduce


def whole_prompts(prefill: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``_prefill`` that refuses to feed a prompt in chunks.

    Budgets are shares of the whole prompt and its last rows choose what stays, so a first chunk
    cannot be compressed as if it were the prompt. Later turns, which are appended uncompressed, may
    come in chunks.
    """

    @functools.wraps(prefill)
    def checked(
        input_ids: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        size, cache = getattr(generation_config, "prefill_chunk_size", None), cache_of(model_kwargs)
        if (
            size is not None
            and input_ids.shape[1] > size
            and (cache is None or not cache.get_seq_length())
        ):
            raise NotImplementedError(
                f"prefill_chunk_size={size} would feed this prompt of {input_ids.shape[1]} tokens"
                " in chunks, and compression needs it whole: leave prefill_chunk_size out"
                " (attention statistics take no L x L memory)"
            )
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    return checked
