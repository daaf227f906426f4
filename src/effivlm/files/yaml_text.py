"""YAML as people mean it: version 1.2's plain scalars (``no`` and dates are text, ``010`` is ten,
``1:30`` is no number), every key once, plain data of bounded size.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from effivlm.errors import shown
from effivlm.files.reading import MIB, Failure, read_text, reason, said

MOST = 2 * MIB
NODES = 200_000  # values that a file may stand for once its aliases are followed
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)

# what PyYAML raises, also of a tag whose value it cannot be
_WRONG = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    AttributeError,
)


class _Loader(yaml.SafeLoader):
    """A safe loader for version 1.2's plain scalars; refuses a key that comes twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping; what is merged into it by ``<<`` may be overridden once."""
        own = [k for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        seen: set[str] = set()
        for key in own:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {shown(key.value)} comes twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        """Whole copies: a file that says everything where it is needed."""
        return True


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
for _kind, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def read_yaml(path: Path, expected: str, failure: Failure) -> Any:
    """Plain data of a YAML file.

    Raises:
        EffivlmError: of the kind ``failure``: the file cannot be read, is not YAML (with line and
            column), says a key twice, or stands for too much.
    """
    return parse_yaml(read_text(path, expected, failure, MOST), said(path), expected, failure)


def parse_yaml(text: str, where: str, expected: str, failure: Failure) -> Any:
    """Plain data of YAML text; raises as `read_yaml`."""
    try:
        data = yaml.load(text, _Loader)
        _bounded(data)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = " ".join(f"{error.context or ''} {error.problem or ''}".split())[:300]
        raise failure(f"{where}{place}: is not YAML: {why}; expected {expected}") from None
    except RecursionError:
        raise failure(f"{where} is nested too deeply: expected {expected}") from None
    except _WRONG as error:
        raise failure(f"{where} is not YAML: {reason(error)}; expected {expected}") from None
    return data


def _bounded(data: Any) -> None:
    """Refuse what aliases make endless or huge."""
    todo, count = [data], 0
    while todo:
        item = todo.pop()
        count += 1
        if count > NODES:
            raise ValueError(f"it stands for more than {NODES} values (aliases are followed)")
        if isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            todo += item


def dump_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
