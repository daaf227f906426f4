"""Do recommended settings keep their promise? `python benchmarks/recommend_promise.py [--runs N]`.

Scores are simulated, from a known truth: two tasks (in one cell, five questions a picture), 12
settings of four costs that meet the target, each with its own true loss. A run's documents are
split in halves; `choose` recommends on the first, and the promise (certain to lose less than 2
points, all listed together) is held against the truth, and against what the other half observes.
A repetition is kept if every setting listed as certain keeps; one that lists none promises nothing
and is counted apart. Beside it, for scale, a rule that lists what loses less than 2 points as
observed. Prints Markdown; results/cpu/recommend_promise.md holds a run.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from effivlm.metrics.intervals import average, of_changes
from effivlm.metrics.losses import Loss
from effivlm.metrics.sample import pseudo_values
from effivlm.recommendation.choice import Advice, Looked, choose
from effivlm.recommendation.costs import Cost, Costs
from effivlm.recommendation.target import parse_target

DROP, CONFIDENCE, TARGET = 2.0, 0.95, parse_target("tokens=0.5x")
COSTS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class World:
    """True losses, in points, of 12 settings; documents a task in each half."""

    name: str
    losses: tuple[float, ...]
    documents: int
    together: int = 1


MIXED = (0, 0.5, 1, 1.5, 2.2, 2.5, 3, 4, 6, 8, 12, 20)
EDGE = (2.05,) * 12  # every one loses a little too much: all that is listed is wrong
ONE_GOOD = (0, *(2.05,) * 11)
WORLDS = (
    World("mixed", MIXED, 100),
    World("mixed", MIXED, 400),
    World("mixed", MIXED, 2000),
    World("mixed, five a picture", MIXED, 400, 5),
    World("all just too bad", EDGE, 100),
    World("all just too bad", EDGE, 400),
    World("all just too bad", EDGE, 2000),
    World("one good, eleven just too bad", ONE_GOOD, 2000),
)


def scores(rng: np.random.Generator, world: World) -> tuple[np.ndarray, list[np.ndarray]]:
    """[2 halves, 2 tasks, documents] of the original, 70 % right, and of every setting. Twice the
    loss goes from right to wrong by the picture, as much as the loss from wrong to right.
    """
    shape = (2, 2, world.documents // world.together)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, world.together, -1)

    base = rng.random((*shape[:2], world.documents)) < 0.7
    mine = []
    for loss in world.losses:
        share = loss / 100
        down = spread(rng.random(shape) < (2 * share + 0.01) / 0.7)
        up = spread(rng.random(shape) < (share + 0.01) / 0.3)
        mine.append(np.where(base, ~down, up))
    return base, mine


def losses(base: np.ndarray, mine: list[np.ndarray], half: int, together: int) -> list[Loss]:
    """What a half says of every setting: `loss_of`, from the changes themselves."""
    units = np.arange(base.shape[-1]) // together
    shift = units.max() + 1  # tasks share no pictures
    out: list[Loss] = []
    for m in mine:
        changes = m[half].astype(float) - base[half]
        parts = [pseudo_values(c[:, None], units + shift * t) for t, c in enumerate(changes)]
        out.append(Loss(100 * average(parts), of_changes(parts), changes.size))
    return out


def advised(found: list[Loss]) -> Advice:
    names = [f"s{i}" for i in range(len(found))]
    costs = {n: Cost(c, c) for n, c in zip(names, COSTS * 3, strict=True)}
    looked = Looked("m", dict(zip(names, found, strict=True)), Costs("counted", "", costs))
    return choose([looked], TARGET, DROP, CONFIDENCE)


def cell(world: World, runs: int, seed: int) -> str:
    """One line of the table."""
    rng, total = np.random.default_rng(seed), np.zeros(6, dtype=int)
    listed = 0
    for _ in range(runs):
        base, mine = scores(rng, world)
        first, second = (losses(base, mine, half, world.together) for half in (0, 1))
        chosen = [int(c.setting[1:]) for c in advised(first).certain]
        naive = [i for i, x in enumerate(first) if x.value > -DROP]
        listed += len(chosen)
        total += (
            bool(chosen),
            all(world.losses[i] < DROP for i in chosen),
            all(second[i].value > -DROP for i in chosen),
            all(second[i].high(CONFIDENCE) > -DROP for i in chosen),
            bool(naive),
            all(world.losses[i] < DROP for i in naive),
        )
    cells = [world.name, 2 * world.documents, *total, f"{listed / runs:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    titles = (
        "truth",
        "documents in a half",
        "repetitions with a promise",
        "kept: the truth",
        "kept: observed in the other half",
        "kept: not contradicted there (95 %)",
        "by observed loss: repetitions with a list",
        "by observed loss: kept, the truth",
        "settings promised, mean",
    )
    print(
        f"{asked.runs} repetitions, seed {asked.seed}, drop {DROP:g}, confidence {CONFIDENCE:g}.\n"
    )
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for world in WORLDS:
        print(cell(world, asked.runs, asked.seed), flush=True)


if __name__ == "__main__":
    main()
