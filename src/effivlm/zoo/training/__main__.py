"""Train one stage of one model: ``python -m effivlm.zoo.training STAGE MODEL OUT --minutes M``; run
again, it goes on.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from effivlm.zoo.build import CONFIGS, make_model, save
from effivlm.zoo.training.labels import Batches
from effivlm.zoo.training.steps import Course, joint_loss, language_loss, start, train, vision_loss

TRAIN_SEED = 10**12  # test pictures come from seeds below
LOSSES = {"language": language_loss, "vision": vision_loss, "joint": joint_loss}
RATES = {"language": 3e-3, "vision": 3e-3, "joint": 1e-3}


def main() -> None:
    """Command line."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    _train(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=LOSSES)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument(
        "out", type=Path, help="working folder; `joint` writes OUT/MODEL, a transformers checkpoint"
    )
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument(
        "--language-from",
        choices=CONFIGS,
        help="start from the language model of another one of the zoo",
    )
    return parser.parse_args()


def _train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    model = make_model(args.model)
    start(model)
    if args.language_from:
        take(model, args.out / f"{args.language_from}.language.pt", language=True)
    if args.stage == "joint":
        for stage in ("language", "vision"):
            take(model, args.out / f"{args.model}.{stage}.pt", language=stage == "language")
    pixels = args.stage != "language"
    data = Batches(
        args.model,
        args.batch,
        TRAIN_SEED + 10**11 * list(LOSSES).index(args.stage),
        pixels,
        questions=args.stage != "vision",
    )
    check = Batches(args.model, args.batch, 5 * 10**8, pixels, test=True, questions=data.questions)
    state = args.out / f"{args.model}.{args.stage}.pt"
    course = Course(
        args.minutes,
        args.lr or RATES[args.stage],
        state,
        args.device,
        args.workers,
        args.stage != "joint",
    )
    train(model, LOSSES[args.stage], data, check, course, lambda line: print(line, flush=True))
    if args.stage == "joint":
        save(model.cpu(), args.model, args.out / args.model)


def take(model: Any, state: Path, language: bool) -> None:
    """Weights of the language model, or of everything else, from a stage that is done."""
    kept = torch.load(state, map_location="cpu")["model"]
    mine = {
        k: v
        for k, v in kept.items()
        if ("language_model" in k or k.startswith("lm_head")) == language
    }
    missing = set(model.state_dict()) & set(mine) ^ set(mine)
    if missing:
        raise KeyError(
            f"{state} holds weights that {type(model).__name__} has not: {sorted(missing)[:3]}"
        )
    model.load_state_dict(mine, strict=False)


if __name__ == "__main__":
    main()
