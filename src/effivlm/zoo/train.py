"""Trains the zoo's model from scratch on scenes it renders; resumable, never part of tests or the demo.

Two stages: the vision encoder on per-patch labels that the renderer knows (one-word answers alone teach it almost
nothing), then everything on several questions per image in one sequence, with the loss on the answers and, so that
visual tokens speak the vocabulary, on naming every patch's content from its projected feature.

    python -m effivlm.zoo.train OUT --minutes 60
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effivlm.zoo.build import PATCH, make_model, make_tokenizer, save
from effivlm.zoo.render import COLOURS, LETTERS, SHAPES, SIZE, Scene, draw, make_scene, questions

GRID = SIZE // PATCH
KINDS = ["", *SHAPES, *LETTERS, *"0123456789"]
TRAIN_SEED = 1_000_000_000  # the test documents use seeds below this


def pixels(scene: Scene) -> Tensor:
    """[3, SIZE, SIZE] as the processor normalises them."""
    return torch.from_numpy(np.array(draw(scene), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def patch_labels(scene: Scene) -> tuple[Tensor, Tensor]:
    """[GRID * GRID] long: what kind of item covers most of each patch, and its colour (0: nothing)."""
    best, kinds, colours = np.zeros((GRID, GRID)), np.zeros((GRID, GRID), int), np.zeros((GRID, GRID), int)
    names = list(COLOURS)
    for item in (*scene.shapes, *scene.characters):
        x0, y0, x1, y1 = item.box
        for r in range(max(0, y0 // PATCH), min(GRID, math.ceil(y1 / PATCH))):
            for c in range(max(0, x0 // PATCH), min(GRID, math.ceil(x1 / PATCH))):
                w = min(x1, (c + 1) * PATCH) - max(x0, c * PATCH)
                h = min(y1, (r + 1) * PATCH) - max(y0, r * PATCH)
                if w * h > max(best[r, c], 0.12 * PATCH * PATCH):
                    best[r, c], kinds[r, c] = w * h, KINDS.index(item.kind)
                    colours[r, c] = names.index(item.colour) + 1 if item.colour in names else 0
    return torch.from_numpy(kinds.ravel()), torch.from_numpy(colours.ravel())


def conversation(scene: Scene, rng: random.Random, tokenizer: Any, asked: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 where there is no loss) of one image with several questions."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids, labels = [tokenizer.bos_token_id], [-100]
    drawn = questions(scene, rng)
    order = rng.sample(sorted(drawn), len(drawn))
    weights = {"caption": 0.3}
    order = [t for t in order if rng.random() < weights.get(t, 1.0)][:asked] or ["exist"]
    for number, task in enumerate(order):
        question, answer = drawn[task]
        head = tokenizer("<user>" + (" " if number else ""), add_special_tokens=False).input_ids[:1]
        head += ([image] * (GRID * GRID) if not number else []) + tokenizer(" " + question + "<assistant>").input_ids
        tail = [*tokenizer(" " + answer).input_ids, tokenizer.eos_token_id]
        ids += head + tail
        labels += [-100] * len(head) + tail
    return ids, labels


class Scenes(torch.utils.data.IterableDataset[Any]):
    """Endless batches, rendered on the fly."""

    def __init__(self, start: int, batch: int, stage: int) -> None:
        self.start, self.batch, self.stage = start, batch, stage

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        seed = TRAIN_SEED + self.start + (info.id if info else 0) * 10_000_000
        tokenizer = make_tokenizer()
        while True:
            scenes = [make_scene(seed + i) for i in range(self.batch)]
            images = torch.stack([pixels(s) for s in scenes])
            kinds, colours = (torch.stack(x) for x in zip(*(patch_labels(s) for s in scenes), strict=True))
            if self.stage == 1:
                yield images, kinds, colours
            else:
                rows = [conversation(s, random.Random(seed + i), tokenizer, 8) for i, s in enumerate(scenes)]
                width = max(len(r[0]) for r in rows)
                ids = torch.tensor([r[0] + [0] * (width - len(r[0])) for r in rows])
                labels = torch.tensor([r[1] + [-100] * (width - len(r[1])) for r in rows])
                yield images, ids, labels, kinds, colours
            seed += self.batch


def train_encoder(model: Any, minutes: float, batch: int, start: int, log: Any) -> None:
    """Stage 1: kind and colour of every patch, from the features the projector will take."""
    tower, width = model.model.vision_tower, model.config.vision_config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, len(KINDS)), nn.Linear(width, len(COLOURS) + 1)])
    optimiser = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    began, step = time.time(), 0
    for images, kinds, colours in torch.utils.data.DataLoader(Scenes(start, batch, 1), batch_size=None, num_workers=1):
        done = (time.time() - began) / (60 * minutes)
        if done >= 1:
            return
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        features = tower(images).last_hidden_state[:, 1:]
        losses = [
            nn.functional.cross_entropy(h(features).flatten(0, 1), y.flatten())
            for h, y in zip(heads, (kinds, colours), strict=True)
        ]
        sum(losses).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            right = (heads[0](features).argmax(-1) == kinds)[kinds > 0].float().mean().item()
            log(f"stage 1 step {step} losses {losses[0].item():.3f} {losses[1].item():.3f} kind accuracy on items {right:.3f}")
        step += 1


def words_of(names: list[str], tokenizer: Any) -> Tensor:
    """[len(names)] long: the token of each name with a space before it; -100 for the empty name."""
    return torch.tensor([tokenizer(" " + n).input_ids[0] if n else -100 for n in names])


def naming_loss(features: Tensor, embeddings: Tensor, targets: list[Tensor]) -> Tensor:
    """Cross-entropy of naming patches: features [n, D] against the word embeddings, for each kind of name [n]."""
    logits = features @ embeddings.T
    return sum((nn.functional.cross_entropy(logits, t, ignore_index=-100) for t in targets), torch.zeros(()))


def train_naming(model: Any, minutes: float, batch: int, start: int, log: Any) -> None:
    """Between the stages: encoder, projector and word embeddings learn to name patches, without running the LLM."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tokenizer = make_tokenizer()
    kind_words, colour_words = words_of(KINDS, tokenizer), words_of(["", *COLOURS], tokenizer)
    began, step = time.time(), 0
    for images, kinds, colours in torch.utils.data.DataLoader(Scenes(start, batch, 1), batch_size=None, num_workers=1):
        if time.time() - began >= 60 * minutes:
            return
        features = model.model.get_image_features(pixel_values=images).pooler_output
        names = [kind_words[kinds.flatten()], colour_words[colours.flatten()]]
        loss = naming_loss(torch.cat(list(features)), model.get_input_embeddings().weight, names)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            log(f"naming step {step} loss {loss.item():.3f}")
        step += 1


