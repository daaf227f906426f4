"""The built-in suite and zoo: what is rendered, labelled, asked and trained on."""

import functools
import random

import pytest
import torch

from effivlm import zoo
from effivlm.families.loading import load
from effivlm.prompts import prepare
from effivlm.setting import parse_setting
from effivlm.tasks.loading import load_suite, load_task
from effivlm.zoo import charts, pages, pictures, scenes, suite
from effivlm.zoo.build import CONFIGS
from effivlm.zoo.training import labels, steps
from effivlm.zoo.words import make_tokenizer, spelled, token_of, vocabulary

MAKERS = (scenes.make_scene, pages.make_page, charts.make_chart)
TASKS = load_suite("mini").tasks


@functools.cache
def batch(name, seed=10**12, pixels=True, rows=4):
    return next(iter(labels.Batches(name, rows, seed, pixels)))


@pytest.mark.parametrize("task", TASKS)
def test_documents_are_the_same_every_time_and_answerable_in_the_vocabulary(task):
    one, two = suite.rows(task, 12), suite.rows(task, 12)
    tokenizer = make_tokenizer()
    for a, b in zip(one, two, strict=True):
        assert (a["id"], a["question"], a["answers"]) == (b["id"], b["question"], b["answers"])
        assert [x().tobytes() for x in a["images"]] == [x().tobytes() for x in b["images"]]
        text = f" {a['question']}{spelled(a['answers'][0])}</s>"
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len({r["id"] for r in one}) == 12


def test_every_task_says_what_it_stands_for():
    for name in TASKS:
        task = load_task(name)
        assert len(task.documents) == 200 and len(task.stands_for) > 20


def test_existence_is_balanced_and_captions_are_long():
    said = [r["answers"][0] for r in suite.rows("exist", 40)]
    assert said.count("yes") == said.count("no") == 20
    tokenizer = make_tokenizer()
    lengths = [
        len(tokenizer(spelled(r["answers"][0])).input_ids) for r in suite.rows("caption", 20)
    ]
    assert min(lengths) >= 29 and max(lengths) <= 80


def test_training_never_sees_what_test_pictures_are_made_of():
    def read(picture):
        if isinstance(picture, scenes.Scene):
            return {t.text for t in picture.texts} | {scenes._pairs(picture.items)}
        return (
            {f.value for f in picture.fields}
            if isinstance(picture, pages.Page)
            else {picture.names, str(picture.values)}
        )

    for make in MAKERS:
        train, test = (
            set().union(*(read(make(seed, t)) for seed in range(300))) for t in (False, True)
        )
        assert train and test and not train & test
        assert all(pictures.reserved(x) for x in test)


