"""Speed on a CPU, one thread: the built-in checkpoint on its own tasks, and a 0.5B shape with
random weights. Read the ratios.

    python benchmarks/speed_cpu.py OUT [rounds]      writes OUT/zoo and OUT/llava-onevision-0.5b

The 0.5B shape's published image size gives 3,699 visual tokens; here it is one 384-pixel image
(1,485 tokens), so that a round takes about a minute on one core.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from effivlm.config import Experiment, MeasureSpec, ModelSpec, TaskSpec, dump_experiment
from effivlm.measure import workloads
from effivlm.measure.peaks import measured
from effivlm.measure.run import Case, Measured, measure, measure_case
from effivlm.prompts import load_model
from effivlm.provenance import environment
from effivlm.report.speed import write_speed
from effivlm.setting import parse_setting
from effivlm.store import RunStore

SETTINGS = ("random_pre@1/9", "visionzip@1/9", "divprune@1/9", "fastv@1/9", "snapkv@1/9")
ZOO = (
    "visionzip@0.1",
    "divprune@0.1",
    "tome@0.4",
    "downsample@0.4",
    "fastv@0.1",
    "pyramiddrop@0.4",
    "h2o@0.1",
    "snapkv@0.1",
    "pyramidkv@0.1",
    "divprune@0.4 + snapkv@0.4",
)


def zoo(out: Path) -> None:
    """The built-in checkpoint: 40 new tokens (caption) and short answers (count)."""
    tasks = tuple(TaskSpec(name=t, documents=5) for t in ("caption", "count"))
    spec = MeasureSpec(workload="tasks", repeats=20, warmup=2, seconds=10_000)
    experiment = Experiment(
        name="zoo",
        models=(ModelSpec(name="zoo:mini-qwen2-vl"),),
        settings=ZOO,
        tasks=tasks,
        measure=spec,
    )
    print(measure(experiment, out))


def half_billion(out: Path, rounds: int) -> None:
    """A 0.5B shape, MME-like: one image, short answer."""
    model = ModelSpec(name="llava-onevision-0.5b", dtype="bfloat16", random_weights=True)
    spec = MeasureSpec(workload="uniprunebench", repeats=rounds, warmup=0, seconds=10_000)
    experiment = Experiment(
        name="llava-onevision-0.5b", models=(model,), settings=SETTINGS, measure=spec
    )
    loaded = load_model(model)
    work = replace(workloads.workload(spec.workload), name="uniprunebench-384px")
    made = workloads.prompts(work, loaded.family, loaded.model.config, 1, {"sizes": [(384, 384)]})
    inputs = workloads.on_device(made, loaded)
    case = Case(work.name, [lambda: inputs], work.new_tokens)
    result = Measured()
    with RunStore(
        out / experiment.name, dump_experiment(experiment), experiment.model_dump(mode="json")
    ) as store:
        store.note_environment(environment("cpu", "none"))
        peaks = measured(loaded.model.device, loaded.model.dtype)
        settings = [parse_setting(s) for s in experiment.settings]
        measure_case(
            store,
            loaded,
            settings,
            case,
            spec,
            peaks,
            lambda *step: print(*step, flush=True),
            result,
        )
    print(result)


def main(out: Path, rounds: int) -> None:
    """Both, one after the other."""
    torch.set_num_threads(1)
    for name, work in (
        ("zoo", lambda: zoo(out)),
        ("llava-onevision-0.5b", lambda: half_billion(out, rounds)),
    ):
        shutil.rmtree(out / name, ignore_errors=True)
        work()
        print(write_speed(out / name)[0].read_text(), flush=True)
        (out / name / "lock").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
