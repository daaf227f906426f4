"""The floor every method must beat: nothing, random choices, lattices, pooling, and simply smaller images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import (
    Cut,
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
    Selection,
)
from effivlm.methods.kv_cache.scoring import recent, window_and_top
from effivlm.methods.schedules import single_cut
from effivlm.ops.select import grid_shape, lattice, random_k

BASELINE = Paper("baseline", "", "")


@dataclass(frozen=True)
class NoCompression(Method):
    """The model as it is."""

    name: ClassVar[str] = "none"
    paper: ClassVar[Paper] = BASELINE
    budget: ClassVar[str] = "none"


@dataclass(frozen=True)
class RandomPre(PreLLM):
    """A uniformly random subset of every image's tokens, seeded per prompt (UniPruneBench's Random-Pre, sorted)."""

    name: ClassVar[str] = "random_pre"
    paper: ClassVar[Paper] = BASELINE
    seed: int = 0

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep ``k`` at random."""
        return Selection(random_k(len(tokens.embeds), k, tokens.generator(self.seed)))


@dataclass(frozen=True)
class RandomIntra(IntraLLM):
    """A uniformly random subset before decoder layer ``layer`` (UniPruneBench's Random-Intra)."""

    name: ClassVar[str] = "random_intra"
    paper: ClassVar[Paper] = BASELINE
    layer: int = 2
    seed: int = 0

    def schedule(self, layers: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
        """One cut."""
        return single_cut(self.name, self.layer, layers, n, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Keep ``k`` at random."""
        return Selection(random_k(len(tokens.visual), k, tokens.generator(self.seed)))


@dataclass(frozen=True)
class RandomKV(KVCache):
    """Random cache entries, another draw for every layer and KV head; the last ``window`` share of k is always kept."""

    name: ClassVar[str] = "random_kv"
    paper: ClassVar[Paper] = BASELINE
    seed: int = 0
    window: float = 0.1

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Uniform noise."""
        heads, length = cache.keys.shape[:2]
        return torch.rand(heads, length, generator=cache.generator(self.seed)).to(cache.keys.device)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Recent window and random rest."""
        return window_and_top(scores, k, recent(k, self.window))


@dataclass(frozen=True)
class Uniform(PreLLM):
    """Evenly spread tokens: a lattice of the image's grid, filled up along the raster; index spacing without a grid."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[Paper] = BASELINE

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """A grid of tokens, and the tokens farthest from it in raster order for what is left of ``k``."""
        n, place = len(tokens.embeds), tokens.place
        if bool(place.isnan().any()):
            return Selection(lattice(n, k))
        rows, columns = (int(x) + 1 for x in place.max(0).values.tolist())
        if rows * columns != n:
            return Selection(lattice(n, k))
        a, b = grid_shape(rows, columns, k)
        keep = (lattice(rows, a)[:, None] * columns + lattice(columns, b)).flatten()
        rest = torch.ones(n, dtype=torch.bool)
        rest[keep] = False
        left = rest.nonzero()[:, 0]
        return Selection(torch.cat([keep, left[lattice(len(left), k - len(keep))]]).sort().values)


@dataclass(frozen=True)
class Pool(PreLLM):
    """Average pooling to the largest grid within the budget; each cell's mean stands at the token in its middle."""

    name: ClassVar[str] = "pool"
    paper: ClassVar[Paper] = Paper("baseline", "", "", ("UniPruneBench pools to a fixed grid whatever the budget; this one follows the budget",))
    exact: ClassVar[bool] = False

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Cells of a grid (of the sequence, where tokens have no place)."""
        n, place = len(tokens.embeds), tokens.place
        if bool(place.isnan().any()):
            cell = torch.arange(n) * k // n
        else:
            rows, columns = (int(x) + 1 for x in place.max(0).values.tolist())
            a, b = grid_shape(rows, columns, k)
            r, c = place.long().cpu().unbind(1)
            cell = (r * a // rows) * b + c * b // columns
        cells, cell = cell.unique(return_inverse=True)
        size = torch.bincount(cell, minlength=len(cells))
        order = torch.argsort(cell, stable=True)
        start = size.cumsum(0) - size
        centre = order[start + size // 2]
        merge = Merge(centre[cell], torch.arange(n), 1.0 / size[cell].float())
        return Selection(centre.sort().values, merge)


@dataclass(frozen=True)
class Downsample(PreEncoder):
    """The image itself, resized before the encoder so that it yields at most the budget's tokens."""

    name: ClassVar[str] = "downsample"
    paper: ClassVar[Paper] = Paper("Are We Using the Right Benchmark: visual token compression against plain downsampling (VTC-Bench)", "2510.07143",
                                   "https://github.com/Chenfei-Liao/VTC-Bench", ("tokens keep positions spread over the full grid, as every other method's do",))  # fmt: skip
    exact: ClassVar[bool] = False

    def resize(self, rows: int, columns: int, k: int) -> tuple[int, int]:
        """The largest grid of the image's aspect within ``k``."""
        return grid_shape(rows, columns, k)
