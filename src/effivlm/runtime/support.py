"""Which settings a family can carry out; everything else is refused before anything runs."""

from effivlm.families.base import Family
from effivlm.methods.base import EncoderReducer, PreEncoder
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
