"""What the pruning methods share: the pattern of a row, its check against the budget, promises."""

import re
from dataclasses import dataclass

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import Weights
from effivlm.methods.linears import Linear, Promise, WeightsError

PATTERN = re.compile(r"([1-9]\d*)of([1-9]\d*)")


def read_pattern(pattern: str | None) -> tuple[int, int]:
    """(pruned, of how many inputs) of ``2of4``, where 2 of every 4 stay; (0, 0) of None.

    Raises:
        ValueError: for anything else.
    """
    if pattern is None:
        return 0, 0
    found = PATTERN.fullmatch(pattern)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"pattern={pattern!r}: expected NofM, N of every M inputs kept, such as 2of4"
        )
    return int(found[2]) - int(found[1]), int(found[2])


@dataclass(frozen=True)
class Sparse(Weights):
    """A pruning method with a budget anywhere in a row, or a pattern.

    Attributes:
        pattern: ``2of4``: of every 4 inputs of a row 2 stay; it takes no budget.
    """

    pattern: str | None = None

    budget = "optional"

    def __post_init__(self) -> None:
        read_pattern(self.pattern)

    def check_budget(self, budget: Budget | None) -> None:
        """Exactly one of budget and pattern."""
        if budget is None and self.pattern is None:
            raise BudgetError(
                f"{self.name} needs the share of weights it keeps, or a pattern: write"
                f" {self.name}@0.5 or {self.name}:pattern=2of4"
            )
        if budget is not None and self.pattern is not None:
            raise BudgetError(
                f"{self.name}@{budget.text}:pattern={self.pattern} says twice how much is kept:"
                " leave out the budget or the pattern"
            )

    def n_of_m(self, linear: Linear) -> tuple[int, int]:
        """(pruned, of how many) for one layer; (0, 0) without a pattern.

        Raises:
            WeightsError: for a pattern that does not divide the layer's width.
        """
        n, m = read_pattern(self.pattern)
        if m and linear.weight.shape[1] % m:
            raise WeightsError(
                f"{linear.name} has {linear.weight.shape[1]} inputs, which {self.name}:pattern="
                f"{self.pattern} cannot divide into runs of {m}: choose another pattern"
            )
        return n, m

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """The same count in every row, or in every run."""
        n, m = read_pattern(self.pattern)
        row = columns - (columns // m * n if m else int(columns * share))
        return Promise(rows * row, row, (m - n, m) if m else None)
