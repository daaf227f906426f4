# What the built-in tasks use of the optional pyarrow.

from pathlib import Path
from typing import Any

class Table:
    def to_pylist(self) -> list[dict[str, Any]]: ...

def read_table(source: Path) -> Table: ...
