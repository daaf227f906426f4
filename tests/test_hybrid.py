"""Hybrid methods, stage by stage, against naive transcriptions; and through a tiny model, all stages under one budget."""

import itertools
import math

import pytest
import torch
from layer_contexts import layer_tokens
from method_contexts import block_tokens, image_tokens
from test_intra_llm import average, best, clusters_twin, cos, dense, merged_twin, order
from tiny import build, generate, prompt

from effivlm.budget import BudgetError, parse_budget
from effivlm.methods.base import EncoderReducer, ImageTokens, KVCache, LayerCache, Room
from effivlm.methods.hybrid.illava import ILLaVA
from effivlm.methods.hybrid.must_drop import MustDrop, MustDropStage1, uniformity, windows
from effivlm.methods.hybrid.polymorphic import Polymorphic, PolymorphicStage1, matches
from effivlm.methods.hybrid.vscan import VScan, VScanStage1
from effivlm.methods.signals import LastRow, Saliency
from effivlm.runtime.audit import check_entries, check_selection
from effivlm.runtime.session import Session

torch.set_num_threads(1)
KINDS = pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "constant"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


# ------------------------------------------------------------------------------------------------------------ MustDrop
@pytest.mark.parametrize("kind", ["random", "clustered"])
@TYPES
@pytest.mark.parametrize("k", [58, 63, 70])
def test_mustdrop_merges_the_most_uniform_windows(kind, dtype, k):
    tokens = block_tokens(kind, 8, 9, dtype=dtype)
    cells: dict = {}
    for i, (r, c) in enumerate(tokens.place.tolist()):
        cells.setdefault((int(r) // 3, int(c) // 3), []).append(i)
    groups = [cells[c] for c in sorted(cells)]
    similarity = [
        average([cos(tokens.states[a], tokens.states[b]) for a in g for b in g if a != b])
        for g in groups
    ]
    torch.testing.assert_close(
        uniformity(tokens.states, windows(tokens.place, 3)).double(),
        torch.tensor(similarity).double(),
        atol=1e-5,
        rtol=0,
    )
    want, gone = torch.eye(72, dtype=torch.float64), []
    for w in order(similarity):
        middle = groups[w][len(groups[w]) // 2]
        merged = [i for i in groups[w] if i != middle][: 72 - k - len(gone)]
        total = sum(float(tokens.sizes[i]) for i in [middle, *merged])
        want[middle] = 0
        for i in [middle, *merged]:
            want[middle, i] = float(tokens.sizes[i]) / total
        gone += merged
        if len(gone) == 72 - k:
            break
    got = MustDrop().reduce_block(tokens, k)
    assert got.keep.tolist() == [i for i in range(72) if i not in gone]
    torch.testing.assert_close(dense(got, 72)[got.keep], want[got.keep], atol=1e-6, rtol=0)


@KINDS
@TYPES
def test_mustdrop_encoder_stage_is_exact_on_any_grid(kind, dtype):
    for rows, columns in ((1, 2), (2, 2), (1, 7), (4, 4), (7, 5), (24, 24)):
        n = rows * columns
        for share in (0.01, 0.3, 0.9):
            budget = parse_budget(str(share), "visual")
            first, *later = MustDrop().counts(Room(EncoderReducer, (n,) * 12, 32), budget)
            keep = later[0]
            assert first == n and set(later) == {keep} and keep >= budget.count(n)
            if keep < n:
                got = MustDrop().reduce_block(block_tokens(kind, rows, columns, dtype=dtype), keep)
                check_selection(MustDrop(), got.keep, got.merged, keep, n)


@KINDS
@pytest.mark.parametrize("k", [1, 3, 4, 20, 39])
def test_mustdrop_filter(kind, k):
    """Key set first (8 % of what entered, by saliency), then the larger of two relative criteria; the key set stays the same."""
    method = MustDrop()
    saliency = torch.rand(40, generator=torch.Generator().manual_seed(2))
    notes: dict = {}
    picture = image_tokens(method, rows=5, columns=8, values={Saliency(at="last"): saliency})
    method.observe_image(
        ImageTokens(**{**vars(picture), "notes": notes, "position": torch.arange(5, 45)})
    )
    tokens = layer_tokens(method, kind, notes=notes)
    a = tokens.source.rows.double()
    mean = [
        [average([a[h, t, j] for h in range(4)]) for j in tokens.visual.tolist()] for t in range(6)
    ]
    g = [sum(float(row[j]) for row in mean) for j in range(40)]
    u = [max(float(row[j]) for row in mean) for j in range(40)]
    score = [max(g[j] / (0.001 * sum(g)), u[j] / 0.001) for j in range(40)]
    keys = order(saliency)[: math.ceil(0.08 * 40)]
    want = keys + [j for j in order([round(s, 4) for s in score]) if j not in keys]
    assert method.select_layer(tokens, k).keep.tolist() == sorted(want[:k])
    assert notes["final"][0].tolist() == [5 + j for j in sorted(want[:k])]
    assert sorted(notes["protected"][0].tolist()) == sorted(5 + j for j in keys)


def test_mustdrop_caches_hold_the_final_set():
    method = MustDrop()
    notes = {"final": {0: torch.tensor([3, 5]), 1: torch.tensor([9])}}
    position = torch.tensor([0, 1, 3, 4, 5, 7, 8, 9, 10])
    image = torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, -1])
    cache = LayerCache(
        str,
        method.signals,
        7,
        notes,
        torch.zeros(2, 9, 4),
        torch.zeros(2, 9, 4),
        image,
        position,
        3,
        32,
    )
    entries = method.choose(cache, method.score(cache, 9), 7)
    check_entries(method, entries, 7, 9, 2)
    assert position[entries.keep[1]].tolist() == [0, 1, 3, 5, 7, 9, 10]
    lengths = [500] * 3 + [400] * 4 + [300] * 4 + [250] * 4 + [200] * 17
    budget, known = parse_budget("0.2", "visual"), (0.0,) * 32
    room = Room(KVCache, tuple(lengths), 32, known)
    assert method.waits and method.counts(room, budget) == [500] * 2 + [200] * 30


# ------------------------------------------------------------------------------------------------------------- iLLaVA
@KINDS
@TYPES
@pytest.mark.parametrize("variant", ["", "official"])
@pytest.mark.parametrize("k", [1, 2, 30, 71])
def test_illava_collapses_the_least_attended(kind, dtype, variant, k):
    tokens = block_tokens(kind, dtype=dtype)
    ranking = order(tokens.received)
    members = ranking[k - 1 :]
    weight = [float(i + 1) if variant else float(tokens.received[m]) for i, m in enumerate(members)]
    want = torch.eye(72, dtype=torch.float64)
    want[members[0]] = 0
    for m, w in zip(members, weight, strict=True):
        want[members[0], m] = w / sum(weight)
    got = ILLaVA(variant=variant).reduce_block(tokens, k)
    assert got.keep.tolist() == sorted(ranking[:k])
    torch.testing.assert_close(dense(got, 72)[got.keep], want[got.keep], atol=1e-6, rtol=0)


def test_illava_splits_the_published_reduction():
    """729 to 361 in the encoder and 70 % of that in the LLM: 0.347 in all; four equal cuts."""
    budget = parse_budget("253", "visual")
    counts = ILLaVA().counts(Room(EncoderReducer, (729,) * 26, 32), budget)
    steps = [a - b for a, b in itertools.pairwise(counts)]
    assert [i + 1 for i, s in enumerate(steps) if s] == [5, 6, 7, 8]
    assert abs(counts[-1] - 361) <= 3 and max(steps[4:8]) - min(steps[4:8]) <= 1
    two = ILLaVA().counts(Room(EncoderReducer, (729,) * 3, 32), budget)
    assert two == [729, 729, counts[-1]]


# --------------------------------------------------------------------------------------------------------- Polymorphic
@pytest.mark.parametrize("kind", ["random", "clustered"])
@TYPES
@pytest.mark.parametrize("k", [1, 2, 9, 30, 71])
def test_polymorphic_before_the_llm(kind, dtype, k):
    method = Polymorphic()
    tokens = image_tokens(method, kind, dtype=dtype)
    clusters = min(max(1, int(k / 6.4)), k - 1)
    ranking = order(tokens[Saliency()])
    groups = (
        clusters_twin(tokens.embeds, torch.tensor(sorted(ranking[k - clusters :])), clusters)
        if clusters
        else {}
    )
    got = method.select_image(tokens, k)
    assert got.keep.tolist() == sorted(ranking[: k - clusters] + list(groups))
    torch.testing.assert_close(dense(got, 72), merged_twin(groups, 72), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["random", "clustered"])
@TYPES
@pytest.mark.parametrize("normed", [False, True])
def test_polymorphic_matches(kind, dtype, normed):
    tokens = layer_tokens(Polymorphic(), kind, dtype=dtype)
    v, t = tokens.hidden[tokens.visual].double(), tokens.hidden[tokens.text].double()
    if normed:
        v, t = ([r / (sum(float(x) ** 2 for x in r) / len(r)) ** 0.5 for r in m] for m in (v, t))
    match = []
    for a in v:
        e = [math.exp(float(a @ b) / 4) for b in t]  # sqrt(16)
        match.append([x / sum(e) for x in e])
    weight = [average([row[i] for row in match]) for i in range(6)]
    chosen = [i for i in range(6) if weight[i] > average(weight)]
    want = [average([row[i] for i in chosen]) for row in match]
    got = matches(tokens.hidden[tokens.visual], tokens.hidden[tokens.text], normed)
    torch.testing.assert_close(
        got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------------------- VScan
@KINDS
@TYPES
@pytest.mark.parametrize("k", [1, 2, 9, 30, 71])
def test_vscan_scans(kind, dtype, k):
    method = VScan()
    shallow = torch.rand(72, generator=torch.Generator().manual_seed(4))
    tokens = image_tokens(method, kind, dtype=dtype, values={Saliency(at=5): shallow})
    cells: dict = {}
    for i, (r, c) in enumerate(tokens.place.tolist()):
        cells.setdefault((int(r) // 6, int(c) // 6), []).append(i)
    groups = [cells[c] for c in sorted(cells)]
    quota = [len(g) * (k // 2) / 72 for g in groups]
    counts = [int(q + 1e-9) for q in quota]
    for i in sorted(range(len(groups)), key=lambda i: (counts[i] - quota[i], i))[
        : k // 2 - sum(counts)
    ]:
        counts[i] += 1
    local = [
        i
        for g, c in zip(groups, counts, strict=True)
        for i in sorted(g, key=lambda i: (-float(shallow[i]), i))[:c]
    ]
    deep = [-1.0 if i in local else float(tokens[Saliency()][i]) for i in range(72)]
    got = method.select_image(tokens, k)
    assert got.keep.tolist() == sorted(local + best(deep, k - len(local)))
    if kind in ("random", "clustered"):
        heirs: dict = {c: [c] for c in got.keep.tolist()}
        for i in sorted(set(range(72)) - set(heirs)):
            heirs[
                max(
                    got.keep.tolist(),
                    key=lambda c, i=i: (cos(tokens.embeds[i], tokens.embeds[c]), -c),
                )
            ].append(i)
        torch.testing.assert_close(
            dense(got, 72)[got.keep], merged_twin(heirs, 72)[got.keep], atol=1e-5, rtol=0
        )


def test_vscan_without_a_grid_scans_globally():
    tokens = image_tokens(VScan(), values={Saliency(at=5): torch.rand(72)})
    blind = ImageTokens(**{**vars(tokens), "place": torch.full((72, 2), torch.nan)})
    assert VScan().select_image(blind, 9).keep.tolist() == best(tokens[Saliency()], 9)


@KINDS
@pytest.mark.parametrize("k", [1, 20])
def test_vscan_inside_the_llm(kind, k):
    tokens = layer_tokens(VScan(), kind)
    row = tokens[LastRow()].double()
    assert VScan().select_layer(tokens, k).keep.tolist() == best(
        [average(list(row[:, j])) for j in tokens.visual.tolist()], k
    )


# -------------------------------------------------------------------------------------------------- through tiny models
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize(
    "text",
    [
        "polymorphic@0.45",
        "vscan@0.6:unit=visual_mean",
        "mustdrop@0.85:unit=visual_mean",
        "illava@0.8:unit=visual_mean",
        "vscan@0.2",
        "polymorphic@0.25:unit=visual",
        "mustdrop@0.3",
        "illava@0.3",
        "random_pre@0.8 + vscan@0.2",
        "random_pre@0.8 + vscan@0.5",
        "random_pre@0.8 + polymorphic@0.5",
        "visionzip@0.8 + fastv_sink@0.5",
    ],
)
def test_one_budget_over_all_stages(family, text):
    """The tensors hold at most the share asked for, counted over all layers; a part after another one starts from what that left."""
    model, inputs = build(family), prompt(family, 1)
    with Session(model, text) as session:
        generate(model, inputs, 3)
    account = session.accounts[0]
    part = session.setting.parts[-1]
    n = account.visual_tokens
    entered = int(n * 0.8 + 1e-9) if len(session.setting.parts) == 2 else n
    spent = sum(account.visual_per_layer) / len(account.visual_per_layer)
    if part.budget.unit == "visual_mean":
        assert spent <= part.budget.count(entered) + 1e-9
    else:
        assert account.visual_per_layer[-1] == part.budget.count(entered)
    assert spent < n


def test_keep_counts_of_mustdrop_in_the_cache():
    """Early layers hold the final set only; the first pruned layer's predecessors stay full."""
    model, inputs = build("llava"), prompt("llava", 1)
    with Session(model, "mustdrop@0.3") as session:
        generate(model, inputs, 3)
    account = session.accounts[0]
    text = account.prompt_tokens - account.visual_tokens
    final = account.visual_per_layer[-1] + text
    assert account.kv_per_layer == (final,) * 4 or account.kv_per_layer[1:] == (final,) * 3


# ------------------------------------------------------------------------------------------------------ stage 1 alone
@pytest.mark.parametrize(
    ("alone", "whole"), [(VScanStage1(), VScan()), (PolymorphicStage1(), Polymorphic())]
)
@pytest.mark.parametrize("k", [1, 9, 40])
def test_stage_1_alone_is_what_the_whole_method_does_first(alone, whole, k):
    tokens = image_tokens(
        whole, values={Saliency(at=5): torch.rand(72, generator=torch.Generator().manual_seed(4))}
    )
    got = [
        m.select_image(ImageTokens(**{**vars(tokens), "declared": m.signals}), k)
        for m in (alone, whole)
    ]
    assert torch.equal(got[0].keep, got[1].keep)
    torch.testing.assert_close(dense(got[0], 72), dense(got[1], 72))


@pytest.mark.parametrize(
    "text", ["vscan_stage1@0.3", "polymorphic_stage1@0.3", "mustdrop_stage1@0.6"]
)
def test_stage_1_alone_cuts_before_the_llm_only(text):
    model, inputs = build("llava"), prompt("llava", 1)
    with Session(model, text) as session:
        generate(model, inputs, 3)
    account = session.accounts[0]
    n = account.visual_tokens
    assert account.visual_per_layer == (int(n * float(text.split("@")[1]) + 1e-9),) * session.layers
    assert set(account.kv_per_layer) == {account.visual_per_layer[0] + account.prompt_tokens - n}


def test_mustdrop_stage_1_names_the_smallest_share_its_windows_allow():
    method, tokens = MustDropStage1(), block_tokens("random", 8, 9)
    assert method.reduce_block(tokens, 9).keep.tolist() == [10, 13, 16, 37, 40, 43, 63, 66, 69]
    with pytest.raises(
        BudgetError,
        match=r"72 tokens lie in 9 windows of side 3.*smallest feasible share is 0\.1250",
    ):
        method.reduce_block(tokens, 8)
    assert len(MustDropStage1(window=4).reduce_block(tokens, 8).keep) == 8
