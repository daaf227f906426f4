"""What can be carried out: which settings on which family, which prompts; everything else is refused before anything runs."""

import functools
from collections.abc import Callable
from typing import Any

from effivlm.families.base import Family
from effivlm.methods.base import EncoderReducer, PreEncoder
from effivlm.runtime.cache import cache_of
from effivlm.runtime.encoder import ENCODER_SIGNALS
from effivlm.setting import Setting, SettingError


class Unsupported(SettingError):
    """A method cannot work with a family; the message says why."""


def check_supported(setting: Setting, family: Family) -> None:
    """Refuse methods that cannot apply to a family.

    Raises:
        Unsupported: naming the method, the family and the reason.
    """
    traits = set(family.traits) | ({"no_resize"} if family.resize is None else set())
    for part in setting.parts:
        reasons = dict(part.method.unsupported)
        if any(isinstance(s, ENCODER_SIGNALS) for s in part.method.signals):
            reasons.setdefault(
                "no_encoder_signals", "its visual tokens are not patches, so encoder signals cannot be mapped to them"
            )
        if part.at(EncoderReducer):
            reasons.setdefault("no_encoder_signals", "its visual tokens are not patches that could be merged one to one")
        if part.at(PreEncoder):
            reasons["no_resize"] = "its encoder takes images of one size only"
        for trait in sorted(traits & set(reasons)):
            raise Unsupported(f"{part.method.name} cannot be used with {family.name}: {reasons[trait]}")


def whole_prompts(model: Any) -> None:
    """Make ``model.generate`` refuse to feed a prompt in chunks, until ``_prefill`` is deleted from the model again.

    Budgets are shares of the whole prompt and its last rows choose what stays, so a first chunk cannot be compressed as if
    it were the prompt. Later turns, which are appended uncompressed, may come in chunks.
    """
    prefill: Callable[..., Any] | None = getattr(model, "_prefill", None)
    if prefill is None:  # nothing that generates
        return

    @functools.wraps(prefill)
    def checked(input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        size, cache = getattr(generation_config, "prefill_chunk_size", None), cache_of(model_kwargs)
        if size is not None and input_ids.shape[1] > size and (cache is None or not cache.get_seq_length()):
            raise NotImplementedError(
                f"prefill_chunk_size={size} would feed this prompt of {input_ids.shape[1]} tokens in chunks, and compression "
                "needs it whole: leave prefill_chunk_size out (attention statistics take no L x L memory)"
            )
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    model._prefill = checked
