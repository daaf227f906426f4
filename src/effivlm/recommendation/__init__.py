"""From records to a decision: which settings to use, at what cost, with what promise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effivlm.recommendation.choice import Advice, Looked, check_asked, choose, look
from effivlm.recommendation.costs import Predict
from effivlm.recommendation.target import RecommendError, parse_target
from effivlm.recommendation.text import lines, plain
from effivlm.records import read_timings


@dataclass(frozen=True)
class Recommendation:
    """Answers, one a model, and where there are several models the joint one.

    Attributes:
        each: in the order of the runs. joint: of settings that every model was run under; None for
            one model, or where they share no setting.
    """

    each: tuple[Advice, ...]
    joint: Advice | None

    def lines(self, every: bool = False) -> list[str]:
        """In words; with ``every``, why each refused setting was refused."""
        told = [*self.each, *([self.joint] if self.joint else [])]
        out = [text for advice in told for text in lines(advice, every)]
        if len(self.each) > 1 and not self.joint:
            out.append("jointly: the models share no setting")
        return out

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        joint = plain(self.joint) if self.joint else None
        return {"each": [plain(a) for a in self.each], "joint": joint}


def recommend(
    *runs: str | Path,
    target: str,
    max_drop: float = 2.0,
    confidence: float = 0.95,
    device: str | None = None,
) -> Recommendation:
    """Settings of finished runs that meet a target and lose little.

    Args:
        runs: folders of runs.
        target: cost that may remain, as a share of the original's, such as ``ttft=0.5x``; axes:
            `recommendation.target.ASKED`.
        max_drop: points of score, mean over tasks, that may be lost.
        confidence: that no setting listed as certain loses more, of all of them together.
        device: predict times and memory for it (`effivlm predict`) where nothing was timed.

    Raises:
        RecommendError: for a bad target, drop or confidence, or a cost that is not known.
            StoreError, MetricError: for runs that cannot be read or compared. UnknownName: for an
            unknown device.
    """
    from effivlm.report.write import read_rows

    asked = parse_target(target)
    check_asked(max_drop, confidence)
    if not runs:
        raise RecommendError("expected the folder of a run, such as runs/default, got none")
    predict = _predictor(device) if device is not None else None
    looked: list[Looked] = []
    for folder in map(Path, runs):
        looked += _named(
            look(read_rows(folder), read_timings(folder), asked, predict), folder, looked
        )
    each = tuple(choose([one], asked, max_drop, confidence) for one in looked)
    shared = set[str].intersection(*(set(one.losses) for one in looked))
    joint = choose(looked, asked, max_drop, confidence) if len(looked) > 1 and shared else None
    return Recommendation(each, joint)


def _named(found: Sequence[Looked], folder: Path, before: Sequence[Looked]) -> list[Looked]:
    """A model of two runs is named with its folder the second time."""
    known = {one.model for one in before}
    return [replace(x, model=f"{x.model} ({folder})") if x.model in known else x for x in found]


def _predictor(device: str) -> Predict:
    from effivlm.measure import peaks
    from effivlm.measure.shares import predicted_shares

    peaks.stated(device)  # an unknown one is an error whether it is needed or not
    return lambda model, settings, what: predicted_shares(model, settings, what, device)


__all__ = ["Advice", "RecommendError", "Recommendation", "choose", "look", "recommend"]
