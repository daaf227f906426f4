"""Weights methods: pure steps against naive twins, packed layers, what comes back, what is refused."""

import copy

import pytest
import torch
from tiny import build, prompt

from effivlm import Sample, compress
from effivlm.budget import BudgetError
from effivlm.config import build_experiment
from effivlm.experiment import run
from effivlm.methods.base import Method, Paper
from effivlm.methods.linears import HESSIAN, NewWeight, Promise, WeightsError
from effivlm.methods.weights.ecoflap import EcoFLAP
from effivlm.ops import awq, pruning
from effivlm.ops.gptq import gptq
from effivlm.ops.grid import Codes, Grid, pack, rtn, unpack
from effivlm.records import read_run
from effivlm.runtime import passage
from effivlm.runtime.audit import AuditError
from effivlm.runtime.host import UnsupportedCall, host_of
from effivlm.runtime.plan import Plan
from effivlm.runtime.quant_linear import QuantLinear
from effivlm.runtime.session import Session
from effivlm.runtime.support import Unsupported
from effivlm.runtime.weight_audit import check_weight
from effivlm.runtime.weight_files import save_weights
from effivlm.runtime.weights import compress_weights
from effivlm.setting import Part, Setting, SettingError, parse_setting

torch.set_num_threads(1)


def matrix(rows=6, columns=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 20, columns, generator=g, dtype=torch.float64)
    x[..., 3] *= 8
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x


def samples(count=2, family="llava"):
    return [Sample(prompt(family, 1, seed=k), answer=3) for k in range(count)]


def part(text):
    return parse_setting(text).parts[0]


# --------------------------------------------------------------------------------- steps and their twins
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_wanda_is_the_formula_row_by_row(share):
    w, x = matrix()
    mask = pruning.wanda_mask(w, pruning.scaler_row(x), share)
    for i, row in enumerate(w.tolist()):
        score = [
            abs(v) * (sum(float(t[j]) ** 2 for s in x for t in s) / len(x)) ** 0.5
            for j, v in enumerate(row)
        ]
        lowest = sorted(range(len(row)), key=lambda j: score[j])[: int(len(row) * share)]
        assert mask[i].nonzero()[:, 0].tolist() == sorted(lowest)


def test_two_of_four():
    w, _ = matrix()
    mask = pruning.n_of_m_mask(w.abs(), 2, 4)
    for row, pruned in zip(w.abs().tolist(), mask.tolist(), strict=True):
        for a in range(0, len(row), 4):
            lowest = sorted(range(a, a + 4), key=lambda j: row[j])[:2]
            assert [j for j in range(a, a + 4) if pruned[j]] == sorted(lowest)


