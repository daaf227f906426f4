"""Parameters and modules that stand aside for others, and come back: the same objects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Table = dict[str, Any]  # of a module: `_parameters` or `_modules`


class Swaps:
    """Exchanges of entries in modules' tables, undone and done again together."""

    def __init__(self) -> None:
        self._before: list[tuple[Table, str, Any]] = []
        self._after: list[Any] = []

    def put(self, table: Table, key: str, new: Any) -> None:
        """Exchange an entry; the first one to stand there is what comes back."""
        for i, (known, name, _) in enumerate(self._before):
            if known is table and name == key:
                self._after[i] = new
                break
        else:
            self._before.append((table, key, table[key]))
            self._after.append(new)
        table[key] = new

    def weight(self, module: nn.Module, new: Tensor) -> None:
        """Exchange a module's weight, in its own dtype."""
        old: Any = module.weight
        made = nn.Parameter(new.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        self.put(_table(module._parameters), "weight", made)

    def original(self, module: nn.Module) -> Any:
        """The weight that stood in a module first."""
        for table, key, old in self._before:
            if table is module._parameters and key == "weight":
                return old
        return module.weight

    def undo(self) -> None:
        """Put the originals back."""
        for table, key, old in self._before:
            table[key] = old

    def redo(self) -> None:
        """Put in what was there before `undo`."""
        for (table, key, _), new in zip(self._before, self._after, strict=True):
            table[key] = new


def _table(table: Any) -> Table:
    return table


@contextmanager
def weights_for_now(modules: list[nn.Module], new: list[Tensor]) -> Iterator[None]:
    """Other weights in modules, inside the block."""
    swaps = Swaps()
    try:
        for module, weight in zip(modules, new, strict=True):
            swaps.weight(module, weight)
        yield
    finally:
        swaps.undo()
