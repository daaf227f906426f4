"""Scorers that wrappers (AdaKV, CriticalKV, layer-adaptive budgets) can be put around, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from effivlm.methods.base import KVCache
from effivlm.methods.kv_cache.expected_attention import ExpectedAttention
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.keydiff import KeyDiff
from effivlm.methods.kv_cache.knorm import Knorm
from effivlm.methods.kv_cache.look_m import LookM
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.kv_cache.tova import Tova
from effivlm.methods.kv_cache.vl_cache import VLCache

SCORERS: Mapping[str, KVCache] = MappingProxyType(
    {
        scorer.name: scorer
        for scorer in (
            ExpectedAttention(),
            H2O(),
            KeyDiff(),
            Knorm(),
            LookM(merge="none"),
            SnapKV(),
            Tova(),
            VLCache(),
        )
    }
)


def scorer(wrapper: str, base: str) -> KVCache:
    """The scorer called ``base``.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    if base not in SCORERS:
        raise ValueError(
            f"{wrapper}: base={base!r} is not a scorer: expected one of {', '.join(SCORERS)}"
        )
    return SCORERS[base]
