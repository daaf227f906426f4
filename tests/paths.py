"""A session driven by any caller, against the masked twin driven the same way; settings that stand for their stages."""

import pytest
import torch
import twin
from tiny import FAMILIES, grid
from twin import Watched, kept_masks

from effivlm.families.tiny import double, exact
from effivlm.runtime.support import Unsupported

# one method of every stage, and a combination
STAGES = (
    "none",
    "downsample@0.5",
    "tome@0.6",
    "divprune@0.5",
    "fastv@0.5:layer=1",
    "snapkv@0.4",
    "divprune@0.6 + fastv@0.6 + h2o@0.4",
)
CACHELESS = STAGES[:5]
PAIRS = [pytest.param(f, s, marks=grid(f)) for f in FAMILIES for s in STAGES]


def under(family, setting, drive, inputs=None, model=None, eager=None):
    """What ``drive(model, inputs)`` gives under a setting, and what it gives on the masked twin; skips what is unsupported."""
    import pytest

    model = exact(family) if model is None else model
    inputs = double(family) if inputs is None else inputs
    try:
        with Watched(model, setting) as session, torch.no_grad():
            got = drive(model, inputs)
    except Unsupported as error:
        pytest.skip(str(error))
    return got, masked(family, session, drive, inputs, eager)


def masked(family, session, drive, inputs, eager=None):
    """``drive`` on the uncompressed model in which what the session dropped is masked."""
    eager = exact(family, "eager") if eager is None else eager
    seen, writes = session.seen.prompt, dict(session.writes)
    prefill, decode = kept_masks(session, eager.get_decoder().config.num_attention_heads)
    if seen.side is not None:
        writes["deepstack"] = {session.host.family.side[1]: seen.side.levels}
    length = seen.visual.shape[1]
    with torch.no_grad(), twin.masked(eager, prefill, decode, length, seen.embeds, writes):
        return drive(eager, inputs)
