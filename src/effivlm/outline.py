"""What there is, read from source text: lists need not wait for torch.

A class counts if it has a ``name`` of its own and derives from a stage class; the registry, which
imports everything, is the slow twin.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STAGES = {
    "Weights": "weights",
    "Processing": "processing",
    "PreEncoder": "pre_encoder",
    "EncoderReducer": "encoder",
    "PreLLM": "pre_llm",
    "IntraLLM": "intra_llm",
    "KVCache": "kv_cache",
    "KVFormat": "kv_format",
}


@dataclass(frozen=True)
class Outline:
    """A method's class in the source.

    Attributes:
        name: what settings call it, or None for a class that only others derive from.
        bases: names of the classes it derives from. summary: first line of its docstring.
    """

    name: str | None
    bases: tuple[str, ...]
    summary: str


def methods() -> dict[str, tuple[list[str], str]]:
    """Name -> (stages, first line of the docstring) of the methods in this package, sorted."""
    classes = {}
    for path in sorted((Path(__file__).parent / "methods").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = _outline(node)
    found = {
        outline.name: (_stages(cls, classes), outline.summary)
        for cls, outline in classes.items()
        if outline.name
    }
    return dict(sorted(found.items()))


def _outline(node: ast.ClassDef) -> Outline:
    name = None
    for item in node.body:
        target = item.target if isinstance(item, ast.AnnAssign) else None
        if isinstance(item, ast.Assign):
            target = item.targets[0]
        if isinstance(target, ast.Name) and target.id == "name":
            value = item.value if isinstance(item, ast.Assign | ast.AnnAssign) else None
            name = value.value if isinstance(value, ast.Constant) else None
    bases = tuple(b.id for b in node.bases if isinstance(b, ast.Name))
    lines = (ast.get_docstring(node) or "").strip().splitlines()
    return Outline(name if isinstance(name, str) else None, bases, lines[0] if lines else "")


def _stages(cls: str, classes: dict[str, Outline]) -> list[str]:
    above = set(_ancestors(cls, classes))
    return [stage for base, stage in STAGES.items() if base in above]


def _ancestors(cls: str, classes: dict[str, Outline]) -> Iterator[str]:
    yield cls
    for base in classes[cls].bases if cls in classes else ():
        yield from _ancestors(base, classes)
