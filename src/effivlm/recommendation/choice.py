"""Which settings meet a target, cannot be shown to lose more than a drop, and are on the front: a
pure function of rows and timings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effivlm.metrics.front import pareto
from effivlm.metrics.losses import Loss, loss_of, within
from effivlm.metrics.performance import MetricError
from effivlm.recommendation.costs import Cost, Costs, Predict, costs_of, dearest
from effivlm.recommendation.target import RecommendError, Target
from effivlm.records import TimingRecord
from effivlm.report.rows import Row

MOST = 5  # settings in an answer
REASONS = {
    "unknown cost": "their cost on the target's axis is not known",
    "dear": "they miss the target",
    "unknown loss": "their documents allow no interval",
    "loses": "they are shown to lose more than the drop",
    "off the front": "another that is left costs no more and is at least as good",
    "beyond": f"more than {MOST} are left; these may lose more",
}


@dataclass(frozen=True)
class Choice:
    """A setting that may be used. Points are of the model on which it loses most.

    Attributes:
        setting: its text form. cost: share of the original's, on the dearest model.
        difference: score - original as observed, mean over tasks. low, high: one-sided ends, each
            with ``level``, the confidence of its own that the joint one asks for.
        level: in (0, 1). certain: whether it is shown to lose less than the drop.
        documents: compared, of the model that has fewest. needed: documents that would decide 4
            times of 5, were the difference as observed; 0 where it is decided.
        reaches: whether the cost's interval reaches beyond the target.
    """

    setting: str
    cost: Cost
    difference: float
    low: float
    high: float
    level: float
    certain: bool
    documents: int
    needed: float
    reaches: bool

    @property
    def code(self) -> str:
        """The line to use it with."""
        return f"with effivlm.compress(model, {self.setting!r}):".replace("'", '"')


@dataclass(frozen=True)
class Refusal:
    """A setting that is not recommended: a key of `REASONS`, and what was found."""

    setting: str
    reason: str
    found: str


@dataclass(frozen=True)
class Advice:
    """An answer for one model, or for several jointly.

    Attributes:
        models: it is for. target, drop, confidence: what was asked; the drop in points.
        costs: how the costs are known, in words. certain: shown to lose less than the drop, all of
            them together with the confidence. open: not shown to lose more, nor less. refused: all
            others.
    """

    models: tuple[str, ...]
    target: Target
    drop: float
    confidence: float
    costs: str
    certain: tuple[Choice, ...]
    open: tuple[Choice, ...]
    refused: tuple[Refusal, ...]

    @property
    def considered(self) -> int:
        """How many settings were looked at."""
        return len(self.certain) + len(self.open) + len(self.refused)

    def counts(self) -> dict[str, int]:
        """Reason -> settings refused for it, in the order in which they are asked."""
        found = [r.reason for r in self.refused]
        return {reason: found.count(reason) for reason in REASONS if reason in found}


@dataclass(frozen=True)
class Looked:
    """All that is known of one model: losses and costs of its settings."""

    model: str
    losses: Mapping[str, Loss]
    costs: Costs


def look(
    rows: Sequence[Row],
    timings: Sequence[TimingRecord],
    target: Target,
    predict: Predict | None = None,
) -> list[Looked]:
    """What is known of every model in ``rows``.

    Raises:
        MetricError: for a model without ``none``. RecommendError: see `costs_of`.
    """
    out: list[Looked] = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        if all(r.setting != "none" for r in mine):
            raise MetricError(f"{model} has no records under 'none': nothing to compare with")
        if len(mine) < 2:
            raise RecommendError(f"{model} was run under 'none' only: nothing to choose from")
        losses = {r.setting: loss_of(r.pairs) for r in mine if r.setting != "none"}
        times = [t for t in timings if t.model == model]
        out.append(Looked(model, losses, costs_of(mine, times, target, predict)))
    return out


@dataclass(frozen=True)
class _Candidate:
    """A setting on all models that are asked for."""

    setting: str
    cost: Cost
    losses: tuple[Loss, ...]

    @property
    def worst(self) -> float:
        """The difference on the model that loses most."""
        return min(x.value for x in self.losses)


def choose(
    looked: Sequence[Looked], target: Target, drop: float, confidence: float = 0.95
) -> Advice:
    """One answer for all models given: of the settings that every one of them was run under.

    Candidates are those that meet the target, whatever they lose, so that the confidence of the
    answer counts every setting that might have come out best by chance.

    Raises:
        RecommendError: for a drop that is not in [0, 100) or a confidence not in [0.5, 1).
    """
    check_asked(drop, confidence)
    refused: list[Refusal] = []
    left: list[_Candidate] = []
    for setting in looked[0].losses:
        if not all(setting in one.losses for one in looked):
            continue
        losses = tuple(one.losses[setting] for one in looked)
        each = _Candidate(setting, dearest([one.costs.of[setting] for one in looked]), losses)
        refusal = _refusal(each, target)
        if refusal:
            refused.append(refusal)
        else:
            left.append(each)
    sure, own = within({c.setting: c.losses for c in left}, drop, confidence)
    certain = [c for c in left if c.setting in sure]
    lost = {c.setting: -min(x.high(confidence) for x in c.losses) for c in left}
    refused += [
        Refusal(s, "loses", f"at least {x:.1f} points") for s, x in lost.items() if x > drop
    ]
    rest = [c for c in left if c.setting not in sure and lost[c.setting] <= drop]
    certain, beaten = _front(certain, certain)
    rest, beaten_too = _front(rest, [*certain, *rest])
    refused += beaten + beaten_too
    levels = [(c, sure.get(c.setting, own), c.setting in sure) for c in certain + rest]
    choices = [_choice(*one, target, drop, confidence) for one in levels]
    choices.sort(key=lambda c: (not c.certain, -c.low))
    refused += [Refusal(c.setting, "beyond", f"{c.difference:+.1f} points") for c in choices[MOST:]]
    return Advice(
        models=tuple(one.model for one in looked),
        target=target,
        drop=drop,
        confidence=confidence,
        costs="; ".join(dict.fromkeys(one.costs.how for one in looked)),
        certain=tuple(c for c in choices[:MOST] if c.certain),
        open=tuple(c for c in choices[:MOST] if not c.certain),
        refused=tuple(refused),
    )


def check_asked(drop: float, confidence: float) -> None:
    """Raises RecommendError for a drop or a confidence that means nothing."""
    if not 0 < drop < 100:
        raise RecommendError(
            f"--max-drop {drop:g}: expected points of score, above 0 and below 100, such as 2"
            " (that nothing at all is lost cannot be shown by any number of documents)"
        )
    if not 0.5 <= confidence < 1:
        raise RecommendError(
            f"--confidence {confidence:g}: expected at least 0.5 and below 1, such as 0.95"
        )


def _refusal(c: _Candidate, target: Target) -> Refusal | None:
    if c.cost.missing:
        return Refusal(c.setting, "unknown cost", c.cost.missing)
    if c.cost.share > target.share * (1 + 1e-9):
        return Refusal(c.setting, "dear", f"{target.name} {c.cost.share:.3g}x")
    if not all(x.known for x in c.losses):
        return Refusal(c.setting, "unknown loss", "a task has fewer than two independent documents")
    return None


def _front(
    some: Sequence[_Candidate], among: Sequence[_Candidate]
) -> tuple[list[_Candidate], list[Refusal]]:
    """Those of ``some`` that are on the front of ``among``, and why the others are not."""
    on = pareto([c.cost.share for c in among], [c.worst for c in among])
    front = [c for c, is_on in zip(among, on, strict=True) if is_on]
    kept = [c for c in some if c in front]
    gone: list[Refusal] = []
    for c in some:
        if c not in front:
            better = [x for x in front if x.worst >= c.worst - 1e-6]
            by = min(better, key=lambda x: x.cost.share).setting
            gone.append(Refusal(c.setting, "off the front", f"{by} is better"))
    return kept, gone


def _needed(c: _Candidate, level: float, drop: float, confidence: float) -> float:
    """It stays within on all models, or is refused for one."""
    against = [x.needed(drop, confidence) for x in c.losses if x.value < -drop]
    return min(against) if against else max(x.needed(drop, level) for x in c.losses)


def _choice(
    c: _Candidate, level: float, certain: bool, target: Target, drop: float, confidence: float
) -> Choice:
    worst = min(c.losses, key=lambda x: x.low(level))
    return Choice(
        setting=c.setting,
        cost=c.cost,
        difference=c.worst,
        low=worst.low(level),
        high=min(x.high(level) for x in c.losses),
        level=level,
        certain=certain,
        documents=min(x.documents for x in c.losses),
        needed=0.0 if certain else _needed(c, level, drop, confidence),
        reaches=c.cost.high > target.share * (1 + 1e-9),
    )