def train_all(model: Any, minutes: float, batch: int, start: int, peak: float, log: Any, out: Path) -> None:
    """Stage 2: answers, everything trained; a checkpoint every five minutes."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    tokenizer = make_tokenizer()
    kind_words, colour_words = words_of(KINDS, tokenizer), words_of(["", *COLOURS], tokenizer)
    began, saved, step = time.time(), time.time(), 0
    for images, ids, labels, kinds, colours in torch.utils.data.DataLoader(
        Scenes(start, batch, 2), batch_size=None, num_workers=1
    ):
        done = (time.time() - began) / (60 * minutes)
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 100) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done)))
        done_by = model(input_ids=ids, pixel_values=images, attention_mask=(ids != 0).long())
        loss = nn.functional.cross_entropy(done_by.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        names = [kind_words[kinds.flatten()], colour_words[colours.flatten()]]
        naming = naming_loss(done_by.image_hidden_states.flatten(0, -2), model.get_input_embeddings().weight, names)
        (loss + 0.3 * naming).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            log(f"stage 2 step {step} loss {loss.item():.4f} naming {naming.item():.4f} minute {done * minutes:.1f}")
        if time.time() - saved > 300:
            torch.save(model.state_dict(), out / "state.pt")
            saved = time.time()
        step += 1
    torch.save(model.state_dict(), out / "state.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="working folder; the checkpoint is written to OUT/checkpoint")
    parser.add_argument("--encoder-minutes", type=float, default=10.0)
    parser.add_argument("--naming-minutes", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="first training scene; change it when resuming")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model, state = make_model(), args.out / "state.pt"
    if state.exists():
        model.load_state_dict(torch.load(state))
    else:
        train_encoder(model, args.encoder_minutes, 2 * args.batch, args.seed, print)
        torch.save(model.state_dict(), state)
    train_naming(model, args.naming_minutes, 2 * args.batch, args.seed + 250_000_000, print)
    train_all(model, args.minutes, args.batch, args.seed + 500_000_000, args.lr, print, args.out)
    save(model, args.out / "checkpoint")


if __name__ == "__main__":
    main()
