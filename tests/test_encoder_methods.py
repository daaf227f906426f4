"""Encoder reducers through hand-made blocks: ToMe against a loop transcription, its schedule against its promises."""

import itertools

import pytest
import torch
from method_contexts import block_tokens

from effivlm.budget import parse_budget
from effivlm.families.tiny import double, exact
from effivlm.methods.base import EncoderReducer, Room
from effivlm.methods.encoder.tome import ToMe
from effivlm.ops import merge
from effivlm.runtime.audit import check_selection
from effivlm.runtime.session import Session

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [71, 60, 36, 20, 1])
@pytest.mark.parametrize("prefix", [0, 1])
def test_tome_merges_pairs_by_size(kind, dtype, k, prefix):
    """A class token is counted, so it decides which tokens are even, and never merges."""
    tokens = block_tokens(kind, dtype=dtype, prefix=prefix)
    n = len(tokens.keys)
    x = [row.double() for row in tokens.keys]
    members = {i: [i] for i in range(n)}
    while len(members) > k:  # one bipartite step, or several where one cannot merge enough
        alive = sorted(members)
        line = ["cls"] * prefix + alive
        even, odd = line[prefix * 2 :: 2], line[1::2]
        pairs = []
        for i in even:
            if odd:
                cos = [round(float(x[i] @ x[j] / (x[i].norm() * x[j].norm())), 6) for j in odd]
                j = cos.index(max(cos))
                pairs.append((-cos[j], i, odd[j]))
        for _, i, j in sorted(pairs)[: min(len(alive) - k, len(alive) // 2)]:
            members[j] += members.pop(i)
    got = ToMe().reduce_block(tokens, k)
    check_selection(ToMe(), got.keep, got.merged, k, n)
    assert got.keep.tolist() == sorted(members)
    rows = merge.apply(tokens.states, (got.merged.target, got.merged.source, got.merged.weight))
    sizes = tokens.sizes.double()
    for t, group in members.items():
        want = (tokens.states[group].double() * sizes[group, None]).sum(0) / sizes[group].sum()
        torch.testing.assert_close(rows[t].double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        got.merged.source.sort().values, torch.arange(n)
    )  # every group is merged somewhere


@pytest.mark.parametrize("blocks", [2, 3, 24, 32])
@pytest.mark.parametrize("budget", ["0.05", "0.4", "1tok", "0.9"])
def test_tome_schedule_reaches_the_budget_in_even_steps(blocks, budget):
    room = Room(EncoderReducer, (576,) * blocks, 32)
    counts = ToMe().counts(room, parse_budget(budget, "visual"))
    steps = [a - b for a, b in itertools.pairwise(counts)]
    assert len(counts) == blocks and counts[0] == 576
    assert counts[-1] == parse_budget(budget, "visual").count(576)
    last = max(1, blocks - 2)
    assert max(steps[:last]) - min(steps[:last]) <= 1 and not any(steps[last:])


@pytest.mark.parametrize(("family", "prefix"), [("llava", 1), ("mantis", 0), ("internvl", 1)])
def test_tome_is_told_of_a_class_token(family, prefix, monkeypatch):
    seen, plain = [], ToMe.reduce_block
    monkeypatch.setattr(ToMe, "reduce_block", lambda m, t, k: seen.append(t) or plain(m, t, k))
    model, inputs = exact(family), double(family)
    with Session(model, "tome@0.6"), torch.no_grad():
        model(**inputs)
    assert {t.prefix for t in seen} == {prefix}
    assert len({len(t.keys) for t in seen}) == len({t.block for t in seen})  # patches alone


def test_tome_proportional_attention_is_a_parameter():
    assert ToMe().proportional_attention and not ToMe(prop_attn=False).proportional_attention
