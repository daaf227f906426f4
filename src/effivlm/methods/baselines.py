"""What every method must beat: keep everything, keep at random, keep a lattice, pool, or send a
smaller image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.budget import Budget, split
from effivlm.methods.base import (
    Entries,
    ImageTokens,
    IntraLLM,
    KVCache,
    LayerCache,
    LayerTokens,
    Merge,
    Method,
    Paper,
    PreEncoder,
    PreLLM,
    Processing,
    Room,
    Selection,
)
from effivlm.methods.kv_cache.scoring import joined, recent, window_and_top
from effivlm.methods.schedules import single_cut
from effivlm.ops.numbers import distinct, whole
from effivlm.ops.precision import working
from effivlm.ops.select import grid_shape, lattice, random_k


@dataclass(frozen=True)
class NoCompression(Method):
    """The uncompressed model."""

    name = "none"
    paper = Paper("(baseline) the uncompressed model", "", "")
    budget = "none"


@dataclass(frozen=True)
class RandomPre(PreLLM):
    """A uniformly random subset of every image's tokens, in raster order.

    Attributes:
        seed: with it and the prompt the subset is fixed, whatever else is in the batch.
    """

    seed: int = 0

    name = "random_pre"
    paper = Paper(
        "Random pruning before the LLM, as the Random-Pre baseline of UniPruneBench",
        "2511.02650",
        "TianfanPeng/VLMUniPruneBench @ f93768f",
        (
            (
                "seeded per prompt and image; the benchmark's code is unseeded and leaves"
                " InternVL's tokens in shuffled order"
            ),
        ),
    )

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep ``k`` at random."""
        keep = random_k(len(tokens.embeds), k, tokens.generator(self.seed))
        return Selection(keep.to(tokens.embeds.device))


@dataclass(frozen=True)
class RandomIntra(IntraLLM):
    """A uniformly random subset of every image's tokens before decoder layer ``layer``
    (UniPruneBench's Random-Intra).
    """

    name = "random_intra"
    paper = Paper("(baseline) random choice", "", "")
    layer: int = 2
    seed: int = 0

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """One cut."""
        return single_cut(self.name, self.layer, room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Keep ``k`` at random."""
        return Selection(random_k(len(tokens.visual), k, tokens.generator(self.seed)))


@dataclass(frozen=True)
class RandomKV(KVCache):
    """Random cache entries, another draw for every layer and KV head; the last ``window`` share of
    k is always kept.

    Attributes:
        seed: with it and the prompt the draw is fixed. window: recent entries as a share of the
            budget.
        shared: one draw for all KV heads of a layer.
    """

    name = "random_kv"
    paper = Paper("(baseline) random choice", "", "")
    seed: int = 0
    window: float = 0.1
    shared: bool = False

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Uniform noise."""
        heads, length = cache.keys.shape[:2]
        noise = torch.rand(heads, length, generator=cache.generator(self.seed)).to(
            cache.keys.device
        )
        return joined(noise, self.shared)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Recent window and random rest."""
        return window_and_top(scores, k, recent(k, self.window), self.shared)


@dataclass(frozen=True)
class Uniform(PreLLM):
    """A regular lattice: evenly spaced rows, evenly spaced tokens in each; evenly spaced indices
    where there is no grid.
    """

    name = "uniform"
    paper = Paper("(baseline) uniform sampling on a lattice", "", "")

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Evenly spaced rows, and in each evenly spaced tokens; quotas of rows differ by at most
        one.
        """
        if bool(tokens.place.isnan().any()):
            return Selection(lattice(len(tokens.embeds), k).to(tokens.embeds.device))
        rows = tokens.place[:, 0].cpu()
        members = [(rows == r).nonzero()[:, 0] for r in distinct(rows)]
        height, width = len(members), max(len(m) for m in members)
        count = grid_shape(height, width, k)[0]
        while sum(len(members[i]) for i in whole(lattice(height, count))) < k:
            count += 1
        chosen = [members[i] for i in whole(lattice(height, count))]
        sizes = [len(m) for m in chosen]
        quotas = split(k, sizes, sizes)
        keep = torch.cat([m[lattice(len(m), q)] for m, q in zip(chosen, quotas, strict=True)])
        return Selection(keep.sort().values.to(tokens.embeds.device))


@dataclass(frozen=True)
class Pool(PreLLM):
    """Adaptive average pooling of every image to the grid of at most ``k`` cells that loses least.

    A pooled token stands where the token nearest to its cell's centre stood. Cells overlap by one
    row or column where sizes do not divide, as in adaptive average pooling.
    """

    name = "pool"
    exact = False  # a grid of exactly k cells rarely exists
    paper = Paper(
        "Average pooling before the LLM, as the Pool-Pre baseline of UniPruneBench",
        "2511.02650",
        "TianfanPeng/VLMUniPruneBench @ f93768f",
        (
            (
                "the grid follows the budget; the benchmark's code pools every tile to 4, 16 or 25"
                " tokens whatever the budget"
            ),
        ),
    )

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep one token per cell of the grid; without places the sequence is pooled."""
        place = tokens.place.double()
        if bool(place.isnan().any()):
            index = torch.arange(len(place), device=place.device, dtype=place.dtype)
            place = torch.stack([torch.zeros_like(index), index], 1)
        place = place - place.amin(0)
        size = place.amax(0) + 1
        a, b = grid_shape(int(size[0]), int(size[1]), k)
        cells = torch.tensor([a, b], dtype=torch.float64, device=place.device)
        grid = torch.cartesian_prod(torch.arange(a), torch.arange(b)).to(
            place
        )  # [a * b, 2] cell numbers
        start, end = (grid * size / cells + 1e-9).floor(), ((grid + 1) * size / cells - 1e-9).ceil()
        inside = ((place >= start[:, None]) & (place < end[:, None])).all(-1)  # [a * b, N]
        owned = (((place + 0.5) * cells / size).floor() == grid[:, None]).all(-1)
        centre = (grid + 0.5) * size / cells - 0.5
        away = torch.cdist(centre, place).masked_fill(~owned, torch.inf)
        used = owned.any(1)
        target, inside = away.argmin(1)[used], inside[used]
        cell, source = inside.nonzero(as_tuple=True)
        weight = working(1.0 / inside.sum(1))[cell]
        return Selection(target.sort().values, Merge(target[cell], source, weight))


@dataclass(frozen=True)
class Downsample(PreEncoder):
    """A smaller image: resized before the encoder so that it yields at most ``k`` tokens, aspect
    kept.
    """

    name = "downsample"
    exact = False
    paper = Paper(
        "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression"
        " Methods (downsampling baseline)",
        "2510.07143",
        "Chenfei-Liao/VTC-Bench",
        ("tokens keep positions spread over the full grid, as every other method's do",),
    )

    def resize(self, rows: int, columns: int, k: int) -> tuple[int, int]:
        """The grid of the image's aspect within ``k`` that loses least."""
        return grid_shape(rows, columns, k)


@dataclass(frozen=True)
class Native(Processing):
    """The model's own budget: the processor's argument (pixels, tiles, image size) whose token
    count comes nearest from below.

    One argument holds for all images of a prompt, so a share is of all their tokens together. It is
    a baseline without a paper.
    """

    name = "native"
    exact = False  # a processor makes only some counts
    paper = Paper("A processor's own setting (baseline), as every user can pass it", "", "")
