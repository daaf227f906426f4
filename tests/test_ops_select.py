"""Selection, clustering and merging ops against slow twins; lattices and grids against their definitions."""

import itertools
import math

import pytest
import torch
from method_contexts import features, grid

from effivlm.ops import merge, regions, select
from effivlm.ops.cluster import dpc_knn, nearest_kept

torch.set_num_threads(1)
KINDS = pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "constant"])


def test_ranking_ties_and_nan():
    scores = torch.tensor([1.0, 3.0, float("nan"), 3.0, -torch.inf, 1.0])
    assert select.ranked(scores).tolist() == [1, 3, 0, 5, 4, 2]  # NaN last, below -inf
    assert select.top_k(scores, 3).tolist() == [0, 1, 3]
    assert select.top_k_mask(scores[None], 3)[0].tolist() == [True, True, False, True, False, False]
    assert select.top_k(torch.zeros(5000), 7).tolist() == list(
        range(7)
    )  # long enough for an unstable sort to show
    assert select.first_max(torch.tensor([1.0, 2.0, 2.0 + 5e-7])).tolist() == [1]


def test_unit_and_min_max_edge_cases():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0]])
    torch.testing.assert_close(select.unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]))
    assert select.min_max(torch.tensor([5.0, 5.0])).tolist() == [1.0, 1.0]
    torch.testing.assert_close(
        select.min_max(torch.tensor([1e-5, 3e-5, 2e-5])), torch.tensor([0.0, 1.0, 0.5])
    )


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 3), (10, 10), (729, 36), (7, 6)])
def test_lattice(n, k):
    assert select.lattice(n, k).tolist() == [math.floor((t + 0.5) * n / k) for t in range(k)]


def test_grid_shape_is_close_to_the_best_grid():
    """Never above k; never less than 80 % of the best area among grids at least as close in aspect."""
    for rows, columns, k in itertools.product(
        (1, 3, 8, 24), (1, 5, 24, 40), (1, 2, 7, 30, 57, 400)
    ):
        a, b = select.grid_shape(rows, columns, k)
        assert 1 <= a <= rows and 1 <= b <= columns and a * b <= k

        def skew(p, q, ratio=rows / columns):
            return max(p / q / ratio, ratio / (p / q))

        best = max(
            p * q
            for p in range(1, rows + 1)
            for q in range(1, columns + 1)
            if p * q <= k and skew(p, q) <= skew(a, b) + 1e-9
        )
        assert a * b >= 0.8 * best, (rows, columns, k, a, b, best)


@KINDS
@pytest.mark.parametrize("batch", [1, 5, 64, 1000])
def test_lazy_coverage_equals_full_recomputation(kind, batch):
    x, w = features(kind, 90, 16), torch.linspace(0.25, 1, 90).mul(16).round() / 16
    assert torch.equal(select.coverage(x, w, 40, batch), select.coverage(x, w, 40, 10_000))


def test_log_det_maximises_the_determinant_step_by_step():
    x, q = features("random", 30, 20), torch.linspace(0.2, 1, 30)
    rows = select.unit(x).double() * q.double()[:, None]
    picked = []
    for _ in range(12):
        gains = [
            -math.inf
            if j in picked
            else float(torch.logdet(rows[[*picked, j]] @ rows[[*picked, j]].T))
            for j in range(30)
        ]
        picked.append(max(range(30), key=gains.__getitem__))
    assert select.log_det(x, q, 12).tolist() == picked


def test_beyond_the_rank_picks_stay_distinct():
    x, q = (
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[[0, 1, 2] * 20],
        torch.arange(60) / 60,
    )
    for keep in (select.log_det(x, q, 50), select.coverage(x, q, 50), select.max_min(x, 50)):
        assert keep.unique().numel() == 50


def test_max_min_spreads_over_blocks_of_rows():
    """More rows than one block of the first pick; the farthest outlier is found wherever it stands."""
    x = torch.ones(1300, 4) + 0.01 * torch.randn(
        1300, 4, generator=torch.Generator().manual_seed(1)
    )
    x[1290] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert select.max_min(x, 1).tolist() == [1290]


# ------------------------------------------------------------------------------------------------------------ clustering
@KINDS
@pytest.mark.parametrize(("count", "k"), [(1, 5), (4, 5), (6, 6), (9, 100), (60, 5)])
def test_dpc_knn(kind, count, k):
    x = features(kind, 60, 16, 4)
    n, c = x.shape
    d = [[float((a.double() - b.double()).norm()) / c**0.5 for b in x] for a in x]
    density = torch.tensor(
        [math.exp(-sum(v * v for v in sorted(row)[: min(k, n)]) / min(k, n)) for row in d]
    ).tolist()  # float32
    # in what order ties are denser: by index
    denser = [[j for j in range(n) if (-density[j], j) < (-density[i], i)] for i in range(n)]
    delta = [min((d[i][j] for j in denser[i]), default=max(map(max, d))) for i in range(n)]
    score = torch.tensor(density) * torch.tensor(delta)
    centres = sorted(range(n), key=lambda i: (-float(score[i]), i))[:count]
    got = dpc_knn(x, count, k)
    if kind in ("random", "clustered"):
        assert got.centres.tolist() == centres
    torch.testing.assert_close(got.density, torch.tensor(density), atol=1e-6, rtol=1e-5)
    for i in range(n):
        mine = int(got.assign[i])
        if i in got.centres.tolist():
            assert int(got.centres[mine]) == i
        else:
            assert d[i][int(got.centres[mine])] <= min(d[i][int(j)] for j in got.centres) + 1e-6
    assert got.centres.unique().numel() == count


