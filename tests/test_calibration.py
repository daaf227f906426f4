"""Searches that fit a method to a model, on hand-made statistics."""

import math

import pytest
import torch

from effivlm.calibration import (
    Shape,
    fit_deletions,
    tokens_left,
    withdrawal_divergence,
    withdrawal_layer,
)
from effivlm.methods.base import IntraLLM, Room
from effivlm.methods.intra_llm.fitprune import FitPrune

SHAPE = Shape(64, 128)


def samples(count, layers=6, n=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        [tuple(torch.rand(n, generator=g) ** 4 for _ in range(2)) for _ in range(layers)]
        for _ in range(count)
    ]


def spent(deletions, n):
    total = 0.0
    for d in deletions:
        n -= d
        total += SHAPE.cost(n)
    return total


def prefix_twin(values, mass, alpha):
    """Longest ascending prefix that leaves (1 - alpha) of the mass."""
    out, left = set(), sum(values.values())
    for i in sorted(values, key=lambda i: (values[i], i)):
        left -= values[i]
        if left < (1 - alpha) * mass:
            break
        out.add(i)
    return out


def delete_twin(layers, alpha, reduction):
    n = len(layers[0][0])
    alive, counts, cost, done = list(range(n)), [], 0.0, False
    for number, (a, b) in enumerate(layers):
        gone = set()
        if not done:
            both = [
                prefix_twin({i: float(s[i]) for i in alive}, float(s.double().sum()), alpha)
                for s in (a, b)
            ]
            gone = set(list(both[0] & both[1])[: len(alive) - 1])
        alive = [i for i in alive if i not in gone]
        counts.append(len(gone))
        cost += SHAPE.cost(len(alive))
        rest = (len(layers) - number - 1) * SHAPE.cost(len(alive))
        done = done or cost + rest <= (1 - reduction) * len(layers) * SHAPE.cost(n)
    return counts, done


@pytest.mark.parametrize("reduction", [0.2, 0.5, 0.8])
def test_fitted_deletions_are_the_twin_at_the_smallest_sufficient_tolerance(reduction):
    for seed in range(3):
        (layers,) = samples(1, seed=seed)
        got = fit_deletions([layers], reduction, SHAPE)
        low, high, best = 0.0, 1.0, delete_twin(layers, 1.0, reduction)[0]
        while high - low > 0.01:
            alpha = (low + high) / 2
            counts, enough = delete_twin(layers, alpha, reduction)
            low, high, best = (low, alpha, counts) if enough else (alpha, high, best)
        assert list(got) == best
        assert spent(got, 50) <= (1 - reduction) * 6 * SHAPE.cost(50)


def test_deletions_average_over_prompts_and_make_a_curve():
    several = samples(4)
    each = [fit_deletions([s], 0.5, SHAPE) for s in several]
    assert fit_deletions(several, 0.5, SHAPE) == tuple(sum(c) // 4 for c in zip(*each, strict=True))
    left = tokens_left(each[0], 50)
    assert len(left) == 6 and list(left) == sorted(left, reverse=True)
    assert left[0] == math.floor((50 - each[0][0]) * 576 / 50)
    method = FitPrune(left=left)
    room = Room(IntraLLM, (576,) * 6, 6)
    assert method.counts(room, None)[-1] <= left[4]


def test_bad_calibration_inputs_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        fit_deletions([], 0.5, SHAPE)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_deletions(samples(1), 60, SHAPE)
    with pytest.raises(ValueError, match="at least one sample"):
        withdrawal_layer([])
    a = torch.zeros(4)
    with pytest.raises(ValueError, match="covers layers"):
        withdrawal_layer([(a, {5: a, 6: a}), (a, {5: a})])


def test_divergence_direction_and_first_layer():
    """The withdrawn distribution is the reference; the first layer under eta wins, None if there is none."""
    full, withdrawn = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 0.5])
    p, q = withdrawn.softmax(0), full.softmax(0)
    assert withdrawal_divergence(full, withdrawn) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-5
    )
    assert withdrawal_divergence(full, withdrawn) != pytest.approx(
        withdrawal_divergence(withdrawn, full), rel=0.05
    )
    near = {5: withdrawn, 6: full + 0.01 * withdrawn, 7: full}
    assert withdrawal_layer([(full, near)]).layer == 6
    assert withdrawal_layer([(full, {5: withdrawn})]).layer is None
    assert list(withdrawal_layer([(full, near)]).divergence) == [5, 6, 7]
