"""Outputs of the official codes, stored as numbers, against `ops`: choices exactly, floats to 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from effivlm.ops import awq, pruning
from effivlm.ops.gptq import gptq
from effivlm.ops.grid import Grid, rtn

torch.set_num_threads(1)
ROOT = Path(__file__).parent / "golden"


def cases(method, *starts):
    found = [p for p in sorted((ROOT / method).glob("*.safetensors")) if p.stem.startswith(starts)]
    assert found, f"no golden file of {method}"
    return [pytest.param(p, id=p.stem) for p in found]


def load(path):
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["params"])


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("path", cases("wanda", ""))
def test_wanda(path):
    g, p = load(path)
    row = pruning.scaler_row(g["x"])
    close(row, g["scaler_row"])
    for name in p["outs"]:
        mask = pruning.wanda_mask(
            g[f"w_{name}"], row, p["sparsity_ratio"], p["prune_n"], p["prune_m"], p["use_variant"]
        )
        assert torch.equal(mask, g[f"mask_{name}"].bool())


@pytest.mark.parametrize("path", cases("sparsegpt", ""))
def test_sparsegpt(path):
    g, p = load(path)
    h = pruning.hessian(g["x"])
    close(h, g["H"])
    quantizer = Grid(p["quant_bits"]) if p["quant_bits"] else None
    swept = pruning.sparsegpt(
        g["w"],
        pruning.inverse_factor(h, p["percdamp"]),
        p["sparsity"],
        p["prune_n"],
        p["prune_m"],
        p["blocksize"],
        quantizer,
    )
    assert torch.equal(swept.weight == 0, g["pruned"].bool())
    close(swept.weight, g["w_out"])
    close(swept.loss, g["loss"], 1e-3)


@pytest.mark.parametrize("path", cases("gptq", ""))
def test_gptq(path):
    g, p = load(path)
    if "x" in g:
        close(pruning.hessian(g["x"]), g["H"])
    grid = Grid(p["bits"], p["groupsize"], p["sym"], mse=p["mse"])
    found = gptq(
        g["w"], g["H"], grid, p["actorder"], p["static_groups"], p["blocksize"], p["percdamp"]
    )
    assert torch.equal(found.codes, g["codes"])
    close(found.scale, g["scale"])
    assert torch.equal(found.zero.float(), g["zero"])
    close(found.dequantized(), g["w_q"])
    index = torch.arange(p["C"]) // found.group if found.index is None else found.index
    assert torch.equal(index, g["group_of_column"].long())


@pytest.mark.parametrize("path", cases("awq", "llmawq", "autoawq", "edge"))
def test_awq_scales(path):
    g, p = load(path)
    if "clip" in path.stem:
        pytest.skip("tested below")
    grid = Grid(
        p.get("n_bit", p.get("w_bit")), p.get("q_group_size", p.get("group_size")), span="free"
    )
    weights = [g[f"w{i}"] for i in range(len(p["outs"]))]
    mean = awq.x_mean(g["x"])
    close(mean, g.get("x_mean", g.get("x_mean_abs")))
    duo = awq.w_mean(weights, grid.group) if p.get("duo_scaling") else None
    if duo is not None:
        close(duo, g["w_mean"])
    found = awq.scale_search(
        weights, awq.candidates(mean, duo, p["n_grid"]), grid, awq.output_loss(g["x"], weights)
    )
    close(torch.tensor(found.losses), g["history"], 1e-3)
    assert found.index == int(g["best_index"])
    close(found.scale, g["best_scale"])
    for i, w in enumerate(weights):
        if f"wq{i}" in g:
            codes = rtn(w * found.scale, grid)
            close(codes.dequantized() / found.scale, g[f"wq{i}"])
            close(codes.scale, g[f"qscale{i}"])
            assert torch.equal(codes.zero.float(), g[f"qzero{i}"])