@pytest.mark.parametrize("apart", [1.0, 30.0, 1e4])
def test_dpc_knn_whatever_the_distance(apart):
    """Far apart, exp(-d^2) is 0 for every token; clusters are those of the same tokens drawn together."""
    x = features("clustered", 60, 16, 4)
    scaled = [[float((a.double() - b.double()).norm()) * apart / 4 for b in x] for a in x]
    exponent = [-sum(v * v for v in sorted(row)[:5]) / 5 for row in scaled]
    denser = [[j for j in range(60) if exponent[j] > exponent[i]] for i in range(60)]
    delta = [
        min((scaled[i][j] for j in d), default=max(map(max, scaled))) for i, d in enumerate(denser)
    ]
    score = [e + math.log(d) for e, d in zip(exponent, delta, strict=True)]
    want = sorted(range(60), key=lambda i: -score[i])[:7]
    got = dpc_knn(x * apart, 7, 5)
    assert got.centres.tolist() == want
    assert apart == 1 or want != list(range(7))


def test_significant_digits_are_each_scores_own():
    x = torch.tensor([1e-4, 1e-4 * (1 + 1e-7), 1.1e-4, 3e9, 0.0, -2.0])
    got = select.significant(x)
    assert got[0] == got[1] and got[0] < got[2] and got[4] == 0
    torch.testing.assert_close(got, x, rtol=2e-6, atol=0)


@KINDS
def test_nearest_kept(kind):
    x = features(kind, 50, 16, 5)
    keep = torch.tensor([3, 4, 17, 40])
    dropped, heir = nearest_kept(x, keep, block=7)
    cos = select.unit(x) @ select.unit(x).T
    assert dropped.tolist() == [i for i in range(50) if i not in keep.tolist()]
    assert heir.tolist() == [int(keep[cos[i, keep].argmax()]) for i in dropped.tolist()]
    none, nobody = nearest_kept(x, torch.arange(50))
    assert len(none) == len(nobody) == 0


# --------------------------------------------------------------------------------------------------------------- merging
def test_mean_into_is_the_mean_weighted_by_size():
    x, size = torch.randn(10, 3), torch.tensor([1.0, 2, 1, 4, 1, 1, 1, 3, 1, 1])
    heir, dropped = torch.tensor([0, 0, 5, 0]), torch.tensor([3, 1, 7, 9])
    out = merge.apply(x, merge.mean_into(heir, dropped, size))
    torch.testing.assert_close(out[0], (x[[0, 3, 1, 9]] * size[[0, 3, 1, 9], None]).sum(0) / 8)
    torch.testing.assert_close(out[5], (x[5] + 3 * x[7]) / 4)
    torch.testing.assert_close(out[2], x[2])


@KINDS
@pytest.mark.parametrize(
    ("n", "r", "protected"),
    [(21, 4, 0), (21, 4, 1), (20, 50, 0), (20, 50, 1), (2, 1, 0), (1, 1, 0), (2, 1, 1)],
)
def test_bipartite(kind, n, r, protected):
    x = features(kind, n, 16, 6)
    cos = (select.unit(x).double() @ select.unit(x).double().T).tolist()
    best = []
    for i in range(0, n, 2):
        partners = sorted(range(1, n, 2), key=lambda j: (-round(cos[i][j], 6), j))
        if i >= protected and partners:
            best.append((-round(cos[i][partners[0]], 6), i, partners[0]))
    want = [(i, j) for _, i, j in sorted(best)[: max(0, min(r, (n - protected) // 2))]]
    source, target = merge.bipartite(x, r, protected)
    assert list(zip(source.tolist(), target.tolist(), strict=True)) == want


# --------------------------------------------------------------------------------------------------------------- regions
def test_regions():
    assert regions.segments(10, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert (
        regions.blocks(grid(4, 6), 2).view(4, 6).tolist()
        == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    )
    assert regions.blocks(torch.full((8, 2), float("nan")), 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    mean, size = regions.region_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([4, 4, 9]))
    assert mean.tolist() == [2.0, 5.0] and size.tolist() == [2, 1]
    assert regions.share_out(
        torch.tensor([1.0, 1.0, 8.0]), torch.tensor([5, 5, 2]), 6
    ).tolist() == [2, 2, 2]
    keep = regions.best_per_region(
        torch.tensor([1.0, 2.0, 2.0, 0.0, 9.0]), torch.tensor([0, 1, 1, 1, 0]), torch.tensor([1, 2])
    )
    assert keep.tolist() == [1, 2, 4]
