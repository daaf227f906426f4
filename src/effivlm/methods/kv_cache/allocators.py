"""Layer allocators: how many entries every layer keeps, given lengths, a share and, for some, one
number per layer. `counts` of a cache method applies one.

Each spends exactly what keeping the share of every layer would spend, unless its docstring says
otherwise.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from effivlm.budget import Budget, BudgetError, split
from effivlm.methods.base import Room
from effivlm.methods.kv_cache.scoring import recent
from effivlm.ops.allocate import bounded, density_shares, pyramid, pyramid_floor


class Allocator(Protocol):
    """How a budget is spread over layers."""

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer.

        Args:
            lengths: [layers] entries held now.
            share: of every layer's entries; None for a method with a rule of its own and no budget.
            statistics: [layers], or None for an allocator that reads none.
        """
        ...


def allocated(allocator: Allocator, room: Room, budget: Budget | None) -> list[int]:
    """The counts of an allocator; until the statistics are known, those of an even share."""
    share = None if budget is None else budget.as_share(room.n)
    if room.statistics is None:
        return list(room.lengths) if share is None else uniform_counts(list(room.lengths), share)
    return allocator(list(room.lengths), share, list(room.statistics))


def uniform_counts(lengths: list[int], share: float) -> list[int]:
    """What every layer keeps when all keep the same share."""
    budget = Budget(share, None, "prompt_kv", f"{share:g}")
    return [budget.count(n) for n in lengths]


@dataclass(frozen=True)
class Pyramid:
    """Less and less from the first layer to the last (PyramidKV); every layer has the window of the
    mean budget.

    Behind a cut inside the LLM layers hold unequal lengths. The line is laid through the mean of
    all layers; a layer that holds less than its part keeps all it holds, and the others take the
    rest in proportion: no layer gets more than one before it, unless that one keeps everything.

    Attributes:
        beta: mean over last-layer budget. window: share of the mean budget that is the recent
            window.
        variant: ``exact``, or ``effivlm`` with the published integer step, which overspends small
            budgets up to twofold.
    """

    beta: int
    window: float
    variant: Literal["exact", "effivlm"] = "exact"

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer."""
        assert share is not None
        caps, layers = uniform_counts(lengths, share), len(lengths)
        if self.variant == "effivlm":
            plans = [
                pyramid_floor(c, recent(c, self.window), n, layers, self.beta)
                for c, n in zip(caps, lengths, strict=True)
            ]
            return [plan[i] for i, plan in enumerate(plans)]
        mean = sum(caps) / layers
        window = recent(int(mean), self.window)
        line = pyramid(mean - window, layers, max(lengths) - window, self.beta)
        return split(sum(caps), [window + x for x in line], lengths)


@dataclass(frozen=True)
class Density:
    """More for layers whose attention is denser (VL-Cache), part of it spread evenly if asked
    (EffiVLM-Bench's U-40, U-80).

    Attributes:
        window: share of the mean budget that every layer keeps as recent window, outside the
            competition.
        uniform: part of the budget spread evenly: 0 (adaptive only), 0.4 (U-40), 0.8 (U-80).
        low: least share of its length a layer keeps; above it layers are water-filled up to their
            length.
        renormalise: False clips to [low, 1] and leaves it there, as published: the total then
            differs from what was asked.
    """

    window: float
    uniform: float = 0.0
    low: float = 0.01
    renormalise: bool = True

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer; ``statistics`` are densities in [0, 1]."""
        assert statistics is not None and share is not None
        caps = uniform_counts(lengths, share)
        windows = [recent(c, self.window) for c in caps]
        rest = 1 - self.window  # of budget and floor: the window takes the other part
        if not self.renormalise:
            shares = density_shares(self.mixed(statistics), rest * share, rest * self.low)
            return [
                min(n, w + max(1, int(s * n)))
                for n, w, s in zip(lengths, windows, shares, strict=True)
            ]
        room = [n - w for n, w in zip(lengths, windows, strict=True)]
        floors = [int(rest * self.low * n) for n in lengths]
        weights = [m * n for m, n in zip(self.mixed(statistics), lengths, strict=True)]
        heavy = bounded(sum(caps) - sum(windows), weights, floors, room)
        return [h + w for h, w in zip(heavy, windows, strict=True)]

    def mixed(self, density: list[float]) -> list[float]:
        """Each layer's part of the budget, summing to 1: ``uniform`` of it even, the rest in
        proportion to density.
        """
        mass, layers = sum(density), len(density)
        return [
            self.uniform / layers + (1 - self.uniform) * (d / mass if mass > 0 else 1 / layers)
            for d in density
        ]


@dataclass(frozen=True)
class Hybrid:
    """Any adaptive allocator with part of the budget spread evenly over layers (EffiVLM-Bench 5.1:
    U-40, U-80).

    Attributes:
        inner: the adaptive one. uniform: the part spread evenly; the counts of ``inner`` are
            mixed, their total kept.
    """

    inner: Allocator
    uniform: float

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer; without a budget what the inner one keeps.

        Raises:
            BudgetError: for ``uniform`` without a budget, which it would be a part of.
        """
        own = self.inner(lengths, share, statistics)
        if self.uniform == 0:
            return own
        if share is None:
            raise BudgetError(
                f"uniform={self.uniform} spreads a budget, and none was given: write for example"
                f" plphp@0.2:uniform={self.uniform}, or leave uniform out"
            )
        even = uniform_counts(lengths, share)
        wish = [self.uniform * e + (1 - self.uniform) * o for e, o in zip(even, own, strict=True)]
        return split(sum(own), wish, lengths)


@dataclass(frozen=True)
class Proportional:
    """Statistics are the shares a method's own rule keeps; a budget scales them, without one they
    hold as they are.
    """

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer."""
        assert statistics is not None
        own = [s * n for s, n in zip(statistics, lengths, strict=True)]
        if share is None:
            return [round(x) for x in own]
        return bounded(sum(uniform_counts(lengths, share)), own, [1] * len(own), lengths)
