"""What a run asks of the host: operations dispatched, and how often the host waits for the device.

The host waits where a number leaves a tensor (`item`, `bool`, `tolist`), where a shape depends on
values (`nonzero`, boolean indices, `unique`) and where tensors are compared as one (`equal`). On a
CPU nothing waits, so it is the calls that are counted: they are the same on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# a composite `item` is seen as such under inference mode, as its last step elsewhere
WAITING = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense item is_nonzero equal nonzero masked_select _unique _unique2 "
        "unique_dim unique_consecutive bincount"
    ).split()
)
READING = frozenset((Tensor.tolist, Tensor.numpy))  # no operation of their own
INDEXING = frozenset(
    f"aten::{name}"
    for name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)


class _Reads(TorchFunctionMode):
    """Counts the readings that no operation stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READING
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Counts inside a ``with`` block.

    Attributes:
        operations: dispatched, views included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self._waits = 0
        self._reads = _Reads()

    @property
    def waits(self) -> int:
        """How often the host waits for the device."""
        return self._waits + self._reads.count

    def __enter__(self) -> "Traffic":
        """Start counting."""
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        """Stop."""
        super().__exit__(*exc)
        self._reads.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        self.operations += 1
        self._waits += _waits(func, args)
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any) -> bool:
    name = func._schema.name
    if name in INDEXING:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "aten::repeat_interleave":
        return "Tensor" in func._overloadname
    return name in WAITING
