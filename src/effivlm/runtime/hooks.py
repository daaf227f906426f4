"""The seam for measuring: every hook of a session passes through one wrapper."""

from collections.abc import Callable
from typing import Any

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def unwrapped(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook as it is; measuring passes a wrapper that times it.

    Args:
        what: ``method`` for a hook, ``model`` for the model's own work that a hook calls.
        function: what is hooked.
    """
    return function
