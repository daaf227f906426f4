"""Finds methods, families and metrics by walking the packages and by entry points; near names on a
miss, clash = error.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from effivlm.errors import EffivlmError, shown

if TYPE_CHECKING:
    from effivlm.families.base import Family
    from effivlm.methods.base import Method
    from effivlm.metrics.metric import Metric


class UnknownName(EffivlmError, KeyError):
    """A name that is not registered; the message lists near names."""

    def __str__(self) -> str:
        """The message itself, without the quotes KeyError adds."""
        return str(self.args[0])


class NameClash(EffivlmError, RuntimeError):
    """Two things claim the same name."""


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """``table[name]``, or an error that names what is near.

    Raises:
        UnknownName: if ``name`` is not in ``table``.
    """
    if isinstance(cast("object", name), str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name)[:100], table, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table)[:20])}"
    )
    raise UnknownName(f"unknown {kind} {shown(name)}: {hint}")


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        yield importlib.import_module(info.name)
    for entry in entry_points(group=package):
        yield importlib.import_module(entry.value.partition(":")[0])


def _table(kind: str, found: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    homes: dict[str, str] = {}
    for name, value, home in found:
        if name in table and homes[name] != home:
            raise NameClash(
                f"{kind} {name!r} is defined in {homes[name]} and in {home}: rename one"
            )
        table[name], homes[name] = value, home
    return dict(sorted(table.items()))


@cache
def methods() -> Mapping[str, type["Method"]]:
    """All methods by name: concrete classes with a ``name`` in ``effivlm.methods`` and entry points
    of that group.
    """
    from effivlm.methods.base import Method

    def found() -> Iterator[tuple[str, Any, str]]:
        for module in _modules("effivlm.methods"):
            for value in vars(module).values():
                if (
                    isinstance(value, type)
                    and issubclass(value, Method)
                    and value.__dict__.get("name")
                ):
                    yield value.name, value, f"{value.__module__}.{value.__qualname__}"

    return _table("method", found())


@cache
def families() -> Mapping[str, "Family"]:
    """All families by name: every ``Family`` value in ``effivlm.families`` and entry points of that
    group.
    """
    from effivlm.families.base import Family

    def found() -> Iterator[tuple[str, Any, str]]:
        for module in _modules("effivlm.families"):
            for value in vars(module).values():
                if isinstance(value, Family):
                    yield value.name, value, value.name + " in " + value.origin

    return _table("family", found())


@cache
def metrics() -> Mapping[str, "Metric"]:
    """All metrics by name: every ``Metric`` value in ``effivlm.metrics`` and entry points of that
    group.
    """
    from effivlm.metrics.metric import Metric

    homes: dict[int, str] = {}  # a metric that a second module imports is the same one

    def found() -> Iterator[tuple[str, Any, str]]:
        for module in _modules("effivlm.metrics"):
            for value in vars(module).values():
                if isinstance(value, Metric):
                    yield value.name, value, homes.setdefault(id(value), module.__name__)

    return _table("metric", found())
