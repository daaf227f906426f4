"""Do the report's 95 % intervals hold the truth in 95 of 100 runs? `python
benchmarks/coverage.py`.

Runs are drawn from a known truth: 5 to 100 documents a task, 1 to 8 tasks, each document with a
picture of its own or five questions a picture (right answers and lost pictures come by the
picture), and scores of five kinds: right or wrong with 5, 50 or 95 % right, graded scores around
40 %, and F1 of yes/no questions. A setting loses 5 or 30 % of the pictures and then guesses.
Counted is how often the interval of OP, of the difference, of loyalty and of the score itself
holds the truth. `--others` tries the percentile, BCa and t-scaled bootstrap of OP and of the
difference instead. Prints Markdown; results/cpu/coverage.md holds a run.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from effivlm.metrics import builtin, intervals
from effivlm.metrics.metric import Array, Join, Metric, mean
from effivlm.metrics.sample import Part, Sample
from effivlm.metrics.student import quantile

TOGETHER, LOSSES = (1, 5), (0.05, 0.3)
NAMES = ("OP", "difference", "loyalty", "score")
ALIKE = 1.5  # of the Beta that pictures' difficulties are drawn from: correlation 0.4 inside one


@dataclass(frozen=True)
class Kind:
    """How documents are scored, and how many are right."""

    name: str
    right: float
    metric: Metric = builtin.exact_match
    graded: bool = False
    guess: float = 0.0


KINDS = (
    Kind("5 %", 0.05),
    Kind("50 %", 0.5),
    Kind("95 %", 0.95),
    Kind("graded", 0.4, graded=True),
    Kind("F1", 0.85, builtin.yes_no, guess=2 / 3),
)


@dataclass(frozen=True)
class Drawn(Sample):
    """A task with the agreement of its answers."""

    agreed: Part


def draw(
    rng: np.random.Generator, kind: Kind, runs: tuple[int, ...], together: int, loss: float
) -> tuple[Array, Array, Array]:
    """What documents score under the setting and the original, and how far answers agree.

    ``runs`` are leading axes, the last of them pictures.

    Returns:
        [*runs, together, c] each; c numbers that the metric joins.
    """
    shape = (*runs, together)
    skill = np.full((*runs, 1), kind.right)
    if together > 1:
        skill = rng.beta(ALIKE * kind.right, ALIKE * (1 - kind.right), (*runs, 1))
    lost = rng.random((*runs, 1)) < loss
    if kind.graded:
        base = rng.beta(4 * skill + 0.01, 4 * (1 - skill) + 0.01, shape)
        mine = np.where(lost, rng.beta(1, 8, shape), base)
        agreed = np.where(lost, rng.beta(2, 4, shape), 1.0)
        return mine[..., None], base[..., None], agreed[..., None]
    base = rng.random(shape) < skill
    mine = np.where(lost, rng.random(shape) < (0.5 if kind.guess else 0.2 * skill), base)
    agreed = (mine == base)[..., None].astype(float)
    if not kind.guess:
        return mine[..., None].astype(float), base[..., None].astype(float), agreed
    truth = rng.random(shape) < 0.5
    says = [np.where(right, truth, ~truth) for right in (mine, base)]
    yes = [np.stack([said & truth, said, truth], -1).astype(float) for said in says]
    return yes[0], yes[1], agreed


@cache
def truth_of(kind: Kind, loss: float, together: int) -> dict[str, float]:
    """From so many documents that their error does not matter."""
    rng = np.random.default_rng(0)
    mine, base, agreed = draw(rng, kind, (2_000_000 // together,), together, loss)
    score, original = (float(kind.metric.join(x.mean((0, 1)))) for x in (mine, base))
    return {
        "OP": score / original,
        "difference": score - original,
        "loyalty": float(agreed.mean()),
        "score": score,
    }


def units_of(rows: Array, join: Join = mean) -> Array:
    """`metrics.sample.pseudo_values` of many runs at once: [..., pictures]."""
    sums, (pictures, together) = rows.sum(-2), rows.shape[-3:-1]
    total = sums.sum(-2, keepdims=True)
    score = join(total / (pictures * together))
    step = (pictures - 1) * (score - join((total - sums) / ((pictures - 1) * together)))
    return score + step - step.mean(-1, keepdims=True)


def drawn(
    rng: np.random.Generator,
    kind: Kind,
    cell: tuple[int, int, int],
    loss: float,
    runs: int,
) -> Iterator[list[Drawn]]:
    """The tasks of one run after the other."""
    together, tasks, documents = cell
    pictures, step = documents // together, 50
    units = np.arange(tasks * pictures).reshape(tasks, pictures)
    for _ in range(0, runs, step):
        mine, base, agreed = draw(rng, kind, (step, tasks, pictures), together, loss)
        join = kind.metric.join
        found = units_of(mine, join), units_of(base, join), units_of(agreed)
        for run in zip(*found, strict=True):
            yield [
                Drawn(Part(x, u), Part(y, u), documents, Part(same, u))
                for x, y, same, u in zip(*run, units, strict=True)
            ]


def ours(samples: list[Drawn], kind: Kind) -> dict[str, intervals.Interval]:
    """The report's intervals."""
    rated = [s for s in samples if intervals.above(s.base, kind.guess)]
    return {
        "OP": intervals.overall_interval(rated),
        "difference": intervals.difference([s.change for s in samples]),
        "loyalty": intervals.share([s.agreed for s in samples]),
        "score": intervals.share([s.mine for s in samples]),
    }


