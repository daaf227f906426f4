"""An answer in words, and as plain data."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from effivlm.recommendation.choice import MOST, REASONS, Advice, Choice


def lines(advice: Advice, every: bool = False) -> list[str]:
    """What a reader is told; with ``every``, why each refused setting was refused."""
    whom = " and ".join(advice.models)
    out = [
        f"{whom}: {advice.target}, less than {advice.drop:g} points lost,"
        f" confidence {100 * advice.confidence:g} %",
        f"  costs: {advice.costs}",
    ]
    out += _listed(
        f"shown to lose less than {advice.drop:g} points, all of them together", advice.certain
    )
    out += _listed(
        f"not shown to lose more than {advice.drop:g} points, nor less: no promise", advice.open
    )
    if not advice.certain and not advice.open:
        out.append(f"  none of {advice.considered} settings can be recommended")
    out += _ruled_out(advice, every)
    out += _more(advice)
    if advice.certain:
        out += [f"  use it: {advice.certain[0].code}", "              model.generate(**inputs)"]
    return out


def _listed(title: str, choices: Sequence[Choice]) -> Iterator[str]:
    if choices:
        yield f"  {title}:"
    for c in choices:
        needs = "" if c.certain else f"; {_documents(c.needed)} would decide"
        beyond = f" (its interval reaches {c.cost.high:.2f}x)" if c.reaches else ""
        yield (
            f"    {c.setting}: cost {c.cost.share:.2f}x{beyond}, {c.difference:+.1f} points,"
            f" at least {c.low:+.1f} on {c.documents} documents{needs}"
        )


def _documents(count: float) -> str:
    """To two digits, rounded up."""
    if not count < 1e7:
        return "no number of documents"
    step = 10 ** max(0, len(str(math.ceil(count))) - 2)
    return f"about {math.ceil(count / step) * step} documents"


def _ruled_out(advice: Advice, every: bool) -> Iterator[str]:
    counts = advice.counts()
    if counts:
        yield f"  ruled out, {len(advice.refused)} of {advice.considered} settings:"
    for reason, count in counts.items():
        yield f"    {count}: {REASONS[reason]}"
        for r in advice.refused if every else ():
            if r.reason == reason:
                yield f"      {r.setting}: {r.found}"


def _more(advice: Advice) -> Iterator[str]:
    """What more measuring would change."""
    counts = advice.counts()
    if advice.open:
        within = [c for c in advice.open if c.difference > -advice.drop]
        soonest = min(within or advice.open, key=lambda c: c.needed)
        towards = "for" if within else "against"
        yield (
            f"  more documents: {_documents(soonest.needed)} in the same mix would decide {towards}"
            f" {soonest.setting}, 4 times of 5, if it differs by {soonest.difference:+.1f} points;"
            f" there are {soonest.documents}"
        )
    if "unknown cost" in counts:
        yield (
            f"  more timings: {counts['unknown cost']} settings have no cost here; `effivlm"
            " measure` with them may add some"
        )
    if not advice.open and "unknown cost" not in counts:
        dear, loses = counts.get("dear", 0), counts.get("loses", 0)
        yield (
            "  more measuring of these settings would hardly change the answer"
            if advice.certain
            else f"  more measuring would hardly help: {dear} miss the target, {loses} lose too"
            " much; ask for less, or run other settings"
        )


def plain(advice: Advice) -> dict[str, Any]:
    """As plain data for JSON; points and shares, None where undefined or infinite."""
    return {
        "models": list(advice.models),
        "target": {"axis": advice.target.name, "share": advice.target.share},
        "max_drop": advice.drop,
        "confidence": advice.confidence,
        "costs": advice.costs,
        "most": MOST,
        "certain": [_plain(c) for c in advice.certain],
        "open": [_plain(c) for c in advice.open],
        "ruled_out": [
            {"setting": r.setting, "reason": r.reason, "found": r.found} for r in advice.refused
        ],
        "counts": advice.counts(),
    }


def _plain(c: Choice) -> dict[str, Any]:
    return {
        "setting": c.setting,
        "cost": c.cost.share,
        "cost_high": c.cost.high if math.isfinite(c.cost.high) else None,
        "difference": c.difference,
        "low": c.low,
        "high": c.high,
        "level": c.level,
        "documents": c.documents,
        "documents_needed": c.needed if math.isfinite(c.needed) else None,
        "code": c.code,
    }
