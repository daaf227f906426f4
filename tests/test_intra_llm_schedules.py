"""Schedules: what is promised over layers, published lists and their true averages."""

import itertools

import pytest

from effivlm.budget import Budget, BudgetError, parse_budget
from effivlm.methods.base import IntraLLM, PreLLM, Room
from effivlm.methods.hybrid.illava import ILLaVA
from effivlm.methods.hybrid.must_drop import MustDrop
from effivlm.methods.hybrid.polymorphic import Polymorphic
from effivlm.methods.hybrid.vscan import VScan
from effivlm.methods.intra_llm.adaptinfer import AdaptInfer
from effivlm.methods.intra_llm.dart import DART
from effivlm.methods.intra_llm.fastv import FastV, FastVSink
from effivlm.methods.intra_llm.fitprune import FitPrune, curve_of
from effivlm.methods.intra_llm.pyramiddrop import PyramidDrop
from effivlm.methods.intra_llm.sparsevlm import SparseVLM, SparseVLMRank
from effivlm.methods.intra_llm.vtw import VTW
from effivlm.methods.schedules import (
    equal_factor,
    geometric,
    mean_share,
    most_entering,
    scaled_layers,
    stages,
)

SCHEDULED = [
    FastV(),
    FastV(layer=3),
    FastVSink(),
    DART(),
    SparseVLM(),
    SparseVLM(variant="plus"),
    SparseVLMRank(),
    PyramidDrop(),
    PyramidDrop(ratio=0.7),
    AdaptInfer(),
    FitPrune(),
    MustDrop(),
    Polymorphic(),
    ILLaVA(),
    VScan(),
]
NAMES = [f"{type(m).__name__}{i}" for i, m in enumerate(SCHEDULED)]
LAYERS, TOKENS, SHARES = (
    (4, 12, 28, 32, 40, 64),
    (1, 2, 7, 64, 576, 2880),
    (0.02, 0.07, 0.1, 0.2, 0.333, 0.4, 0.5, 0.77, 0.95),
)
GRID = list(itertools.product(LAYERS, TOKENS, SHARES))


def inside(method, layers, n, budget):
    """Tokens entering every decoder layer."""
    return list(method.counts(Room(IntraLLM, (n,) * layers, layers), budget))


def enters(method, layers, n, budget):
    """Tokens entering the LLM."""
    (count,) = method.counts(Room(PreLLM, (n,), layers), budget)
    return count


