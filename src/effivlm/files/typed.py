"""Plain data as one of our dataclasses, with the types that its annotations name."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from effivlm.errors import printable, shown

T = TypeVar("T")


def reader_of(kind: type[T]) -> Callable[[Any], T]:
    """A function from plain data (of JSON) to ``kind``, which must be a dataclass.

    It raises ValueError for a missing, unknown or wrongly typed field; names the first.
    """
    adapter = TypeAdapter(kind)
    known = set(getattr(kind, "__dataclass_fields__"))  # noqa: B009  # a generic type has no such attribute

    def read(data: Any) -> T:
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {shown(data, 60)}")
        if foreign := sorted(map(str, set(data) - known)):
            raise ValueError(f"unknown field {shown(foreign[0], 60)}")
        try:
            return adapter.validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            text = f"{where}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")
            raise ValueError(printable(text)[:300]) from None

    return read


def check_numbers(values: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse what is no finite number, 0 or more, under the keys that are there."""
    for key in keys:
        value = values.get(key, 0)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (math.isfinite(value) and value >= 0)
        ):
            raise ValueError(f"cost.{key}: expected a number, 0 or more, got {shown(value, 60)}")
