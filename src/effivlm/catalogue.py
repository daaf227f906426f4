"""What there is, in words: lists and descriptions for the command line and the generated docs."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator

from effivlm import registry, zoo
from effivlm.families import unserved
from effivlm.families.base import Family
from effivlm.families.loading import shapes
from effivlm.methods.base import IntraLLM, Method
from effivlm.methods.schedules import TOKENS, mean_share
from effivlm.runtime.counts import in_layers
from effivlm.runtime.support import Unsupported, check_supported
from effivlm.setting import STAGES, Part, Setting, parse_setting
from effivlm.tasks.builtin import task_names
from effivlm.tasks.loading import load_task
from effivlm.tasks.presence import suites


def stages_of(cls: type[Method]) -> list[str]:
    """Names of the stages a method acts at."""
    return [name for name, stage in STAGES.items() if issubclass(cls, stage)]


def supported(cls: type[Method]) -> dict[str, str]:
    """Family -> empty text, or the reason why the method cannot be used with it."""
    out = {}
    for name, family in registry.families().items():
        try:
            check_supported(Setting((Part(cls(), None),)), family)
            out[name] = ""
        except Unsupported as error:
            out[name] = str(error).split(": ", 1)[1]
    return out


def describe(name: str) -> Iterator[str]:
    """Lines about a method or a family.

    Raises:
        UnknownName: with near names.
    """
    found = registry.lookup("method or family", name, {**registry.families(), **registry.methods()})
    yield from _family(found) if isinstance(found, Family) else _method(found)


def _method(cls: type[Method]) -> Iterator[str]:
    yield f"{cls.name}  {', '.join(stages_of(cls)) or 'no stage'}"
    yield from textwrap.dedent(cls.__doc__ or "").strip().splitlines()
    yield f"paper: {cls.paper.title}" + (f" (arXiv {cls.paper.arxiv})" if cls.paper.arxiv else "")
    if cls.paper.code:
        yield f"official code: {cls.paper.code}"
    yield from (f"deviates: {d}" for d in cls.paper.deviations)
    yield f"budget: {cls.budget}, units {', '.join(cls.units)}"
    for field in dataclasses.fields(cls):
        if isinstance(field.default, Method):
            yield f"wraps any scorer with its own parameters: {cls.name}({field.default.name}:...)"
        else:
            yield f"parameter {field.name} = {field.default}"
    yield from _presets(cls)
    table = supported(cls)
    yield "families: " + ", ".join(f for f, reason in table.items() if not reason)
    yield from (f"not {f}: {reason}" for f, reason in table.items() if reason)


def _presets(cls: type[Method]) -> Iterator[str]:
    """What published schedules truly cost: the layers that run before a cut see more than a
    schedule's name says.
    """
    for fields in cls.presets if issubclass(cls, IntraLLM) else ():
        text, means = f"{cls.name}:{fields}", []
        (part,) = parse_setting(text).parts
        for layers in (32, 40):  # the 7B and 13B models that schedules were published for
            share = mean_share(in_layers(part, layers, TOKENS, None), TOKENS)
            means.append(f"{share * TOKENS:.1f} ({100 * share:.1f} %) over {layers} layers")
        yield f"published {text}: of {TOKENS} tokens the layers see, on average, {', '.join(means)}"


def _family(family: Family) -> Iterator[str]:
    yield (f"{family.name}  model_type {', '.join(family.model_types) or '(as another family)'}")
    yield f"encoder: {'all images in one sequence' if family.packed else 'one tile a sequence'}"
    yield (
        "images can be resized before the encoder"
        if family.resize
        else "the encoder takes images of one size only"
    )
    yield from (f"published shape {s.name}" for s in family.shapes)
    yield "methods: " + ", ".join(
        m for m, cls in registry.methods().items() if not supported(cls)[family.name]
    )


def _methods() -> Iterator[str]:
    for name, cls in registry.methods().items():
        first = (cls.__doc__ or "").strip().splitlines()[0]
        yield f"{name:20} {', '.join(stages_of(cls)) or '-':24} {first}"


def _families() -> Iterator[str]:
    for name, family in registry.families().items():
        yield f"{name:20} {', '.join(s.name for s in family.shapes)}"


def _tasks() -> Iterator[str]:
    for name in task_names():
        task = load_task(name)
        yield (
            f"{name:20} {task.scorer.name:18} {len(task.documents)} documents, stands for"
            f" {task.stands_for}"
        )


def _support() -> Iterator[str]:
    """A page: which method works with which family, and why not."""
    families, reasons = list(registry.families()), {}
    yield "# Methods and families"
    yield ""
    yield (
        "Generated from the registry (`effivlm list support`). Every `+` is a pair that the"
        " contract tests run"
    )
    yield (
        "(`tests/test_contract.py`); every number is a pair that is refused before anything runs,"
        " for the reason below."
    )
    yield ""
    yield f"| method | stages | {' | '.join(families)} |"
    yield "|---|---|" + ":-:|" * len(families)
    for name, cls in registry.methods().items():
        if not stages_of(cls):
            continue  # the uncompressed model
        cells = [
            reasons.setdefault(why, len(reasons) + 1) if why else "+"
            for why in supported(cls).values()
        ]
        yield f"| {name} | {', '.join(stages_of(cls))} | {' | '.join(map(str, cells))} |"
    yield ""
    yield from (f"{number}. {why}" for why, number in reasons.items())
    yield ""
    yield "| model types | family |"
    yield "|---|---|"
    for name, family in registry.families().items():
        if family.model_types:
            yield f"| {', '.join(family.model_types)} | {name} |"
    yield from (f"| {kind} | none: {why} |" for kind, why in unserved.REASONS.items())


LISTS: dict[str, Callable[[], Iterator[str]]] = {
    "methods": _methods,
    "families": _families,
    "suites": suites,
    "tasks": _tasks,
    "support": _support,
    "models": lambda: iter([*(f"zoo:{n}" for n in zoo.names()), *shapes()]),
}