def sweep(w, h, change, damp=0.01):
    """Optimal brain surgery, one column after the other, the inverse Hessian made anew each time."""
    w, h = w.clone(), h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        new = change(w[:, j], j)
        w[:, j:] -= ((w[:, j] - new) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = new
    return w


def test_gptq_is_the_sweep_with_a_fresh_inverse():
    w, x = matrix()
    h, grid = pruning.hessian(x), Grid(4, 8)
    fitted = rtn(w, grid)

    def near(column, j):
        s, z = fitted.scale[:, j // 8], fitted.zero[:, j // 8].double()
        return (((column / s).round() + z).clamp(0, 15) - z) * s

    got = gptq(w, h, grid, actorder=False, blocksize=4).dequantized(torch.float64)
    torch.testing.assert_close(got, sweep(w, h, near), rtol=1e-6, atol=1e-6)
    error = [float(((x @ (q - w).T) ** 2).sum()) for q in (got, fitted.dequantized(torch.float64))]
    assert error[0] < error[1]


def test_sparsegpt_is_the_sweep_with_its_own_mask():
    w, x = matrix()
    h = pruning.hessian(x)
    swept = pruning.sparsegpt(w, pruning.inverse_factor(h), 0.5, blocksize=4)
    want = sweep(w, h, lambda column, j: column.masked_fill(swept.pruned[:, j], 0))
    torch.testing.assert_close(swept.weight, want, rtol=1e-6, atol=1e-6)
    assert int(swept.pruned.sum()) == 4 * (6 * 4 // 2 + 1)  # the threshold of each block goes too
    masked = w.masked_fill(swept.pruned, 0)
    assert ((x @ (swept.weight - w).T) ** 2).sum() < ((x @ (masked - w).T) ** 2).sum()


def test_ecoflap_shares_what_is_left_by_score():
    sizes = {"a": 10, "b": 10, "c": 20}
    got = pruning.ecoflap_ratios({"a": 100.0, "b": 1.0, "c": 1.0}, sizes, 0.5, 0.9)
    # everyone keeps a tenth (4), 16 are left: 9 fill a, the other 7 are shared 1 : 1 by b and c
    assert got == pytest.approx({"a": 0.0, "b": 0.55, "c": 0.725})
    for p in (0.2, 0.5):
        ratios = pruning.ecoflap_ratios({"a": 3.0, "b": 1.0, "c": 0.0}, sizes, p)
        assert sum(ratios[k] * sizes[k] for k in sizes) == pytest.approx(p * 40)
        assert max(ratios.values()) <= p + 0.1 + 1e-9


@pytest.mark.parametrize("span", ["zero", "free"])
@pytest.mark.parametrize("sym", [True, False])
def test_rtn_is_within_half_a_step(sym, span):
    w, _ = matrix()
    codes = rtn(w, Grid(4, 8, sym, span))
    step = codes.scale.repeat_interleave(8, 1)
    assert ((codes.dequantized(torch.float64) - w).abs() <= step * 1.0001).all()
    inside = codes.codes.float().sub(7.5).abs() < 7  # a clipped end may be off by up to a step
    assert ((codes.dequantized(torch.float64) - w).abs() <= step * 0.5001)[inside].all()
    assert torch.equal(unpack(pack(codes.codes)), codes.codes)


def test_awq_takes_the_scale_of_least_loss_and_clips_no_worse_than_not():
    w, x = matrix()
    grid = Grid(3, 8, span="free")
    scales = awq.candidates(awq.x_mean(x), awq.w_mean([w], 8), 6, identity=True)
    found = awq.scale_search([w], scales, grid, awq.output_loss(x, [w]))
    losses = [
        float((x @ (rtn(w * s, grid).dequantized(w.dtype) / s - w).T).pow(2).mean()) for s in scales
    ]
    assert found.losses == pytest.approx(losses) and found.index == losses.index(min(losses))
    flat = x.reshape(-1, 16)
    clipped = awq.clipped(w, awq.clip_search(w, flat, grid))
    for g in range(2):  # group by group
        cut = slice(8 * g, 8 * g + 8)
        error = [
            float((flat[:, cut] @ (rtn(v, grid).dequantized(w.dtype) - w)[:, cut].T).pow(2).sum())
            for v in (clipped, w)
        ]
        assert error[0] <= error[1] * 1.0001


# --------------------------------------------------------------------------------- packed layers
def packed(rows=128, columns=256, sym=False, **more):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(rows, columns, generator=g) * 0.05
    codes = rtn(w, Grid(4, 64, sym, scale_dtype=torch.bfloat16))
    return codes, QuantLinear(codes, None, torch.float32, **more)


@pytest.mark.parametrize("sym", [True, False])
def test_packed_weights_are_those_of_the_codes_and_small(sym):
    codes, layer = packed(sym=sym)
    assert torch.equal(layer.weight, codes.dequantized())
    assert layer.bytes_held == 128 * 128 + 128 * 4 * (2 if sym else 3)
    x = torch.randn(5, 256)
    torch.testing.assert_close(layer(x), x @ codes.dequantized().T)


def test_quality_pass_and_speed_pass_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("effivlm.runtime.quant_linear.switch_rows", lambda *shape: 4)
    codes, slow = packed()
    _, fast = packed(fast=True)
    if not fast.kernel:
        pytest.skip("torch has no int4 product here")
    assert torch.equal(fast.codes.codes, codes.codes) and torch.equal(fast.codes.zero, codes.zero)
    assert torch.equal(fast.weight, slow.weight) and fast.bytes_held < 0.6 * 128 * 256
    for rows in (1, 4, 9):  # by the product, by the product, dequantised
        x = torch.randn(rows, 256)
        assert (fast(x) - slow(x)).norm() <= 0.01 * slow(x).norm()
    assert torch.equal(fast(x), slow(x))


# --------------------------------------------------------------------------------- a model's layers
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_layers_alone_give_what_the_model_gives(family):
    """Windows of every kind of layer, features added between layers."""
    model = build(family)
    host, (sample,) = host_of(model), samples(1, family)
    (walk,) = passage.passages(host, [sample])
    for i, layer in enumerate(host.layers):
        walk.advance(walk.through(layer, i))
    want = model.base_model(**sample.inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(host.text.norm(walk.hidden), want)


def test_statistics_are_those_of_all_samples():
    x = torch.randn(2, 7, 5)
    found = passage.Statistics({"squares", "hessian", "tokens"}, 2)
    for sample in x:
        found.add(sample[None])
    out = found.found("here")
    torch.testing.assert_close(out["squares"], pruning.scaler_row(x))
    torch.testing.assert_close(out[HESSIAN], pruning.hessian(x))
    assert torch.equal(out["tokens"], x.flatten(0, 1))


def test_awq_without_rounding_changes_nothing():
    """Scales move from norms into weights: at eight bits a row, logits stay."""
    model, (sample,) = build("gemma3"), samples(1, "gemma3")
    plain = model(**sample.inputs).logits
    found = compress_weights(model, part("awq:bits=8,group=-1,n_grid=4,clip=false"), [sample])
    with found:
        assert (model(**sample.inputs).logits - plain).norm() < 0.05 * plain.norm()


def test_compress_combines_weights_tokens_and_cache(tmp_path):
    model, given = build("llava"), samples()
    inputs, before = given[0].inputs, dict(model.named_parameters())

    def answer():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()

    plain = answer()
    with compress(
        model, "gptq:group=16 + visionzip@0.5 + snapkv@0.5", calibration=given
    ) as session:
        want = answer()
    assert (
        want != plain and session.weights.account.bytes < 0.3 * session.weights.account.bytes_before
    )
    assert session.audit[0].visual_per_layer[0] < session.audit[0].visual_tokens
    save_weights(session.weights, tmp_path / "w.safetensors")
    text = "gptq:group=16 + visionzip@0.5 + snapkv@0.5"
    with compress(model, text, calibration=tmp_path / "w.safetensors") as again:
        assert answer() == want and again.weights.account == session.weights.account
    with pytest.raises(WeightsError, match="and rtn is asked for"):
        compress(model, "rtn", calibration=tmp_path / "w.safetensors")
    other = copy.deepcopy(model)
    other.get_decoder().layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(WeightsError, match="fingerprint"):
        compress(other, text, calibration=tmp_path / "w.safetensors")
    assert all(p is before[n] for n, p in model.named_parameters()) and answer() == plain


def test_a_setting_and_the_models_weights_must_agree():
    model, setting = build("llava"), parse_setting("rtn:group=16")
    with pytest.raises(UnsupportedCall, match="are the original ones"), Session(model, setting):
        pass
    with pytest.raises(UnsupportedCall, match="the original ones"):
        list(Plan(model, [setting]).run(samples(1)[0].inputs, 1, []))
    with compress_weights(model, part("rtn:group=16")):
        with pytest.raises(UnsupportedCall, match="asks for the original weights"):
            list(Plan(model, [parse_setting("none")]).run(samples(1)[0].inputs, 1, []))
        with pytest.raises(RuntimeError, match="leave that block"):
            compress_weights(model, part("rtn:group=16"))


def test_a_run_takes_weights_by_weights(tmp_path):
    settings = ["magnitude@0.5", "snapkv@0.5", "magnitude@0.5 + snapkv@0.5", "rtn:group=32"]
    given = {
        "models": [{"name": "zoo:mini-qwen2-vl"}],
        "tasks": [{"name": "scene_qa", "documents": 2}],
    }
    experiment = build_experiment({"name": "w", "settings": settings, **given}, "test")
    assert run(experiment, tmp_path).recorded == 10 and run(experiment, tmp_path).found == 10
    cost = {r.setting: r.cost for r in read_run(tmp_path / "w")}
    assert "weights" not in cost["snapkv@0.5"] and not any(
        r.failed for r in read_run(tmp_path / "w")
    )
    held = cost["rtn:group=32"]["weights"]
    saved = held["bytes_before"] - held["bytes"]
    read = "decode_bytes_per_token"
    assert cost["none"][read] - cost["rtn:group=32"][read] == saved > 0
    half = cost["magnitude@0.5 + snapkv@0.5"]
    assert half["weights"]["nonzero"] * 2 == half["weights"]["weights"]
    assert half[read] == cost["snapkv@0.5"][read], "zeros in dense tensors are read all the same"


# --------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("wanda", BudgetError, "wanda@0.5 or wanda:pattern=2of4"),
        ("wanda@0.5:pattern=2of4", BudgetError, "says twice"),
        ("wanda:pattern=4of2", ValueError, "such as 2of4"),
        ("wanda@64", BudgetError, "unit is weights"),
        ("awq@0.5", BudgetError, "takes no budget"),
        ("wanda@0.5 + rtn", SettingError, "one such method"),
        ("rtn:bits=9", ValueError, "2 to 8"),
        ("gptq:static_groups=false", ValueError, "actorder=false"),
    ],
)
def test_settings_that_cannot_be(text, error, says):
    with pytest.raises(error, match=says):
        parse_setting(text)


def broken(change):
    """A copy of the tiny model with something wrong."""
    model = copy.deepcopy(build("llava"))
    change(model)
    return model


@pytest.mark.parametrize(
    ("text", "change", "given", "says"),
    [
        ("wanda:pattern=3of5", None, 1, "32 inputs, which wanda:pattern=3of5"),
        ("rtn", None, 1, "group=128 does not divide: write for example rtn:group=32"),
        ("wanda@0.5", None, 0, "give calibration samples"),
        ("wanda@0.5", None, [Sample({})], "sample 0 cannot be run"),
        ("ecoflap@0.5", None, [Sample(prompt("llava", 1))], "no answer"),
        (
            "rtn:group=16",
            lambda m: layer(m).weight.fill_(float("nan")),
            1,
            "layer 1 mlp.up_proj holds NaN",
        ),
        ("rtn:group=16", lambda m: tie(m), 1, "shares its weight with layer 1 mlp.gate_proj"),
        (
            "rtn:group=16",
            lambda m: setattr(m.config, "quantization_config", {}),
            1,
            "quantized already",
        ),
    ],
)
def test_bad_input_is_one_message_and_leaves_the_model_alone(text, change, given, says):
    model = build("llava") if change is None else broken(change)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    modules = list(model.modules())
    with pytest.raises(WeightsError, match=says):
        compress(model, text, calibration=samples(given) if isinstance(given, int) else given)
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p.nan_to_num(), before[name][1].nan_to_num())
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def layer(model):
    return model.get_decoder().layers[1].mlp.up_proj


def tie(model):
    layer(model).weight = model.get_decoder().layers[1].mlp.gate_proj.weight


def test_too_little_memory_half_way_leaves_the_model_alone(monkeypatch):
    model, calls = build("llava"), []
    before = dict(model.named_parameters())

    def full(*arguments, **fields):
        calls.append(1)
        if len(calls) > 9:
            raise torch.OutOfMemoryError("no room")
        return rtn(*arguments, **fields)

    monkeypatch.setattr("effivlm.methods.weights.rtn.rtn", full)
    with pytest.raises(WeightsError, match="too little memory"):
        compress_weights(model, part("rtn:group=16"))
    assert all(p is before[n] for n, p in model.named_parameters())


def test_a_broken_promise_is_an_error():
    linear = torch.nn.Linear(8, 4, bias=False)
    for promise in (Promise(nonzero=16), Promise(row=4), Promise(pattern=(2, 4)), Promise(bits=4)):
        with pytest.raises(AuditError):
            check_weight("layer 0 q_proj", linear, NewWeight(), promise)
    codes = Codes(
        torch.full((4, 8), 9, dtype=torch.uint8),
        torch.ones(4, 1),
        torch.zeros(4, 1, dtype=torch.uint8),
        8,
        4,
    )
    with pytest.raises(AuditError, match="promises 3 bits"):
        check_weight("x", QuantLinear(codes, None, torch.float32), NewWeight(), Promise(bits=3))


def test_a_method_of_no_stage_is_refused():
    class Nowhere(Method):
        name, paper, budget = "nowhere", Paper("(baseline)", "", ""), "none"

    with pytest.raises(Unsupported, match="acts at no stage"):
        Session(build("llava"), Setting((Part(Nowhere(), None),)))


def test_ecoflap_prunes_more_where_noise_costs_less():
    scores = {(0, "a"): 3.0, (0, "b"): 1.0, (1, "a"): 0.5, (1, "b"): 0.5}
    sizes = dict.fromkeys(scores, 100)
    shares = EcoFLAP().shares(scores, sizes, part("ecoflap@0.5").budget)
    assert shares[0, "a"] == shares[0, "b"] < shares[1, "a"] == shares[1, "b"]
    assert sum(shares.values()) / 4 == pytest.approx(0.5)
