"""Captured decoding on a GPU: a CUDA graph of one step in fixed slots, against plain eager decoding
and the byte floor.

    python gpu/captured_decode.py OUT [SHAPE ...]

7B shapes with random weights, 8k prompts, 100 new tokens, batch 1. For every setting: milliseconds
a token, eager and captured, taking turns; how often the captured time exceeds the floor; and at how
many of the tokens both agree (bfloat16 sums in another order may settle a near tie of random
weights differently; the CPU tests show equality in float64).
Target: captured at most 1.6 times the floor. Exit status 1 where it is missed. With no GPU it runs
the built-in checkpoint eagerly, as a smoke test.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from effivlm.config import ModelSpec
from effivlm.measure import workloads
from effivlm.measure.peaks import measured
from effivlm.measure.predict import Predictor
from effivlm.prompts import load_model
from effivlm.provenance import environment
from effivlm.runtime import generate
from effivlm.runtime.cache import fork
from effivlm.runtime.captured import FixedDecoder
from effivlm.runtime.session import Session
from effivlm.setting import Setting, parse_setting

SETTINGS, TARGET, TURNS = ("none", "snapkv@0.1", "visionzip@0.1", "adakv@0.1"), 1.6, 5


def seconds(work, cuda):
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    out = work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, out


def compare(loaded, text, inputs, steps, cuda, peaks, predictor):
    setting, model = parse_setting(text), loaded.model
    with Session(model, setting) as session:
        done = generate.prefill(session, inputs, generate.encode(session, inputs))
    decoder = FixedDecoder(model, [done], steps)
    eager, captured, tokens = [], [], ([], [])
    with torch.inference_mode(), decoder.attending():
        again = decoder.captured() if cuda else decoder.once

    def plain():
        with Session(model, Setting(())) as session:
            return generate.decode(session, [replace(done, cache=fork(done.cache))], steps, ())[
                0
            ].tokens

    def fixed():
        with torch.inference_mode(), decoder.attending():
            decoder.reset()
            for _ in range(steps - 1):
                again()
        return decoder.out[0].tolist()

    for turn in range(TURNS + 1):
        for work, times, place in ((plain, eager, 0), (fixed, captured, 1)):
            spent, found = seconds(work, cuda)
            tokens[place][:] = found
            times += [spent / (steps - 1)] if turn else []  # the first turn warms up
    floor = predictor.floors(done.accounts[0], setting, peaks)["decode_per_token"]
    e, c = statistics.median(eager), statistics.median(captured)
    return {
        "setting": text,
        "eager_ms": 1000 * e,
        "captured_ms": 1000 * c,
        "ratio": e / c,
        "floor_ms": 1000 * floor,
        "times_floor": c / floor,
        "agree": sum(a == b for a, b in zip(*tokens, strict=True)) / steps,
    }


def main(out, shapes):
    cuda, rows = torch.cuda.is_available(), []
    for shape in shapes if cuda else ["zoo:mini-qwen2-vl"]:
        device = "cuda" if cuda else "cpu"
        loaded = load_model(
            ModelSpec(
                name=shape,
                dtype="bfloat16" if cuda else "float32",
                device=device,
                random_weights=cuda,
            )
        )
        work = workloads.workload("effivlm-bench" if cuda else "uniprunebench")
        made = workloads.prompts(
            work, loaded.family, loaded.model.config, 1, workloads.image_sizes(shape)
        )
        inputs, peaks = (
            workloads.on_device(made, loaded),
            measured(loaded.model.device, loaded.model.dtype),
        )
        predictor = Predictor(
            loaded.model, loaded.family, inputs, work.new_tokens, loaded.model.dtype.itemsize
        )
        for text in SETTINGS:
            rows.append(
                {"shape": shape}
                | compare(loaded, text, inputs, work.new_tokens, cuda, peaks, predictor)
            )
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    facts = environment(str(loaded.model.device), "none")
    (out / "captured_decode.json").write_text(
        json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n"
    )
    return max(r["times_floor"] for r in rows) <= TARGET or not cuda


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1]), sys.argv[2:] or ["qwen2-vl-7b", "llava-1.5-7b"]))