@pytest.mark.parametrize("make", MAKERS)
def test_marks_lie_where_something_is_drawn(make):
    for seed in range(20):
        picture = make(seed, False)
        image = picture.draw()
        for mark in picture.marks:
            shown = image.crop(tuple(int(v) for v in mark.box))
            assert shown.getextrema() != ((255, 255),) * 3, mark
            assert all(token_of(w) in vocabulary() for w in (*mark.words, *mark.placed))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_labels_follow_the_tokens_of_every_model(name):
    """A token's label is the colour of the pixels it was made of, wherever a square covers it."""
    reader, scene = labels.Reader(name), scenes.make_scene(5, False)
    item = scenes.Item("red", "square", (8, 88, 72, 152))  # bottom left
    scene = scenes.Scene(scene.size, (item,))
    (spot,) = reader.spots((scenes.make_scene(0, False),))
    words = labels.labels(scene, spot)
    red = {labels.IDS[" red"]} <= set(words.unique().tolist())
    assert red
    shown = (words == labels.IDS[" red"]).any(1)
    fine = spot.grid == 10
    for i in (shown & fine).nonzero()[:, 0].tolist():
        assert 5 <= spot.row[i] <= 9 and 0 <= spot.column[i] <= 4
    assert int((shown & fine).sum()) in range(16, 26)
    coarse = (spot.grid == 5) & shown
    assert all(spot.row[i] >= 2 and spot.column[i] <= 2 for i in coarse.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_labels_come_in_the_order_of_the_features(name):
    """Blackening the picture under one token changes that token's feature more than any far one, before blocks mix them."""
    reader = labels.Reader(name)
    scene = scenes.Scene(160, ())

    class Spotted:
        def draw(self):
            image = scene.draw()
            image.paste((0, 0, 0), (112, 48, 128, 64))  # row 3, column 7 of the fine grid
            return image

    (spot,) = reader.spots((scenes.make_scene(0, False),))
    from effivlm.runtime.host import vision_blocks

    for block in vision_blocks(reader.model):
        block.forward = lambda x, *a, **k: x
    with torch.no_grad():
        found = []
        for picture in (scene, Spotted()):
            call = reader.call([[picture]])
            out = reader.model.base_model.get_image_features(**call, return_dict=True).pooler_output
            out = torch.cat(list(out)) if isinstance(out, list | tuple) else out
            found.append(out.reshape(-1, out.shape[-1]))
    moved = (found[0] - found[1]).norm(dim=-1)
    fine = (spot.grid == 10).nonzero()[:, 0]
    best = fine[moved[fine].argmax()]
    assert (int(spot.row[best]), int(spot.column[best])) == (3, 7)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_question_in_a_training_row_is_answered_as_if_it_were_alone(name):
    """Several questions share a row; each must see the picture and itself only, at the positions it has in a prompt."""
    torch.manual_seed(0)
    reader = labels.Reader(name)
    model, processor = reader.model, reader.processor
    seed = next(
        s
        for s in range(10**12, 10**12 + 99)
        if (
            len(batch(name, s, rows=1).words[0])
            == len(reader.spots((scenes.make_scene(0, False),))[0].row)
        )
    )
    row = batch(name, seed, rows=1)
    picture = random.Random(seed)
    picture.random()
    made = picture.choice([scenes.make_scene] * 2 + [pages.make_page, charts.make_chart])(
        seed, False
    )
    assert len(row.kinds[0]) > 1
    with torch.no_grad():
        visual = steps.features(model, row)
        mark = row.ids == model.config.image_token_id
        embeds = model.get_input_embeddings()(row.ids).masked_scatter(mark[..., None], visual)
        position = row.position if len(row.position) > 1 else row.position[0]
        mask = torch.zeros(row.mask.shape).masked_fill(~row.mask, torch.finfo(torch.float32).min)
        hidden = model.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
        ).last_hidden_state
        asked = labels._asked((made,), random.Random(seed))
        for number, (_, question, answer) in enumerate(asked, start=1):
            text = processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": question}],
                    }
                ],
                add_generation_prompt=True,
                tokenize=False,
            )
            inputs = processor(
                text=text + spelled(answer) + "</s>", images=[made.draw()], return_tensors="pt"
            )
            alone = model.base_model(**inputs).last_hidden_state[0]
            inside = hidden[0, row.segment[0] == number]
            assert (
                inputs["input_ids"][0, -len(inside) :].tolist()
                == row.ids[0, row.segment[0] == number].tolist()
            )
            assert (alone[-len(inside) :] - inside).abs().max() < 1e-3


@pytest.mark.parametrize("loss", [steps.language_loss, steps.vision_loss, steps.joint_loss])
def test_losses_fall_when_answers_are_learnt(loss):
    torch.manual_seed(0)
    model = labels.Reader("mini-qwen2-vl").model.train()
    steps.start(model)
    data = batch("mini-qwen2-vl", rows=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(6):
        value, _ = loss(model, data)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("name", zoo.names())
def test_checkpoints_load_and_are_small(name):
    folder = zoo.checkpoint(name)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8 * 2**20
    loaded = load(folder, "float32")
    for task in ("scene_qa", "multi_image"):
        question = load_task(task).documents[0].open()
        inputs = prepare(loaded, question)
        assert int((inputs["input_ids"] == loaded.model.config.image_token_id).sum()) >= 25 * len(
            question.images
        )
        out = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert out[0, -1].item() == loaded.processor.tokenizer.eos_token_id, (
            "the stop token was not learnt"
        )


def test_the_default_experiment_runs_what_each_model_can():
    """Every setting of the default is supported by the model it is run on; what is left out is named in the file."""
    from effivlm.config import default_experiment, load_experiment
    from effivlm.runtime.support import Unsupported, check_supported

    experiment = load_experiment(default_experiment())
    assert len(experiment.models) == 2
    for spec in experiment.models:
        family = load(zoo.checkpoint(spec.name.removeprefix("zoo:"))).family
        for setting in experiment.settings_for(spec):
            check_supported(setting, family)
        for name in spec.without:
            with pytest.raises(Unsupported):
                check_supported(parse_setting(f"{name}@0.2"), family)
