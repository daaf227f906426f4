"""Everything a session changes on a model, and how it is put back: what stood there before, in any
order of closing.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

_NOTHING = object()


class Patches:
    """Changes that are undone together.

    Nothing is deleted: what an instance held before (a user's own patch included) comes back. What
    somebody else put over a change of ours meanwhile stays theirs.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give ``owner`` an attribute of its own."""
        before = owner.__dict__.get(name, _NOTHING)
        owner.__dict__[name] = value
        self._stack.callback(_put_back, owner, name, value, before)

    def wrap(self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Any]) -> None:
        """Put ``around(what is there)`` in the place of a method; nothing where there is none."""
        inner = getattr(owner, name, None)
        if inner is not None:
            self.set(owner, name, around(inner))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before a module runs."""
        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs, output)`` after a module has run."""
        self._stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def on_close(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` when everything is undone."""
        self._stack.callback(function, *args)

    def close(self) -> None:
        """Undo everything, last change first."""
        self._stack.close()


def _put_back(owner: Any, name: str, ours: Any, before: Any) -> None:
    if owner.__dict__.get(name, _NOTHING) is not ours:
        return
    if before is _NOTHING:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = before
