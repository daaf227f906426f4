"""`view` and `explain`: a run looked at in the browser, and one document of it."""

from pathlib import Path
from typing import Annotated

import typer

from effivlm.cli.shell import console, guard, line

Run = Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")]


def view(folder: Run) -> None:
    """Open a run of any size in the browser: its documents are read as they are opened."""
    guard(lambda: _view(folder))


def _view(folder: Path) -> None:
    import webbrowser

    from effivlm.evaluation import score_run
    from effivlm.report.write import view as written

    score_run(folder)
    page = written(folder).resolve()
    line(f"  {page}")
    webbrowser.open(page.as_uri())


def explain(
    folder: Run,
    document: Annotated[str, typer.Argument(help="DOCUMENT, or TASK/DOCUMENT.")],
    setting: Annotated[str, typer.Argument(help="A setting of any kind, of the run or not.")],
) -> None:
    """Ask one document again and record what became of every visual token; the page draws it."""
    guard(lambda: _explain(folder, document, setting))


def _explain(folder: Path, document: str, setting: str) -> None:
    from effivlm.explain import explain as explained
    from effivlm.families.fitness import quiet

    with quiet(), console.status("asking again"):
        texts = list(explained(folder, document, setting))
    for text in texts:
        line(text)
