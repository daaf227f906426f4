"""The model's own budget: what real processors make of it, shared, refused, told in the account."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import generate

import effivlm
from effivlm import registry, zoo
from effivlm.budget import BudgetError, parse_budget
from effivlm.config import build_experiment
from effivlm.experiment import run
from effivlm.families.loading import load
from effivlm.native import processed
from effivlm.prompts import prepare, prepare_within
from effivlm.records import read_run
from effivlm.runtime.plan import Outcome
from effivlm.runtime.session import Session
from effivlm.runtime.support import Unsupported, check_supported
from effivlm.setting import SettingError, parse_setting
from effivlm.tasks.base import one_turn

torch.set_num_threads(1)
SIZES = [(160, 160), (240, 100), (90, 250), (17, 33)]


@pytest.fixture(scope="module")
def loaded():
    return {name: load(f"zoo:{name}", "float32") for name in zoo.names()}


def pictures(*sizes):
    g = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, 255, (h, w, 3), generator=g).byte().numpy() for w, h in sizes]
    return [Image.fromarray(x) for x in draw]


def count(model, inputs):
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def available(given, images):
    """Every number of visual tokens that the arguments give, by calling the processor with all of them."""
    call = {"text": text_of(given, images), "return_tensors": "pt"}
    out = set()
    for arguments in given.family.native(given.processor, images):
        mine = {"images": images, **arguments}
        mine["images"] = [list(mine["images"])]
        out.add(count(given.model, given.processor(**call, **mine)))
    return out


def text_of(given, images):
    messages = list(one_turn("what?", images).messages)
    return given.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("sizes", [*([s] for s in SIZES), SIZES[:2]], ids=str)
def test_it_is_the_nearest_from_below(loaded, name, sizes):
    """Against all that the processor can make; what cannot be made is refused with the fewest."""
    given, images = loaded[name], pictures(*sizes)
    question = one_turn("what?", images)
    whole, can = count(given.model, prepare(given, question)), available(given, images)
    assert max(can) == whole, "the first argument is what the defaults give"
    for share in ("0.1", "0.25", "0.5", "0.8"):
        (part,) = parse_setting(f"native@{share}").parts
        asked = part.budget.count(whole)
        if fitting := [n for n in can if n <= asked]:
            found = prepare_within(given, question, part)
            assert found.kept == count(given.model, found.inputs) == max(fitting)
            assert found.visual_tokens == whole
        else:
            with pytest.raises(BudgetError, match=f"the fewest .* {min(can)} "):
                prepare_within(given, question, part)


@pytest.mark.parametrize(
    ("counts", "share", "want"),
    [((10, 12, 4, 6, 2), "0.7", 6), (range(60, 0, -1), "0.5", 30), ((10,), "1.0", 10)],
)
def test_few_need_no_order_and_many_are_bisected(counts, share, want):
    """A mosaic that is shrunk after the encoder may have more tokens than one of more tiles."""
    made = []

    def process(arguments):
        made.append(arguments)
        return {"input_ids": torch.tensor([[1] + [9] * arguments.get("n", counts[0]) + [1]])}

    found = processed(process, [{"n": n} for n in counts], parse_budget(share, "visual"), 9)
    assert found.kept == want and found.visual_tokens == counts[0] and len(made) <= 10


def test_a_count_is_of_every_image(loaded):
    given, question = loaded["mini-qwen2-vl"], one_turn("what?", pictures((160, 160), (48, 48)))
    found = prepare_within(given, question, parse_setting("native@16").parts[0])
    grids = found.inputs["image_grid_thw"].prod(1) // 4
    assert grids.tolist() == [16, 9], "the small image is whole, the large one cut"


def test_text_alone_and_a_full_budget_are_the_defaults(loaded):
    given = loaded["mini-qwen2-vl"]
    alone = prepare_within(given, one_turn("what?"), parse_setting("native@0.1").parts[0])
    assert (alone.kept, alone.visual_tokens, dict(alone.arguments)) == (0, 0, {})
    question = one_turn("what?", pictures((160, 160)))
    full = prepare_within(given, question, parse_setting("native@1.0").parts[0])
    assert full.kept == full.visual_tokens and not full.arguments


SETTINGS = {
    "mini-qwen2-vl": ["native@0.25", "native@0.5 + uniform@0.5 + snapkv@0.5", "native@0.5"],
    "mini-internvl": ["native@0.25", "native@0.25 + fastv@0.5:layer=1"],
    "mini-llava-onevision": ["native@0.5", "snapkv@0.5 + native@0.5", "native@0.5 + snapkv@0.5"],
}


@pytest.mark.parametrize("name", zoo.names())
def test_a_run_shares_and_tells_cost_of_the_uncompressed_prompt(tmp_path, loaded, name):
    """Records equal a plain generate on what the public function gives; shares are of the whole prompt."""
    settings = [*SETTINGS[name], "uniform@0.5"]
    experiment = build_experiment(
        {
            "name": "n",
            "models": [f"zoo:{name}"],
            "tasks": [{"name": "scene_qa", "documents": 1}],
            "settings": settings,
        },
        "test",
    )
    assert run(experiment, tmp_path).failed == 0 and run(experiment, tmp_path).recorded == 0
    records = {r.setting: r for r in read_run(tmp_path / "n")}
    assert set(records) == {*settings, "none"}, "also settings that differ in their order only"
    plain = records["none"].cost
    given, question = loaded[name], asked_first(experiment)
    for text in SETTINGS[name]:
        setting, cost = parse_setting(text), records[text].cost
        part = next(p for p in setting.parts if p.method.name == "native")
        for key in ("visual_tokens", "prompt_tokens"):
            assert cost[key] == plain[key], "told against the uncompressed prompt"
        arguments = effivlm.native_arguments(
            given.model,
            given.processor,
            given.processor.apply_chat_template(
                list(question.messages), add_generation_prompt=True, tokenize=False
            ),
            question.images,
            part.budget.text,
        )
        inputs = given.processor(**arguments, return_tensors="pt")
        inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        rest = setting.without(type(part.method))
        with Session(given.model, rest) as session:
            tokens, _, _ = generate(given.model, inputs, records[text].new_tokens)
        account = session.accounts[0]
        assert tuple(cost["visual_per_layer"]) == account.visual_per_layer
        assert cost["realised"]["visual"] == account.visual_per_layer[-1] / plain["visual_tokens"]
        assert cost["realised"]["visual"] <= part.budget.share
        answer = given.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        assert records[text].answer == answer, "shared is separate"


def asked_first(experiment):
    """The first question that an experiment asks."""
    from effivlm.experiment import experiment_tasks, sample

    ((spec, task),) = experiment_tasks(experiment)
    return task.documents[sample(task, spec, experiment.seed)[0]].open()


def test_a_document_that_cannot_meet_it_fails_that_setting_alone(tmp_path):
    given = {"models": ["zoo:mini-internvl"], "tasks": [{"name": "multi_image", "documents": 1}]}
    settings = ["native@0.25", "uniform@0.5"]
    experiment = build_experiment({"name": "n", "settings": settings, **given}, "test")
    assert run(experiment, tmp_path).failed == 1
    (failed,) = (r for r in read_run(tmp_path / "n") if r.failed)
    assert failed.setting == "native@0.25" and failed.error["type"] == "BudgetError"
    assert "smallest feasible share is 1.0000" in failed.error["message"]


def test_tokens_that_the_model_did_not_take_are_an_audit_error(loaded):
    given, question = loaded["mini-qwen2-vl"], one_turn("what?", pictures((160, 160)))
    found = prepare_within(given, question, parse_setting("native@0.25").parts[0])
    with Session(given.model, "none") as session:
        given.model(**prepare(given, question))
    wrong = found.told(Outcome(parse_setting("native@0.25"), None, session.accounts[0]))
    assert wrong.account is None and "made 25 visual tokens, the model took 100" in str(wrong.error)


def test_a_session_says_what_to_pass_to_the_processor(loaded):
    with pytest.raises(Unsupported, match=r"native_arguments\(model, processor, text, .* '0.25'\)"):
        effivlm.compress(loaded["mini-qwen2-vl"].model, "native@0.25 + snapkv@0.5")


def test_families_without_an_argument_refuse_and_say_so(tmp_path):
    refused = []
    for name, family in registry.families().items():
        if family.native is None:
            refused.append(name)
            with pytest.raises(Unsupported, match=f"with {name}: no argument of its processor"):
                check_supported(parse_setting("native@0.5"), family)
        else:
            check_supported(parse_setting("native@0.5"), family)
    assert "llava" in refused and not {"qwen2_vl", "internvl", "llava_onevision"} & set(refused)


def test_two_are_refused():
    with pytest.raises(SettingError, match="both say how images are processed"):
        parse_setting("native@0.5 + native@0.25")


def test_explain_refuses(tmp_path: Path):
    given = {"models": ["zoo:mini-qwen2-vl"], "tasks": [{"name": "scene_qa", "documents": 1}]}
    run(build_experiment({"name": "n", "settings": ["uniform@0.5"], **given}, "test"), tmp_path)
    from effivlm.explain import ExplainError, explain

    (record,) = (r for r in read_run(tmp_path / "n") if r.setting == "none")
    with pytest.raises(ExplainError, match="drops no token"):
        list(explain(tmp_path / "n", record.document, "native@0.5"))
