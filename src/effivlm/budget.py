"""The one budget rule: how a retained share or a token count becomes an integer number of tokens.

Every method, stage and unit rounds here and nowhere else: ``k = min(n, max(1, floor(keep * n)))``.
Parts of a budget come by subtraction or by largest remainder, so totals are exact.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from effivlm.errors import EffivlmError, shown

SMALLEST = 1e-9  # share
UNITS = ("visual", "visual_mean", "prompt_kv", "weights")


class BudgetError(EffivlmError, ValueError):
    """A budget that is malformed, ambiguous or cannot be met."""


@dataclass(frozen=True)
class Budget:
    """A retained share in (0, 1] or a count of tokens per image, with its unit.

    Attributes:
        share: retained share, or None when ``tokens`` is given.
        tokens: retained tokens per image, or None when ``share`` is given.
        unit: ``visual`` (of the visual tokens at the cut), ``visual_mean`` (of visual tokens,
            averaged over the inputs of all decoder layers), ``prompt_kv`` (of the prompt's KV
            entries, averaged over layers) or ``weights`` (of the language model's matrices).
        text: the budget's one form, however it was written: ``0.5`` for 0.5, 50% and 1/2, ``1/3``
            for what no decimal number is, ``64`` for 64 and 64tok.
    """

    share: float | None
    tokens: int | None
    unit: str
    text: str

    def count(self, n: int) -> int:
        """Tokens kept of ``n``: ``min(n, max(1, floor(share * n)))``; ``n = 0`` keeps 0."""
        if n == 0:
            return 0
        if self.tokens is not None:
            return min(n, self.tokens)
        assert self.share is not None
        return min(n, max(1, math.floor(self.share * n + 1e-9)))

    def as_share(self, n: int) -> float:
        """The retained share of ``n`` tokens this budget asks for, unrounded."""
        return min(1.0, self.tokens / n) if self.tokens is not None else float(self.share or 0.0)

    @property
    def full(self) -> bool:
        """Whether the budget keeps everything, whatever the length."""
        return self.share == 1.0


def parse_budget(text: str, unit: str) -> Budget:
    """Read ``0.1``, ``10%``, ``1/3``, ``1.0`` (shares), ``64`` or ``1tok`` (tokens per image).

    Raises:
        BudgetError: for 0, negative, non-numeric values, shares above 1, the ambiguous bare ``1``
            or an unknown unit.
    """
    if unit not in UNITS:
        raise BudgetError(f"unknown budget unit {unit!r}: expected one of {', '.join(UNITS)}")
    raw = text.strip()
    expected = "a share in (0, 1] such as 0.1, 10% or 1/3, or tokens per image such as 64 or 64tok"
    if raw == "1":
        raise BudgetError(
            "budget '@1' is ambiguous: write '@1.0' to keep everything or '@1tok' to keep one token"
        )
    if _TOKENS.fullmatch(raw):
        return _tokens(int(raw.removesuffix("tok")), unit, raw)
    found = _SHARE.fullmatch(raw)
    if found is None or not int(found["below"] or 1):
        raise BudgetError(f"budget {shown(text, 60)} is not a number: expected {expected}")
    exact = Fraction(found["number"]) / int(found["below"] or 1) / (100 if found["percent"] else 1)
    share = float(exact)
    if not 0 < share <= 1:
        raise BudgetError(f"budget {text!r} is the share {share:g}: expected {expected}")
    if share < SMALLEST:
        raise BudgetError(f"budget {text!r} is below {SMALLEST:g}: no image has so many tokens")
    return Budget(share, None, unit, _plain(exact))


# lengths are bounded, so that no exponent is too large to be computed
_TOKENS = re.compile(r"[-+]?[0-9]{1,9}(tok)?")
_SHARE = re.compile(
    r"(?P<number>[-+]?(?:[0-9]{1,60}(?:\.[0-9]{0,60})?|\.[0-9]{1,60})(?:[eE][-+]?[0-9]{1,2})?)"
    r"(?:/(?P<below>[0-9]{1,60}))?(?P<percent>%)?"
)


def _plain(share: Fraction) -> str:
    """One form of a share: decimal where that is exact, else a fraction."""
    if share == 1:
        return "1.0"
    rest = share.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1:
        return f"{share.numerator}/{share.denominator}"
    places = 0
    while 10**places % share.denominator:
        places += 1
    return f"0.{share.numerator * 10**places // share.denominator:0{places}d}"


def _tokens(tokens: int, unit: str, text: str) -> Budget:
    if tokens < 1:
        raise BudgetError(f"budget '@{text}' asks for {tokens} tokens: expected at least 1")
    if unit in ("prompt_kv", "weights"):
        raise BudgetError(
            f"budget '@{text}' counts tokens per image, but the unit is {unit}: give a share"
            " such as @0.5"
        )
    return Budget(None, tokens, unit, "1tok" if tokens == 1 else str(tokens))


def split(total: int, weights: Sequence[float], caps: Sequence[int] | None = None) -> list[int]:
    """Split ``total`` in proportion to ``weights`` by largest remainder; sums to ``total`` exactly,
    never above ``caps``.

    What a capped part cannot take is shared out among the others in the same proportion. Ties go to
    the lower index.

    Raises:
        BudgetError: if the caps together cannot hold ``total``.
    """
    limits = list(caps) if caps is not None else [total] * len(weights)
    if sum(limits) < total:
        raise BudgetError(f"cannot place {total} entries where only {sum(limits)} fit")
    ideal = _water_fill(total, weights, limits)
    out = [math.floor(x + 1e-9) for x in ideal]
    room = [i for i in range(len(out)) if out[i] < limits[i]]
    for i in sorted(room, key=lambda i: (out[i] - ideal[i], i))[: total - sum(out)]:
        out[i] += 1
    return out


def _water_fill(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[float]:
    """Real-valued shares in proportion to ``weights``; parts at their limit are fixed and the rest
    rescaled.
    """
    out = [0.0] * len(weights)
    free: set[int] = set(range(len(weights)))
    while free:
        left = total - sum(out[i] for i in range(len(out)) if i not in free)
        mass = sum(weights[i] for i in free)
        share = {i: left * (weights[i] / mass if mass > 0 else 1 / len(free)) for i in free}
        full = {i for i in free if share[i] >= limits[i]}
        for i in full or free:
            out[i] = float(limits[i]) if full else share[i]
        free = free - full if full else set[int]()
    return out


def solve_mean(share: float, layers: int, cuts: Sequence[tuple[int, float]]) -> float:
    """The multiplier m for which cuts ``(layer, m * ratio)`` retain ``share`` on average over layer
    inputs.

    Layers before the first cut see everything. Each stage share is capped at 1 and at its
    predecessor's share.

    Args:
        share: average retained share asked for, in (0, 1].
        layers: number of decoder layers.
        cuts: ``(layer, ratio)`` ascending; the cut happens before ``layer``.

    Raises:
        BudgetError: if even m = 0 retains more than ``share``; the message names the smallest
            feasible share.
    """
    first = cuts[0][0]
    if share <= first / layers:
        raise BudgetError(
            f"visual_mean budget {share:g} is infeasible: layers 0..{first - 1} of {layers} see"
            f" every visual token, so the smallest feasible share is above {first / layers:.4f};"
            " cut earlier or ask for more"
        )

    def mean(m: float) -> float:
        total, previous = float(first), 1.0
        for i, (layer, ratio) in enumerate(cuts):
            previous = min(previous, m * ratio)
            end = cuts[i + 1][0] if i + 1 < len(cuts) else layers
            total += previous * (end - layer)
        return total / layers

    low, high = 0.0, 1.0 / min(r for _, r in cuts)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= share else (low, middle)
    return high if mean(high) <= share + 1e-12 else low
