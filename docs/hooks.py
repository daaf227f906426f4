"""Pages made when the documentation is built: the front page from the README, and the table of
methods and families from the registry.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file holds."""
    from effivlm.lists import LISTS

    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    for folder in ("benchmarks", "gpu"):
        readme = readme.replace(
            f"[{folder}/README.md]({folder}/README.md)", f"`{folder}/README.md`"
        )
    for name in ("LICENSE", "CONTRIBUTING.md"):
        readme = readme.replace(f"[{name}]({name})", f"`{name}`")
    made = {"index.md": readme, "support.md": "\n".join(LISTS["support"]()) + "\n"}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files
