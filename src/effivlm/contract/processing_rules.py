"""The rules of methods that act where images are processed: a method's name and a family's name in,
ContractError out. They need a real processor, which the trained checkpoints of the package have.
"""

import torch
from PIL import Image

from effivlm import registry
from effivlm.contract.twin import require
from effivlm.families.tiny import build
from effivlm.methods.base import Processing
from effivlm.prompts import load_model, prepare, prepare_within
from effivlm.runtime.session import Session
from effivlm.runtime.support import Unsupported, check_supported
from effivlm.setting import Setting, parse_setting
from effivlm.specs import ModelSpec
from effivlm.tasks.base import one_turn

CHECKPOINTS = {
    "qwen2_vl": "zoo:mini-qwen2-vl",
    "internvl": "zoo:mini-internvl",
    "llava_onevision": "zoo:mini-llava-onevision",
}


def is_processing(name: str) -> bool:
    """Whether a method acts where images are processed."""
    return issubclass(registry.methods()[name], Processing)


def _setting(name: str, family: str) -> Setting:
    setting = parse_setting(f"{name}@0.6")
    check_supported(setting, registry.families()[family])
    return setting


def sessions_refuse_it(name: str, family: str) -> None:
    """A session around a model is given pixels, and says so."""
    setting = _setting(name, family)
    try:
        Session(build(family), setting)
    except Unsupported:
        return
    require(False, "a session takes the setting, and cannot carry it out")


def budget_is_met_and_pixels_change(name: str, family: str) -> None:
    """The processor makes fewer tokens, not more than the budget; the model takes as many."""
    (part,) = _setting(name, family).parts
    assert part.budget is not None
    loaded = load_model(ModelSpec(name=CHECKPOINTS[family], device="cpu"))
    noise = torch.randint(0, 255, (160, 160, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.byte().numpy())
    question = one_turn("what?", [picture])
    found, whole = prepare_within(loaded, question, part), prepare(loaded, question)
    asked = part.budget.count(found.visual_tokens)
    require(0 < found.kept <= asked, f"{found.kept} tokens where {asked} were asked for")
    require(whole["pixel_values"].shape != found.inputs["pixel_values"].shape, "the same pixels")
    with Session(loaded.model, "none") as session:
        loaded.model(**found.inputs)
    held = session.accounts[0].visual_tokens
    require(held == found.kept, f"the model took {held} visual tokens of {found.kept}")