def sound(counts, layers, n):
    assert len(counts) == layers and counts[0] == n
    assert all(a >= b >= 0 for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize("method", SCHEDULED, ids=NAMES)
def test_mean_never_exceeds_and_comes_close(method):
    """Over many depths, lengths and shares: at most what was asked, and within flooring of it; else a named smallest share."""
    feasible = 0
    for layers, n, share in GRID:
        budget = parse_budget(str(share), "visual_mean")
        try:
            counts = inside(method, layers, n, budget)
        except BudgetError as error:
            smallest = float(str(error).split("smallest feasible share is ")[1].split(";")[0])
            assert share < smallest + 1e-4, (layers, n, share, str(error))
            inside(method, layers, n, Budget(min(1.0, smallest + 1e-3), None, "visual_mean", "x"))
            continue
        feasible += 1
        sound(counts, layers, n)
        spent = sum(counts)
        assert abs(spent / (layers * n) - mean_share(counts, n)) < 1e-12
        assert spent <= share * layers * n + 1e-6, (layers, n, share, counts)
        if (
            n >= 64 and counts[-1] < n
        ):  # each stage is floored to a whole token: less than a token per layer is lost
            assert spent > share * layers * n - layers - 1e-6, (layers, n, share, counts)
    assert feasible > 70


@pytest.mark.parametrize("method", SCHEDULED, ids=NAMES)
def test_visual_is_the_count_after_the_last_cut(method):
    for layers, n, share in GRID:
        budget = parse_budget(str(share), "visual")
        counts = inside(method, layers, n, budget)
        sound(counts, layers, n)
        assert counts[-1] == budget.count(n)


# ------------------------------------------------------------------------------------------------ published averages
@pytest.mark.parametrize(
    ("method", "layers", "mean"),
    [
        (SparseVLM(preset="192"), 32, 206.5),
        (SparseVLM(preset="128"), 32, 145.4),
        (SparseVLM(preset="96"), 32, 114.1),
        (SparseVLM(preset="64"), 32, 82.3),
        (SparseVLM(variant="plus", preset="192"), 32, 206.8),
        (SparseVLM(variant="plus", preset="128"), 32, 144.1),
        (SparseVLM(variant="plus", preset="96"), 32, 113.9),
        (SparseVLM(variant="plus", preset="64"), 32, 81.8),
        (SparseVLM(preset="192"), 40, 187.8),
        (SparseVLM(preset="128"), 40, 124.1),
        (SparseVLM(preset="96"), 40, 96.7),
        (SparseVLM(preset="64"), 40, 69.4),
        (AdaptInfer(preset="128"), 32, 146.3),
        (AdaptInfer(preset="64"), 32, 82.9),
        (AdaptInfer(preset="48"), 32, 66.7),
        (AdaptInfer(preset="32"), 32, 51.0),
        (PyramidDrop(preset="paper"), 32, 0.46875 * 576),
        (VTW(layer=16), 32, 288.0),
    ],
)
def test_published_lists_cost_more_than_their_names_say(method, layers, mean):
    assert mean_share(inside(method, layers, 576, None), 576) * 576 == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize(
    ("preset", "mean"), [("50", 0.524), ("60", 0.425), ("80", 0.227), ("90", 0.126)]
)
def test_fitprune_curves(preset, mean):
    """Known at seven layers only, interpolated between: within three points of the published averages."""
    method = FitPrune(preset=preset)
    assert mean_share(inside(method, 32, 576, None), 576) == pytest.approx(mean, abs=0.03)


def test_single_cut_arithmetic():
    """r = (K + (L - K) R) / L; 28 layers, cut before 2, 10 % at the cut: 16.4 % on average."""
    counts = inside(FastV(), 28, 10000, parse_budget("0.1", "visual"))
    assert counts == [10000] * 2 + [1000] * 26
    assert mean_share(counts, 10000) == pytest.approx(0.1643, abs=1e-4)
    counts = inside(FastV(), 28, 10000, parse_budget("0.2", "visual_mean"))
    assert counts[2:] == [int(10000 * (0.2 * 28 - 2) / 26)] * 26
    with pytest.raises(BudgetError, match=r"smallest feasible share is 0\.07"):
        inside(FastV(), 28, 10000, parse_budget("0.05", "visual_mean"))


@pytest.mark.parametrize(
    ("layers", "at", "factor"),
    [(32, (3, 7, 16), 0.7075), (40, (3, 7, 16), 0.729), (28, (3, 7, 13), 0.703)],
)
def test_polymorphic_factor(layers, at, factor):
    assert equal_factor(0.5, layers, at) == pytest.approx(factor, abs=6e-4)


def test_hybrids_meet_their_mean_through_both_stages():
    """What enters the LLM times what its cuts leave is the average asked for, never more."""
    for method in (Polymorphic(), VScan(), Polymorphic(multiple=1.5), VScan(ratio=2.0)):
        assert isinstance(method, PreLLM)
        for layers, n, share in GRID:
            budget = parse_budget(str(share), "visual_mean")
            k = budget.count(n)
            entering = enters(method, layers, n, budget)
            counts = inside(method, layers, entering, Budget(None, k, "visual_mean", "x"))
            assert k <= entering <= n
            assert sum(counts) <= k * layers
            if n >= 64 and k > 20:
                assert sum(counts) > (k - 2) * layers


def test_vscan_reproduces_its_example():
    """96 tokens enter, 32 stay after layer 16: 64 on average."""
    budget = Budget(None, 64, "visual_mean", "64")
    assert enters(VScan(), 32, 576, budget) == 96
    assert inside(VScan(), 32, 96, budget) == [96] * 16 + [32] * 16
    assert enters(VScan(), 32, 576, parse_budget("32", "visual")) == 96
    assert enters(Polymorphic(), 32, 576, parse_budget("0.1", "visual_mean")) == 2 * 57


def test_shallow_models_move_the_layers():
    assert scaled_layers((8, 16, 24), 32) == (8, 16, 24) and scaled_layers((8, 16, 24), 24) == (
        6,
        12,
        18,
    )
    assert scaled_layers((3, 7, 16), 4) == (1, 2) and scaled_layers((3, 7, 16), 4, (1, 2, 3)) == (
        1,
        2,
        3,
    )
    assert scaled_layers((2,), 2) == (1,)
    four = Room(IntraLLM, (100,) * 4, 4)
    with pytest.raises(BudgetError, match="do not fit a model of 4 decoder layers"):
        stages("x", (1, 5), (0.5, 0.2), four, parse_budget("0.1", "visual"))
    with pytest.raises(BudgetError, match="do not fit"):
        geometric("x", (2, 2), four, parse_budget("0.1", "visual"))


def test_most_entering():
    for mean, first, layers in itertools.product((1, 2, 5, 64), (1, 3, 8), (9, 32)):
        n = most_entering(mean, first, layers)
        assert first * n + layers - first <= mean * layers < first * (n + 1) + layers - first


@pytest.mark.parametrize("method", [SparseVLM, PyramidDrop, AdaptInfer, FitPrune])
def test_preset_or_budget_not_both_not_neither(method):
    preset = "paper" if method is PyramidDrop else "60" if method is FitPrune else "64"
    with pytest.raises(BudgetError, match="got neither"):
        inside(method(), 32, 576, None)
    with pytest.raises(BudgetError, match="got both"):
        inside(method(preset=preset), 32, 576, parse_budget("0.1", "visual"))
    with pytest.raises(ValueError, match="expected"):
        method(preset="17")
    assert inside(method(preset=preset), 32, 144, None)[-1] <= 72


def test_vtw():
    budget = parse_budget("0.5", "visual_mean")
    half = [576] * 16 + [0] * 16
    assert inside(VTW(), 32, 576, None) == inside(VTW(), 32, 576, budget) == half
    assert inside(VTW(), 28, 10, parse_budget("0.2", "visual_mean")) == [10] * 5 + [0] * 23
    assert inside(VTW(), 32, 0, budget) == [0] * 32
    with pytest.raises(BudgetError, match=r"smallest feasible share is 0\.0312"):
        inside(VTW(), 32, 576, parse_budget("0.02", "visual_mean"))
    with pytest.raises(BudgetError, match="does not exist"):
        inside(VTW(layer=40), 32, 576, None)


def test_fitprune_fitted_curve():
    left = curve_of((573, 517, 464, 321, 290, 208, 173))
    assert left[0] == 573 and left[31] == 173 and len(left) == 32
    fitted = FitPrune(left=left)
    assert inside(fitted, 32, 576, None) == inside(FitPrune(preset="50"), 32, 576, None)
    assert mean_share(inside(fitted, 32, 576, parse_budget("0.3", "visual_mean")), 576) <= 0.3