def others(
    samples: list[Sample], kind: Kind, seed: int, draws: int = 500
) -> dict[str, intervals.Interval]:
    """Bootstraps over pictures: percentile, BCa, and the percentile's reach scaled as t's."""
    rng = np.random.default_rng(seed)
    size, out = len(samples[0].mine.values), {}
    counts = [rng.multinomial(size, np.full(size, 1 / size), draws) / size for _ in samples]
    rated = [i for i, s in enumerate(samples) if intervals.above(s.base, kind.guess)]

    def op(weights: list[Array]) -> Array:
        ratios = [
            (w @ samples[i].mine.values) / np.maximum(w @ samples[i].base.values, 1e-12)
            for i, w in zip(rated, weights, strict=True)
        ]
        return np.sqrt(np.mean(np.square(ratios), axis=0))

    def change(weights: list[Array]) -> Array:
        every = zip(samples, weights, strict=True)
        return np.mean([w @ s.change.values for s, w in every], axis=0)

    for name, statistic, of in (
        ("OP", op, rated),
        ("difference", change, list(range(len(samples)))),
    ):
        if of:
            found = statistic([counts[i] for i in of])
            value, skew = jackknifed(statistic, len(of), size)
            out |= {f"{name} {k}": v for k, v in bootstraps(found, value, skew, size).items()}
    return out


def jackknifed(
    statistic: Callable[[list[Array]], Array], tasks: int, size: int
) -> tuple[float, float]:
    """The statistic itself, and BCa's acceleration."""
    even = np.full((1, size), 1 / size)
    one_out = (1 - np.eye(size)) / (size - 1)
    value, moves = float(statistic([even] * tasks)[0]), []
    for task in range(tasks):
        rest = [np.repeat(even, size, 0)] * tasks
        left = statistic([*rest[:task], one_out, *rest[task + 1 :]])
        moves.append(left.mean() - left)
    every = np.concatenate(moves)
    scale = float((every**2).sum() ** 1.5)
    return value, float((every**3).sum()) / (6 * scale) if scale > 1e-12 else 0.0


