"""Everything that belongs to one prefill, and what identifies a prompt."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from effivlm.runtime.attention import AttentionCall
from effivlm.runtime.audit import Promise
from effivlm.runtime.stages import Notes, Scored
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part


@dataclass
class State:
    """Everything that belongs to one prefill.

    Attributes:
        prompt: tokens in play. promise: counts by budget. notes: scratch of hybrid methods.
        scores: what cache methods read, layer by layer. inputs: recorded layer inputs (sharing).
        position: [B, 1] or [axes, B, 1], position of the first generated token in the model's own
            numbering.
        delta: what decode positions are reduced by under repacking, or None.
        memo: signals by place, dropped as layers pass. special_mask: attention is not plainly
            causal.
    """

    prompt: Prompt
    position: Tensor
    special_mask: bool
    promise: Promise = field(default_factory=lambda: Promise([]))
    notes: Notes = field(default_factory=dict)
    scores: dict[Part, list[Scored]] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor | None, dict[str, Any], AttentionCall | None]] = field(
        default_factory=dict
    )
    delta: Tensor | None = None
    memo: dict[Any, dict[Any, Tensor]] = field(default_factory=dict)


def side_rows(side: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """Deep-stack inputs of the tokens at ``index`` [B, M]: their visual mask, and the feature rows
    that are left.
    """
    visual = side["visual_pos_masks"]
    rank = (visual.flatten().long().cumsum(0) - 1).view_as(visual)
    mask = visual.gather(1, index)
    rows = rank.gather(1, index)[mask]
    return {
        "visual_pos_masks": mask,
        "deepstack_visual_embeds": [f[rows] for f in side["deepstack_visual_embeds"]],
    }


def prompt_keys(ids: Tensor | None, embeds: Tensor, real: Tensor) -> list[int]:
    """Per row, an integer that identifies the prompt whatever batch it is in."""
    out = []
    for row in range(len(real)):
        content = (
            ids[row][real[row].to(ids.device)]
            if ids is not None
            else embeds[row][real[row]].float().sum(-1)
        )
        digest = hashlib.sha256(content.cpu().numpy().tobytes()).digest()
        out.append(int.from_bytes(digest[:7], "little"))
    return out
