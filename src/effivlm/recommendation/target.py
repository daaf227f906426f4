"""What is asked for: a cost, and how much of the original's may remain."""

import re
from dataclasses import dataclass

from effivlm.errors import EffivlmError, shown
from effivlm.report.rows import AXES


class RecommendError(EffivlmError, ValueError):
    """A recommendation that cannot be given; the message says what was expected."""


@dataclass(frozen=True)
class Axis:
    """A cost that can be asked for.

    Attributes:
        help: what it is. stage: its key among the timed stages and the predictions; empty if it is
            not a time. memory: its key among measured memory; empty if it is none. predicted:
            attribute of a prediction. counted: the axis (see `AXES`) that stands for it where
            nothing was timed; empty if nothing can.
    """

    help: str
    stage: str = ""
    memory: str = ""
    predicted: str = ""
    counted: str = ""


ASKED = {
    "ttft": Axis("time to the first token", "ttft", "", "ttft", "prefill_flops"),
    "decode": Axis(
        "time of a decoded token",
        "decode_per_token",
        "",
        "decode_per_token",
        "decode_bytes_per_token",
    ),
    "total": Axis("time to the last token", "total", "", "total"),
    "memory": Axis("peak memory of the device, weights included", "", "allocated", "memory"),
    "tokens": Axis("visual tokens, mean over layers", counted="visual_mean"),
    "kv": Axis("KV bytes held", counted="kv_bytes_held"),
    "flops": Axis("prefill FLOPs", counted="prefill_flops"),
} | {name: Axis(what, counted=name) for name, what in AXES.items() if name != "asked"}


@dataclass(frozen=True)
class Target:
    """At most ``share`` of the original's cost on an axis of `ASKED`; in (0, 1]."""

    name: str
    share: float

    @property
    def axis(self) -> Axis:
        """What it is a share of."""
        return ASKED[self.name]

    def __str__(self) -> str:
        return f"{self.name} at most {self.share:.3g}x"


def parse_target(text: str) -> Target:
    """Read ``ttft=0.5x``; ``0.5`` and ``50%`` are the same.

    Raises:
        RecommendError: for an unknown axis, or a share that is not in (0, 1].
    """
    name, equals, amount = (part.strip() for part in text.partition("="))
    if not equals:
        raise RecommendError(
            f"--target {shown(text)}: expected AXIS=SHARE, such as ttft=0.5x; axes:"
            f" {', '.join(ASKED)}"
        )
    if name not in ASKED:
        raise RecommendError(
            f"--target {shown(text)}: unknown axis {shown(name)}: expected one of"
            f" {', '.join(ASKED)}"
        )
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([x%]?)", amount)
    share = float(number[1]) / (100 if number[2] == "%" else 1) if number else 0.0
    if not 0 < share <= 1:
        raise RecommendError(
            f"--target {shown(text)}: expected the share of the original's cost that may remain,"
            f" above 0 and at most 1, such as {name}=0.5x for half"
        )
    return Target(name, share)
