"""Reads the imports: who may know what."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "effivlm"
FILES = sorted(SRC.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def part(path):
    return path.relative_to(SRC).parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports(path):
    found, home = set(imports(path)), part(path)
    ours = {m for m in found if m.startswith("effivlm")}
    if home == "methods":
        allowed = ("effivlm.ops", "effivlm.budget", "effivlm.methods")
        assert all(m.startswith(allowed) for m in ours), ours
        assert "transformers" not in {m.split(".")[0] for m in found}
    if home == "families":
        assert not any(m.startswith(("effivlm.methods", "effivlm.runtime")) for m in ours), ours
    if home == "ops":
        assert all(m.startswith(("effivlm.ops", "effivlm.budget")) for m in ours), ours
    if home not in ("runtime", "families", "zoo"):
        assert "transformers" not in {m.split(".")[0] for m in found}
    if home in ("metrics", "report"):
        assert not {"torch", "transformers"} & {m.split(".")[0] for m in found}
    if path.name != "lmms.py":
        assert "lmms_eval" not in {m.split(".")[0] for m in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path):
    """Files under 350 lines; functions under 40 unless they are one expression."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350, "split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{node.name} has {lines} lines"


def test_no_environment_variables_and_no_dumping_ground():
    for path in FILES:
        assert "os.environ" not in path.read_text() and "getenv" not in path.read_text(), path
        assert path.name not in ("utils.py", "helpers.py", "misc.py"), path
