"""Fixed workloads as data, and the prompts they stand for, on any model and without a hub."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effivlm import registry
from effivlm.families.base import Family
from effivlm.families.loading import Loaded, collate, example, shapes

BEFORE, BETWEEN = 4, 2  # text tokens before the first image and between images


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        name: as users write it. source: whose measurement it repeats.
        prompt: prompt tokens in all, or None: one image and ``text``.
        text: text tokens (at least, where ``prompt`` is given; images take what they can of the
            rest).
        new_tokens: generated per prompt. batches: prompts side by side, one after the other.
        keep: budgets of the source.
    """

    name: str
    source: str
    prompt: int | None
    text: int
    new_tokens: int
    batches: tuple[int, ...] = (1,)
    keep: tuple[str, ...] = ()


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "effivlm-bench", "EffiVLM-Bench, Figure 2", 8192, 256, 100, keep=("0.05", "0.1", "0.4")
        ),
        Workload(
            "uniprunebench", "UniPruneBench, Table 4 (MME)", None, 48, 8, keep=("1/3", "2/9", "1/9")
        ),
        Workload("polymorphic", "Polymorphic, Table 4", None, 48, 16, keep=("192", "128", "64")),
        Workload("plphp", "PLPHP, long captions", None, 32, 512, keep=("0.4",)),
        Workload(
            "serving",
            "throughput at 8k",
            8192,
            256,
            100,
            batches=(1, 4, 16, 32),
            keep=("0.05", "0.1", "0.4"),
        ),
    )
}


def workload(name: str) -> Workload:
    """A workload by name.

    Raises:
        UnknownName: with near names.
    """
    return registry.lookup("workload", name, WORKLOADS)


def image_sizes(name: str) -> Mapping[str, Any]:
    """Size arguments of `Family.images` that give the published visual token count; empty for other
    checkpoints.
    """
    known = shapes()
    return known[name][1].image if name in known else {}


def prompts(
    work: Workload, family: Family, config: Any, batch: int, sizes: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Model inputs of a batch of equally long synthetic prompts, on the CPU.

    Args:
        work: what to make.
        family: of the model.
        config: of the model.
        batch: prompts.
        sizes: of images, as `Family.images` takes them.
        seed: of pixels and text; every prompt of the batch has its own.

    Raises:
        ValueError: if not even one image fits into the prompt.
    """
    count = _images(work, family, config, sizes)
    used = _length(family, config, count, sizes)
    after = work.text - BEFORE if work.prompt is None else work.prompt - used
    make = {"images": count, "before": BEFORE, "between": BETWEEN, "after": after, **sizes}
    return collate([example(family, config, seed=seed + i, **make) for i in range(batch)])


def _images(work: Workload, family: Family, config: Any, sizes: Mapping[str, Any]) -> int:
    """How many images take most of the prompt: the count with most visual tokens that leaves room
    for the text.
    """
    if work.prompt is None:
        return 1
    room, best, most = work.prompt - work.text, 0, 0
    for count, visual in _visual(family, config, sizes):
        if visual + count * (BETWEEN + 2) + BEFORE > room:
            if count > 1:  # one image of several tiles may take more room than two of one tile each
                break
        elif visual > most:
            best, most = count, visual
    if not best:
        raise ValueError(
            f"{work.name}: no image fits into {work.prompt} tokens beside {work.text} of text: give"
            " smaller images"
        )
    return best


def _visual(
    family: Family, config: Any, sizes: Mapping[str, Any], most: int = 64
) -> Iterator[tuple[int, int]]:
    """Visual tokens of 1, 2, ... images. How many an image has depends on whether it is alone, not
    on how many others there are, so that counting does not make every count's pixels.
    """
    assert family.images is not None
    made: list[list[int]] = []
    for count in range(1, most + 1):
        if count > len(made):
            several = min(2 * count, most) if count > 1 else 1
            made = family.images(config, torch.Generator().manual_seed(0), several, **sizes)[1]
        yield count, sum(map(sum, made[:count]))


def _length(family: Family, config: Any, count: int, sizes: Mapping[str, Any]) -> int:
    made = example(family, config, images=count, before=BEFORE, between=BETWEEN, after=0, **sizes)
    return made["input_ids"].shape[1]


def on_device(inputs: Mapping[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The inputs where the model is, pixels in its dtype."""
    device, dtype = loaded.model.device, loaded.model.dtype
    return {
        k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()
    }