def bootstraps(
    found: Array, value: float, skew: float, size: int
) -> Mapping[str, intervals.Interval]:
    """Three intervals from the same draws."""
    normal = NormalDist()
    low, high = np.percentile(found, [2.5, 97.5])
    stretch = quantile(0.975, size - 1) / 1.96 * np.sqrt(size / (size - 1))
    below = ((found < value).mean() + (found <= value).mean()) / 2
    shift = normal.inv_cdf(min(max(float(below), 1e-3), 1 - 1e-3))
    ends = []
    for z in (-1.96, 1.96):
        turned = shift + (shift + z) / (1 - skew * (shift + z))
        ends.append(100 * normal.cdf(turned))
    return {
        "percentile": (float(low), float(high)),
        "BCa": tuple(np.percentile(found, ends)),  # type: ignore[dict-item]
        "t-scaled": (value - stretch * (value - low), value + stretch * (high - value)),
    }


def coverage(
    kind: Kind, cell: tuple[int, int, int], loss: float, runs: int, other: bool
) -> dict[str, tuple[float, float, float]]:
    """Name -> (percent of runs in which the truth lies inside, mean width in points, percent of
    runs with an interval).
    """
    truth, rng = truth_of(kind, loss, cell[0]), np.random.default_rng(cell)
    hits: dict[str, list[tuple[bool, float]]] = {}
    for number, samples in enumerate(drawn(rng, kind, cell, loss, runs)):
        given = others(samples, kind, number) if other else ours(samples, kind)
        for name, (low, high) in given.items():
            if low == low:
                right = truth[name.partition(" ")[0]]
                inside = low - 1e-4 <= right <= high + 1e-4
                hits.setdefault(name, []).append((inside, high - low))
    out = {}
    for name, h in hits.items():
        inside, width = 100 * np.mean(h, axis=0)
        out[name] = (float(inside), float(width), 100 * len(h) / runs)
    return out


def cells(tasks: Sequence[int], documents: Sequence[int]) -> list[tuple[int, int, int]]:
    """(questions a picture, tasks, documents) with more than one picture."""
    every = itertools.product(TOGETHER, tasks, documents)
    return [(together, t, d) for together, t, d in every if d > together]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--documents", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--others", action="store_true")
    args = parser.parse_args()
    columns = list(itertools.product(KINDS, LOSSES))
    table = {
        cell: [coverage(kind, cell, loss, args.runs, args.others) for kind, loss in columns]
        for cell in cells(args.tasks, args.documents)
    }
    methods = ("percentile", "BCa", "t-scaled")
    names = (
        [f"{n} {m}" for n in ("OP", "difference") for m in methods] if args.others else list(NAMES)
    )
    for name in names:
        print(f"\n### {name}\n")
        print(summary([f[name] for row in table.values() for f in row if name in f]) + "\n")
        heads = [f"{kind.name}, loses {100 * loss:.0f} %" for kind, loss in columns]
        print("| a picture | tasks | documents | " + " | ".join(heads) + " |")
        print("|---|---|---|" + "---|" * len(heads))
        for cell, found in table.items():
            print(f"| {' | '.join(map(str, cell))} | {' | '.join(shown(f, name) for f in found)} |")


def shown(found: Mapping[str, tuple[float, float, float]], name: str) -> str:
    """Coverage and mean width; bold where it does not hold."""
    if name not in found or found[name][2] < 5:
        return "-"
    inside, width, _ = found[name]
    text = f"{inside:.1f}"
    return f"{'**' + text + '**' if inside < 93.5 else text} ({width:.1f})"


def summary(found: list[tuple[float, float, float]]) -> str:
    """How many cells hold."""
    inside = np.array([f[0] for f in found if f[2] >= 5])
    return (
        f"{len(inside)} cells: {int(((inside >= 94) & (inside <= 96)).sum())} within 94 to 96 %,"
        f" {int((inside > 96).sum())} above, {int((inside < 94).sum())} below"
        f" (lowest {inside.min():.1f} %)."
    )


if __name__ == "__main__":
    main()
