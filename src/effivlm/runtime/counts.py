"""What a part's budget comes to at each stage, asked of its method and checked."""

from collections.abc import Sequence
from itertools import pairwise

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import EncoderReducer, IntraLLM, KVCache, Method, Room
from effivlm.setting import Part


def entering(part: Part, stage: type[Method], layers: int, n: int) -> int:
    """Tokens of an image of ``n`` that a stage before the LLM leaves; how many blocks an encoder
    has is no matter there.
    """
    steps = 2 if stage is EncoderReducer else 1
    return part.method.counts(Room(stage, (n,) * steps, layers), part.budget)[-1]


def in_blocks(part: Part, blocks: int, layers: int, n: int) -> list[int]:
    """[blocks] groups of a unit of ``n`` that every encoder block holds.

    Raises:
        BudgetError: for counts that are not one a block, grow, or fall before the first block.
    """
    counts = list(part.method.counts(Room(EncoderReducer, (n,) * blocks, layers), part.budget))
    if len(counts) != blocks or counts[0] != n or not _falls(counts, 1):
        raise BudgetError(
            f"{part.method.name}: counts {counts} do not fit an encoder of {blocks} blocks and {n}"
            " groups"
        )
    return counts


def in_layers(part: Part, layers: int, n: int, budget: Budget | None) -> list[int]:
    """[layers] tokens of an image of ``n`` that enter every decoder layer.

    Args:
        part: an intra-LLM method.
        layers: decoder layers.
        n: tokens that enter the LLM.
        budget: of the part, or what its earlier stages left of it.

    Raises:
        BudgetError: for counts that are not one a layer, or grow.
    """
    counts = list(part.method.counts(Room(IntraLLM, (n,) * layers, layers), budget))
    if len(counts) != layers or not _falls([n, *counts], 0):
        raise BudgetError(
            f"{part.method.name}: counts {counts} do not fit {layers} layers and {n} tokens in play"
        )
    return counts


def in_cache(
    part: Part, lengths: list[list[int]], statistics: list[tuple[float, ...]] | None = None
) -> list[list[int]]:
    """Entries per KV head, [layers][rows].

    Args:
        part: a cache method.
        lengths: [rows][layers] entries held now.
        statistics: [rows][layers], once they are known of a method that waits for them.
    """
    columns = []
    for row, held in enumerate(lengths):
        known = None if statistics is None else statistics[row]
        room = Room(KVCache, tuple(held), len(held), known)
        columns.append(list(part.method.counts(room, part.budget)))
    return [list(layer) for layer in zip(*columns, strict=True)]


def _falls(counts: Sequence[int], least: int) -> bool:
    return all(least <= b <= a for a, b in pairwise(counts))
