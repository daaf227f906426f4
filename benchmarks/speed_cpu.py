"""Speed of a 0.5B shape with random weights on a CPU: one small image, a few rounds; read the ratios.

    python benchmarks/speed_cpu.py OUT [rounds]

The published image size gives 3,699 visual tokens; here it is one 384-pixel image (1,485 tokens), so that a round takes
about a minute on one core.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from effivlm.config import Experiment, MeasureSpec, ModelSpec, dump_experiment
from effivlm.experiment import load_model
from effivlm.measure import workloads
from effivlm.measure.peaks import measured
from effivlm.measure.run import Case, Measured, measure_case
from effivlm.provenance import environment
from effivlm.report.speed import write_speed
from effivlm.setting import parse_setting
from effivlm.store import RunStore

SETTINGS = ("random_pre@1/9", "visionzip@1/9", "divprune@1/9", "fastv@1/9", "snapkv@1/9")


def main(out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    model = ModelSpec(name="llava-onevision-0.5b", dtype="bfloat16", random_weights=True)
    spec = MeasureSpec(workload="uniprunebench", repeats=rounds, warmup=0, seconds=10_000)
    experiment = Experiment(name=out.name, models=(model,), settings=("none", *SETTINGS), measure=spec)
    loaded = load_model(model)
    work = replace(workloads.workload(spec.workload), name="uniprunebench-384px")
    made = workloads.prompts(work, loaded.family, loaded.model.config, 1, {"sizes": [(384, 384)]})
    inputs = workloads.on_device(made, loaded)
    case = Case(work.name, [lambda: inputs], work.new_tokens)
    result = Measured()
    with RunStore(out, dump_experiment(experiment), experiment.model_dump(mode="json")) as store:
        store.note_environment(environment("cpu", "none"))
        peaks = measured(loaded.model.device, loaded.model.dtype)
        settings = [parse_setting(s) for s in experiment.settings]
        measure_case(store, loaded, settings, case, spec, peaks, lambda *step: print(*step, flush=True), result)
    print(result)
    for path in write_speed(out):
        print(path.read_text())
    (out / "lock").unlink()


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
