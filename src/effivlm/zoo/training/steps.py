"""The losses of the three stages, and the loop that runs any of them: by the clock, resumable."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.zoo.training.labels import IDS, Batch, Batches
from effivlm.zoo.words import NOTHING, token_of

SPREAD = 0.1  # standard deviation of word embeddings
NOISE = 0.03  # of the labels in `language`, so that an imperfect encoder can take their place
FORGET = 0.03  # share of labels that show nothing in `language`
Loss = Callable[[Any, Batch], tuple[Tensor, dict[str, float]]]


def start(model: Any) -> None:
    """Random word embeddings, the same for every model, fixed for the first two stages."""
    words = model.get_input_embeddings().weight
    values = torch.randn(words.shape, generator=torch.Generator().manual_seed(0)) * SPREAD
    words.data.copy_(values.to(words.device))
    newline = getattr(model.base_model, "image_newline", None)
    if newline is not None:
        newline.data.copy_(words.data[IDS[token_of(NOTHING)]])


def shown(model: Any, words: Tensor) -> Tensor:
    """[..., D]: sums of word embeddings, words [..., WORDS]."""
    return (model.get_input_embeddings()(words) * (words > 0)[..., None]).sum(-2)


def features(model: Any, batch: Batch) -> Tensor:
    """[B, n, D] of the encoder and projector, in placeholder order."""
    assert batch.call is not None, "a batch without pixels"
    out = model.base_model.get_image_features(**batch.call, return_dict=True).pooler_output
    out = torch.cat(list(out)) if isinstance(out, list | tuple) else out
    return out.reshape(len(batch.ids), -1, out.shape[-1])


def answers(model: Any, batch: Batch, visual: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, and the share of answers that are right token by token, by kind
    of question.
    """
    mark = batch.ids == model.config.image_token_id
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = embeds.masked_scatter(mark[..., None], visual.to(embeds.dtype))
    position = batch.position if len(batch.position) > 1 else batch.position[0]
    mask = torch.zeros(batch.mask.shape, device=embeds.device, dtype=embeds.dtype).masked_fill(
        ~batch.mask, torch.finfo(embeds.dtype).min
    )
    hidden = model.get_decoder()(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    learnt = batch.labels[:, 1:] >= 0
    logits, wanted = model.lm_head(hidden[:, :-1][learnt]), batch.labels[:, 1:][learnt]
    loss = nn.functional.cross_entropy(logits.float(), wanted)
    return loss, _right(batch, learnt, logits.argmax(-1) == wanted)


def _right(batch: Batch, learnt: Tensor, hit: Tensor) -> dict[str, float]:
    wrong = torch.zeros_like(learnt)
    wrong[learnt] = ~hit
    marks: dict[str, list[float]] = defaultdict(list)
    for b, kinds in enumerate(batch.kinds):
        for number, kind in enumerate(kinds, start=1):
            name = kind.rstrip("0123456789")
            marks[name].append(float(not bool((wrong[b] & (batch.segment[b, 1:] == number)).any())))
    return {k: sum(v) / len(v) for k, v in marks.items()}


def seeing(model: Any, batch: Batch, found: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How far encoder features are from the labels: squared distance and cross-entropy of the
    words.
    """
    with torch.no_grad():
        target, table = shown(model, batch.words), model.get_input_embeddings().weight
    something = batch.words[..., 0] != IDS[token_of(NOTHING)]
    weight = torch.where(something, 1.0, 0.15)
    distance = (found - target).square().mean(-1) / SPREAD**2
    logits = found @ table.T.detach() * 8
    wanted = torch.zeros_like(logits).scatter_(-1, batch.words, 1.0)
    wanted[..., 0] = 0
    entropy = -(wanted * logits.log_softmax(-1)).sum(-1) / wanted.sum(-1)
    loss = ((distance + entropy) * weight).sum() / weight.sum()
    best = logits.argmax(-1)
    first = (wanted.gather(-1, best[..., None])[..., 0] > 0)[something]
    spelled = logits.gather(-1, batch.words).masked_fill(batch.words == 0, math.inf).amin(-1)
    worst = logits.masked_fill(wanted > 0, -math.inf).amax(-1)
    return loss, {
        "a word": first.float().mean().item(),
        "all words": (spelled > worst)[something].float().mean().item(),
    }


def language_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Answers from labels, with noise."""
    words = batch.words
    if model.training:
        gone = torch.rand(words.shape[:2], device=words.device) < FORGET
        nothing = torch.zeros_like(words[0, 0])
        nothing[0] = IDS[token_of(NOTHING)]
        words = torch.where(gone[..., None], nothing, words)
    visual = shown(model, words)
    return answers(model, batch, visual + NOISE * torch.randn_like(visual) * model.training)


def vision_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Features against labels; the language model does not run."""
    return seeing(model, batch, features(model, batch))


def joint_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Answers from features, and features against labels."""
    found = features(model, batch)
    loss, right = answers(model, batch, found)
    extra, words = seeing(model, batch, found)
    return loss + 0.5 * extra, right | words


@dataclass(frozen=True)
class Course:
    """How long and how fast a stage is trained, and where it is kept.

    Attributes:
        minutes: by the clock, over all runs that resume. lr: after the warm-up. state: weights,
            optimiser, time spent.
        workers: processes that render. fixed_words: whether word embeddings stay as they are.
    """

    minutes: float
    lr: float
    state: Path
    device: str
    workers: int
    fixed_words: bool


def train(
    model: Any,
    loss: Loss,
    batches: Batches,
    check: Batches,
    course: Course,
    log: Callable[[str], None],
) -> None:
    """Train by the clock: warm-up, then half a cosine; goes on from ``course.state``."""
    model.to(course.device).train().requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(not course.fixed_words)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=course.lr, weight_decay=0.01, betas=(0.9, 0.98))
    spent, step = 0.0, 0
    if course.state.exists():
        kept = torch.load(course.state, map_location=course.device)
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        spent, step = kept["spent"], kept["step"]
        batches.start += step * batches.batch
    tests: Iterator[Batch] = iter(check)
    began = saved = time.monotonic()
    before = spent
    for batch in torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=course.workers, prefetch_factor=4
    ):
        spent = before + (time.monotonic() - began) / 60
        if spent >= course.minutes:
            break
        for group in optimiser.param_groups:
            group["lr"] = course.lr * min(1, (step + 1) / 100) * _decay(spent / course.minutes)
        value, _ = loss(model, batch.to(course.device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 200 == 0:
            test = _checked(model, loss, tests, course.device)
            log(f"minute {spent:.1f} step {step} loss {value.item():.3f} test {test}")
        if time.monotonic() - saved > 120:
            _keep(model, optimiser, spent, step, course.state)
            saved = time.monotonic()
        step += 1
    log(f"end: step {step} test {_checked(model, loss, tests, course.device, 6)}")
    _keep(model, optimiser, course.minutes, step, course.state)
    model.requires_grad_(True)


def _decay(done: float) -> float:
    """From 1 to 0.03 along half a cosine."""
    return 0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * done))


def _keep(model: Any, optimiser: Any, spent: float, step: int, state: Path) -> None:
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "spent": spent,
            "step": step,
        },
        state,
    )


@torch.no_grad()
def _checked(model: Any, loss: Loss, tests: Iterator[Batch], device: str, batches: int = 2) -> str:
    model.eval()
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(batches):
        for kind, value in loss(model, next(tests).to(device))[1].items():
            seen[kind].append(value)
    model.train()
    return " ".join(f"{k} {sum(v) / len(v):.2f}" for k, v in sorted(seen.items()))
