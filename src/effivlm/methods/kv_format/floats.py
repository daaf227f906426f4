"""The cache in 8-bit floats, as serving engines store it."""

from dataclasses import dataclass
from typing import ClassVar

from effivlm.methods.base import Format, KVFormat, Paper


@dataclass(frozen=True)
class KVFp8(KVFormat):
    """Every entry as e4m3 floats with a scale of one, from the first token on."""

    name: ClassVar[str] = "kv_fp8"
    paper: ClassVar[Paper] = Paper(
        "(baseline) 8-bit floats, e4m3, scale 1.0: what vLLM stores for kv_cache_dtype=fp8 without"
        " calibrated scales",
        "",
        "",
        (
            "the prompt's own attention is computed before anything is rounded",
            "a new token reads itself as it was; an engine reads it from its cache",
        ),
    )

    @property
    def format(self) -> Format:
        """8-bit floats."""
        return Format(8, floats=True)
