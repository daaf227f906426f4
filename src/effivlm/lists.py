"""What `effivlm list` can list; what needs no heavy import waits for none."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points

from effivlm import outline, registry


def _methods() -> Iterator[str]:
    if entry_points(group="effivlm.methods"):  # of other packages: only importing them tells
        yield from _from_catalogue("methods")()
        return
    for name, (stages, first) in outline.methods().items():
        yield f"{name:20} {', '.join(stages) or '-':24} {first}"


def _metrics() -> Iterator[str]:
    for name, metric in registry.metrics().items():
        yield f"{name:20} {metric.help}"


def _from_catalogue(name: str) -> Callable[[], Iterator[str]]:
    def lines() -> Iterator[str]:
        from effivlm.catalogue import LISTS as known

        return known[name]()

    return lines


LISTS: dict[str, Callable[[], Iterator[str]]] = {
    "methods": _methods,
    "metrics": _metrics,
    **{n: _from_catalogue(n) for n in ("families", "models", "suites", "support", "tasks")},
}
