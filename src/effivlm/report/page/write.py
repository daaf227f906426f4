"""Puts the page together.

`report.html` holds everything in one file, documents and pictures up to `WHOLE` bytes of them; the
folder `view` holds the same page with Plotly and every chunk of documents as files of their own,
which the page reads when they are opened. Neither asks a network for anything: the page forbids it
to itself.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effivlm.files.reading import read_bytes
from effivlm.files.writing import make_folder, write_whole
from effivlm.records import StoreError
from effivlm.report.page import documents
from effivlm.report.page.data import embedded, page_data
from effivlm.report.rows import Row

HERE = Path(__file__).parent
SCRIPTS = ("state.js", "plot.js", "table.js", "overlay.js", "documents.js", "main.js")
INTACT = "the records are intact; free space and run `effivlm report` again"
WHOLE = 24 * 2**20  # bytes of documents and pictures inside report.html
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob: {here}; {scripts}"


class Page(NamedTuple):
    """A page that was written, and how many documents it had no room for."""

    path: Path
    left_out: int


def view_path(folder: Path) -> Path:
    """Where `write_view` puts its page."""
    return folder / "report" / "view" / "index.html"


def write_page(
    folder: Path, rows: Sequence[Row], environment: Mapping[str, Any], whole: int = WHOLE
) -> Page:
    """Write ``report/report.html`` of a run, one file that can be sent to somebody. Documents
    beyond ``whole`` bytes, those with fewest flips, are left to `write_view`; the page says so.

    Raises:
        ImportError: without Plotly; names the extra.
    """
    path = folder / "report" / "report.html"
    text, left_out = page(folder.name, rows, environment, folder, whole)
    write_whole(path, text, StoreError, INTACT)
    return Page(path, left_out)


def page(
    title: str,
    rows: Sequence[Row],
    environment: Mapping[str, Any],
    folder: Path | None = None,
    whole: int = WHOLE,
) -> tuple[str, int]:
    """The page as text, without a folder without its documents; and how many documents are left
    out.

    Raises:
        ImportError: without Plotly; names the extra.
    """
    every, inside, room = documents.asked(rows), list[str](), whole
    for part, names in documents.chunks(folder, rows, every) if folder else ():
        pictures = {n: _inlined(folder / "pictures" / n) for n in sorted(names)} if folder else {}
        text = embedded({"documents": part, "pictures": pictures})
        room -= len(text)
        if room < 0:
            break
        inside.append(text)
    data = page_data(title, rows, environment) | {"documents": documents.index(every)}
    data |= {"inside": len(inside), "lazy": False}
    blocks = [_json("data", embedded(data))]
    blocks += [_json(f"chunk-{i}", text) for i, text in enumerate(inside)]
    code = [f"<script>{text}</script>" for text in (plotly(), *_own_scripts())]
    policy = POLICY.format(here="", scripts="script-src 'unsafe-inline'")
    left_out = max(0, len(every) - documents.CHUNK * len(inside)) if folder else 0
    return _assembled(title, policy, [*blocks, *code]), left_out


def write_view(folder: Path, rows: Sequence[Row], environment: Mapping[str, Any]) -> Path:
    """Write ``report/view/``, whose page reads documents as they are opened.

    Returns:
        Its ``index.html``. Raises ImportError without Plotly.
    """
    path, every = view_path(folder), documents.asked(rows)
    out = path.parent
    make_folder(out / "chunks", StoreError)
    for i, (part, names) in enumerate(documents.chunks(folder, rows, every)):
        pictures = {n: f"../../pictures/{n}" for n in sorted(names)}
        text = embedded({"documents": part, "pictures": pictures})
        text = f"effivlm.chunks.take({i}, {text});\n"
        write_whole(out / "chunks" / f"{i}.js", text, StoreError, INTACT)
    data = page_data(folder.name, rows, environment) | {"documents": documents.index(every)}
    data |= {"inside": 0, "lazy": True}
    write_whole(out / "plotly.js", plotly(), StoreError, INTACT)
    code = ['<script src="plotly.js"></script>']
    code += [f"<script>{text}</script>" for text in _own_scripts()]
    policy = POLICY.format(here="file: 'self'", scripts="script-src 'unsafe-inline' file: 'self'")
    text = _assembled(folder.name, policy, [_json("data", embedded(data)), *code])
    write_whole(path, text, StoreError, INTACT)
    return path


def _assembled(title: str, policy: str, blocks: Sequence[str]) -> str:
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "scripts": "\n".join(blocks),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("policy", "style", "title", "scripts"):  # scripts last: they hold users' text
        text = text.replace("{{" + name + "}}", parts[name], 1)
    return text


def _json(name: str, text: str) -> str:
    return f'<script type="application/json" id="{name}">{text}</script>'


def _own_scripts() -> list[str]:
    return [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]


def _inlined(path: Path) -> str:
    """A picture as a data URL; empty where the file is gone, which the page says."""
    try:
        data = read_bytes(path, "a picture", StoreError)
    except StoreError:
        return ""
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plotly() -> str:
    """Plotly's JavaScript, as its Python package ships it.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ImportError("the page needs Plotly: pip install plotly") from None
    return get_plotlyjs()


def stamp(folder: Path) -> str:
    """Changes whenever anything that a page is made of does."""
    parts = ("records", "timings", "documents", "traces", "views")
    files = sorted(p for part in parts for p in (folder / part).rglob("*.jsonl"))
    return json.dumps([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files])
