"""Realised against asked KV budget of every cache method: `python benchmarks/kv_budget.py`.

A cell is the realised total over all layers and KV heads minus the asked one, in entries: 0
everywhere, or the script fails. Variants that reproduce published miscounting are listed below the
table with the ratio they realise.
"""

import sys
from dataclasses import replace

import torch
from kv_source import Layer

from effivlm.budget import Budget
from effivlm.methods.base import KVCache, Room
from effivlm.methods.kv_cache.adakv import AdaKV
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.layer_adaptive import LayerAdaptive
from effivlm.methods.kv_cache.pyramidkv import PyramidKV
from effivlm.methods.kv_cache.vl_cache import VLCache
from effivlm.registry import methods
from effivlm.setting import Part

SHARES = ("1%", "5%", "10%", "20%", "40%")
LENGTHS = (40, 75, 640, 2000, 8000)
LAYERS, GROUPS = 6, 2


def budget_of(text: str) -> Budget:
    """``"5%"`` as a budget of prompt entries."""
    return Budget(float(text[:-1]) / 100, None, "prompt_kv", text)


def realised(method: KVCache, stack: list[Layer], budget: Budget) -> int:
    """Entries kept over all layers and KV heads."""
    caches = [layer.cache(method) for layer in stack]
    room = Room(KVCache, tuple(c.length for c in caches), len(caches))
    own = final = method.counts(room, budget)
    if method.waits:
        known = replace(room, statistics=tuple(float(method.statistic(c)) for c in caches))
        final = method.counts(known, budget)
    total = 0
    for cache, first, k in zip(caches, own, final, strict=True):
        keeps_all = k >= cache.length
        total += (
            GROUPS * k
            if keeps_all
            else int(method.choose(cache, method.score(cache, first), k).keep.sum())
        )
    return total


def main() -> int:
    """Print the table; 1 if any method misses its budget."""
    torch.set_num_threads(1)
    stacks = {n: [Layer(n, 4, GROUPS, 16, i, LAYERS) for i in range(LAYERS)] for n in LENGTHS}
    every = [
        cls()
        for cls in methods().values()
        if issubclass(cls, KVCache) and cls.units[0] == "prompt_kv"
    ]
    every += [
        AdaKV(H2O()),
        LayerAdaptive(H2O(), uniform=0.4),
        VLCache(uniform=0.4),
        VLCache(uniform=0.8),
    ]
    print("realised minus asked entries, all layers and KV heads; columns: L =", *LENGTHS)
    print(f"{'method':34}" + "".join(f"{s:>22}" for s in SHARES))
    missed = 0
    for method in every:
        cells = []
        for share in SHARES:
            budget = budget_of(share)
            off = [
                realised(method, stacks[n], budget) - LAYERS * GROUPS * budget.count(n)
                for n in LENGTHS
            ]
            missed += sum(x != 0 for x in off)
            cells.append(" ".join(map(str, off)))
        print(
            f"{Part(method, None)!s:34}" + "".join(f"{c:>22}" for c in cells),
            flush=True,
        )
    print("\nrealised over asked of variants that reproduce published miscounting, L = 2000")
    published = {
        "pyramidkv variant=effivlm": PyramidKV(variant="effivlm"),
        "vl_cache renormalise=false": VLCache(renormalise=False),
    }
    asked = [LAYERS * GROUPS * budget_of(s).count(2000) for s in SHARES]
    for label, method in published.items():
        ratios = [
            realised(method, stacks[2000], budget_of(s)) / a
            for s, a in zip(SHARES, asked, strict=True)
        ]
        print(f"{label:34}" + "".join(f"{r:>22.3f}" for r in ratios))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
