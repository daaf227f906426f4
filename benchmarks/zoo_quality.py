"""What the zoo's models answer, with their pictures and without: `python benchmarks/zoo_quality.py
[MODEL ...]`.

For every task of the suite: the score of the uncompressed model on all 200 documents, its score
when every picture is blank, and the best that can be said without looking, chosen with hindsight
for each kind of question (its first two words): one answer, or the word at one place of the
question. A model that looks must fall to about that when its pictures are blank. Prints the table
of docs/zoo.md.
"""

import argparse
from collections import Counter
from dataclasses import replace

import torch
from PIL import Image

from effivlm import zoo
from effivlm.config import ModelSpec
from effivlm.families.loading import Loaded
from effivlm.prompts import load_model, prepare, stop_ids
from effivlm.runtime.plan import Plan
from effivlm.scores import Answered
from effivlm.setting import parse_setting
from effivlm.tasks.base import Document, Question, Task
from effivlm.tasks.loading import load_tasks


def blank(document: Document) -> Document:
    """The same question about empty pictures."""

    def opened() -> Question:
        question = document.open()
        empty = tuple(Image.new("RGB", i.size, (255, 255, 255)) for i in question.images)
        return replace(question, images=empty)

    return replace(document, open=opened)


def score(answers: list[str], task: Task, documents: list[Document]) -> float:
    """The task's score of some answers, in percent."""
    given = [Answered(d.id, a, d.answers) for a, d in zip(answers, documents, strict=True)]
    return 100 * task.scorer.score(given).total[task.scorer.metrics[0].name]


def answered(loaded: Loaded, plan: Plan, task: Task, documents: list[Document]) -> list[str]:
    out = []
    for document in documents:
        inputs = prepare(loaded, document.open())
        (outcome,) = plan.run(inputs, task.max_new_tokens, stop_ids(loaded))
        if outcome.error is not None or outcome.generated is None:
            raise RuntimeError(f"{task.name} {document.id} failed") from outcome.error
        out.append(
            loaded.processor.tokenizer.decode(
                outcome.generated.tokens, skip_special_tokens=True
            ).strip()
        )
    return out


def unseen(documents: list[Document]) -> list[str]:
    """The best that can be said without looking: for each kind of question one answer, or the word
    at one place of it.
    """
    kinds: dict[str, list[Document]] = {}
    texts = {d.id: d.open().text for d in documents}
    for d in documents:
        kinds.setdefault(" ".join(texts[d.id].split()[:2]), []).append(d)
    said = {}
    for mine in kinds.values():
        usual = Counter(d.answers[0] for d in mine).most_common(1)[0][0]
        guesses = [
            [usual] * len(mine),
            *([(texts[d.id].split()[-n:] or [""])[0] for d in mine] for n in range(1, 5)),
        ]
        best = max(
            guesses, key=lambda g: sum(a == d.answers[0] for a, d in zip(g, mine, strict=True))
        )
        said |= {d.id: a for d, a in zip(mine, best, strict=True)}
    return [said[d.id] for d in documents]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=zoo.names())
    parser.add_argument("--documents", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = load_tasks("mini")
    print("| model | what is shown | " + " | ".join(t.name for t in tasks) + " |")
    print("|---|---|" + "---|" * len(tasks))
    asked = {t.name: list(t.documents[: args.documents]) for t in tasks}
    print(
        "| - | best without looking | "
        + " | ".join(f"{score(unseen(asked[t.name]), t, asked[t.name]):.1f}" for t in tasks)
        + " |"
    )
    for name in args.models:
        loaded = load_model(ModelSpec(name=f"zoo:{name}"))
        plan = Plan(loaded.model, (parse_setting("none"),), 1)
        for what, change in (("pictures", lambda d: d), ("blank pictures", blank)):
            row = []
            for t in tasks:
                documents = [change(d) for d in asked[t.name]]
                row.append(score(answered(loaded, plan, t, documents), t, documents))
            print(f"| {name} | {what} | " + " | ".join(f"{s:.1f}" for s in row) + " |", flush=True)


if __name__ == "__main__":
    main()
