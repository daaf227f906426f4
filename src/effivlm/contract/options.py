"""The rule that no option is silent: every field of a method is read, or refused."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from effivlm import registry
from effivlm.contract.rules import setting_for, text_of
from effivlm.contract.twin import generate, require
from effivlm.families.tiny import double, exact
from effivlm.runtime.session import Session
from effivlm.setting import Setting, parse_setting


def every_option_is_read_or_refused(name: str, family: str) -> None:
    """No field that nothing reads, whatever the budget and the other fields: it is refused then."""
    fields = dataclasses.fields(registry.methods()[name])
    setting_for(name, family)
    read = _fields_read(parse_setting(text_of(name)), family)
    for field in (f for f in fields if f.name not in read):
        mine = list(_other_values(text_of(name), field))
        if not mine:
            continue  # every other value is refused
        elsewhere = [parse_setting(text_of(name, 0.2)), *mine]
        elsewhere += [s for f in fields for s in _other_values(text_of(name), f)]
        require(
            any(field.name in _fields_read(s, family) for s in elsewhere),
            f"{mine[0]}: nothing reads {field.name}, so it must be refused",
        )


def _fields_read(setting: Setting, family: str) -> set[str]:
    """Names of a method's fields that are read while a prompt is answered."""
    read: set[str] = set()
    (part,) = setting.parts
    names = {f.name for f in dataclasses.fields(part.method)}  # type: ignore[arg-type]

    def spy(self: Any, key: str) -> Any:
        if key in names:
            read.add(key)
        return object.__getattribute__(self, key)

    cls: Any = type(part.method)
    plain = {"__hash__": object.__hash__, "__eq__": object.__eq__, "__getattribute__": spy}
    spied = type(cls.__name__, (cls,), plain)
    values = {n: getattr(part.method, n) for n in names}
    watched = dataclasses.replace(part, method=spied(**values))
    read.clear()
    with Session(exact(family), Setting((watched,))):
        generate(exact(family), double(family), 2)
    return read


def _other_values(text: str, field: "dataclasses.Field[Any]") -> Iterator[Setting]:
    """Settings in which only a field differs; those that are refused are left out."""
    value = field.default
    options: tuple[Any, ...] = ()
    if isinstance(value, bool):
        options = ("false" if value else "true",)
    elif isinstance(value, int):
        options = (value + 1, max(1, value // 2), 2)
    elif isinstance(value, float):
        options = (value * 0.5, value * 2, 0.99)
    for option in options:
        with contextlib.suppress(ValueError):
            yield parse_setting(f"{text}:{field.name}={option}")
