"""Every family's real processor under a session: pictures and words in, and the audit counts the placeholders it wrote."""

import importlib.util
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from effivlm import compress, registry
from effivlm.families.loading import _image_only, load_processor
from effivlm.runtime.host import host_of

torch.set_num_threads(1)
WORDS = "describe the red square left of a blue circle and count what you see in both pictures"
GRIDS = [[28, 56], [56, 28], [56, 56]]
BOX = {side: {"height": side, "width": side} for side in (28, 56)}
ANYRES = {"size": BOX[28], "crop_size": BOX[28], "image_grid_pinpoints": GRIDS}
NATIVE = {"patch_size": 7, "min_pixels": 28 * 28, "max_pixels": 56 * 56}
CLIP = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
QWEN |= {"vision_bos": "<|vision_start|>", "vision_eos": "<|vision_end|>"}
IDEFICS = {"image": "<image>", "fake_image": "<fake_token_around_image>"}
IDEFICS |= {"image_boundary": "<fake_token_around_image>"}  # as Idefics2 names it
IDEFICS |= {"end_of_utterance": "<end_of_utterance>", "global_image": "<global-img>"}
LLAVA = {"image": "<image>", "video": "<video>"}
GEMMA = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}
INTERN = {"context_image": "<IMG_CONTEXT>", "start_image": "<img>", "end_image": "</img>"}
INTERN |= {"video": "<video>", "image": "<IMG_CONTEXT>"}
GLM = {"image": "<|image|>", "video": "<|video|>", "vision_bos": "<|begin_of_image|>"}
GLM |= {"vision_eos": "<|end_of_image|>", "think": "<think>"}
PIXTRAL = {"image": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"}
GLM_SHOWN = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_SIZES = {"patch_size": 7, "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 2}}
AYA = {"image": "<|IMG_PATCH|>", "shown": "<image>", "start": "<|START_OF_IMG|>"}
AYA |= {"end": "<|END_OF_IMG|>", "whole": "TILE_GLOBAL", "tile": "TILE"}
CONFIGURED = {  # where the model is told which id a role has
    "image": "image_token_id",
    "video": "video_token_id",
    "boi": "boi_token_index",
    "eoi": "eoi_token_index",
    "vision_bos": "vision_start_token_id",
    "vision_eos": "vision_end_token_id",
}


@dataclass(frozen=True)
class Case:
    """A processor as a checkpoint of the family would hold it, at the tiny model's sizes.

    Attributes:
        home: module of the image processor. sizes: its arguments.
        special: special tokens by role; ``image`` is the placeholder.
        options: further arguments of the processor. call: of a call to it.
        shown: what stands for a picture in a prompt.
    """

    family: str
    home: str
    sizes: dict
    special: dict
    options: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    shown: str = "<image>"


def qwen(family):
    return Case(
        family, "qwen2_vl", NATIVE, QWEN, shown="<|vision_start|><|image_pad|><|vision_end|>"
    )


def gemma(**call):
    options = {"image_seq_length": 4}
    return Case("gemma3", "gemma3", {"size": BOX[56]}, GEMMA, options, call, GEMMA["boi"])


def idefics(family, latents, **sizes):
    options = {"image_seq_len": latents} | (
        {"video_processor": None} if family == "smolvlm" else {}
    )
    return Case(family, family, sizes, IDEFICS, options)


def split(side):
    return {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}


WHOLE = {"size": {"shortest_edge": 56, "longest_edge": 56}}
CASES = {
    "llava": Case(
        "llava",
        "clip",
        {"size": BOX[56], "do_center_crop": False},
        LLAVA,
        {"patch_size": 14, **CLIP},
    ),
    "mantis": Case(
        "mantis",
        "siglip",
        {"size": BOX[56]},
        LLAVA,
        {"patch_size": 14, "vision_feature_select_strategy": "default"},
    ),
    "llava_next": Case("llava_next", "llava_next", ANYRES, LLAVA, {"patch_size": 7, **CLIP}),
    "llava_onevision": Case(
        "llava_onevision",
        "llava_onevision",
        ANYRES,
        LLAVA,
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "qwen3_vl": qwen("qwen3_vl"),
    "qwen3_vl_moe": qwen("qwen3_vl_moe"),
    "glm4v": Case("glm4v", "glm4v", GLM_SIZES, GLM, shown=GLM_SHOWN),
    "glm4v_moe": Case("glm4v_moe", "glm4v", GLM_SIZES, GLM, shown=GLM_SHOWN),
    "mistral3": Case(
        "mistral3",
        "pixtral",
        {"size": {"longest_edge": 84}, "patch_size": {"height": 14, "width": 14}},
        PIXTRAL,
        {"patch_size": 7, "spatial_merge_size": 2},
        shown=PIXTRAL["image"],
    ),
    "paligemma": Case("paligemma", "siglip", {"size": BOX[56], "image_seq_length": 16}, LLAVA),
    "internvl": Case(
        "internvl",
        "got_ocr2",
        {"size": BOX[56], "crop_to_patches": True, "max_patches": 4},
        INTERN,
        {"image_seq_length": 16},
        shown=INTERN["image"],
    ),
    "aya_vision": Case(
        "aya_vision",
        "got_ocr2",
        {"size": BOX[56], "max_patches": 4},
        AYA,
        {"patch_size": 14, "img_size": 56, "downsample_factor": 2},
    ),
    "idefics2": idefics("idefics2", 8, **WHOLE, do_image_splitting=False),
    "idefics2 in crops": idefics("idefics2", 8, **WHOLE, do_image_splitting=True),
    "idefics3": idefics("idefics3", 4, **split(56)),
    "smolvlm": idefics("smolvlm", 4, **split(84)),
    "gemma3": gemma(),
    "gemma3 pan and scan": gemma(
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=20,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
}


def trained_tokenizer(special):
    """Byte-level BPE of a few words, with the family's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        [WORDS] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<s>", "</s>", *dict.fromkeys(special.values())],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={f"{role}_token": token for role, token in special.items()},
    )


def processor_of(case, config, tokenizer):
    if case.home == "pixtral" and not importlib.util.find_spec("torchvision"):
        pytest.skip("transformers offers PixtralProcessor only beside torchvision")
    home = importlib.import_module(
        f"transformers.models.{case.home}.image_processing_pil_{case.home}"
    )
    (images,) = (
        kind
        for name, kind in vars(home).items()
        if name.endswith("ImageProcessorPil") and kind.__module__ == home.__name__
    )
    kind = _image_only(PROCESSOR_MAPPING[type(config)])
    return kind(image_processor=images(**case.sizes), tokenizer=tokenizer, **case.options)


def model_for(case, tokenizer):
    """The family's tiny model with the tokenizer's vocabulary and ids."""
    model = tiny.build.__wrapped__(case.family)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tiny.randomise(model, 0)
    for role, name in CONFIGURED.items():
        if role in case.special and hasattr(model.config, name):
            setattr(model.config, name, tokenizer.convert_tokens_to_ids(case.special[role]))
    return model


def picture(height, width):
    noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(autouse=True)
def _without_num2words(monkeypatch):
    """SmolVLM's processor reads out the lengths of videos with it, and refuses to be built without."""
    import transformers.models.smolvlm.processing_smolvlm as smolvlm

    if smolvlm.num2words is None:
        monkeypatch.setattr(smolvlm, "num2words", str)


@pytest.mark.parametrize("name", CASES)
def test_the_audit_counts_the_placeholders_of_the_processor(name):
    """A batch of a prompt with two pictures and one with a third; half of each picture is kept."""
    case = CASES[name]
    tokenizer = trained_tokenizer(case.special)
    model = model_for(case, tokenizer)
    processor = processor_of(case, model.config, tokenizer)
    inputs = processor(
        images=[[picture(50, 110), picture(60, 40)], [picture(40, 100)]],
        text=[f"the red {case.shown} and {case.shown} describe both", f"{case.shown} what"],
        padding=True,
        return_tensors="pt",
        **case.call,
    )
    written = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    tokens = inputs["attention_mask"].sum(1).tolist()
    call = host_of(model).image_call(inputs)
    assert sum(len(p.source) for p in host_of(model).family.layout(model, call)) == sum(written)
    with compress(model, "divprune@0.5 + snapkv@0.5") as session, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 3)
    for account, visual, length in zip(session.accounts, written, tokens, strict=True):
        assert account.visual_tokens == visual > 0
        (kept,) = set(account.visual_per_layer)
        assert visual / 2 - 5 <= kept <= visual / 2
        assert set(account.kv_per_layer) == {(length - visual + kept) // 2}


SIZES = [(1, 1), (1, 90), (90, 1), (2, 3), (7, 7), (13, 14), (14, 13), (27, 29), (28, 28), (28, 56)]
SIZES += [(56, 28), (55, 57), (40, 100), (100, 40), (31, 97), (84, 84), (300, 20), (20, 300)]
SIZES += [(223, 225), (640, 480)]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v", "glm4v_moe", "mistral3", "paligemma"])
def test_layouts_count_what_processors_write_whatever_the_size(name):
    """Twenty sizes, from one pixel to extreme aspects."""
    case = CASES[name]
    tokenizer, model = trained_tokenizer(case.special), tiny.build(case.family)
    processor = processor_of(case, model.config, tokenizer)
    mark = tokenizer.convert_tokens_to_ids(case.special["image"])
    for size in SIZES:
        inputs = processor(images=[[picture(*size)]], text=[case.shown], return_tensors="pt")
        written = int((inputs["input_ids"] == mark).sum())
        call = host_of(model).image_call(inputs)
        (piece,) = host_of(model).family.layout(model, call)
        assert len(piece.source) == written > 0, size


def test_smolvlms_processor_loads_without_its_video_half(tmp_path):
    case = CASES["smolvlm"]
    config, tokenizer = registry.families()["smolvlm"].tiny(), trained_tokenizer(case.special)
    made = processor_of(case, config, tokenizer)
    config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    folder = json.loads((tmp_path / "processor_config.json").read_text())
    folder["video_processor"] = {"video_processor_type": "SmolVLMVideoProcessor"}  # as published
    (tmp_path / "processor_config.json").write_text(json.dumps(folder))
    loaded = load_processor(tmp_path)
    texts = {"images": [[picture(50, 110)]], "text": ["<image> what"], "return_tensors": "pt"}
    assert loaded.image_seq_len == 4 and loaded.tokenizer.padding_side == "left"
    assert torch.equal(loaded(**texts)["input_ids"], made(**texts)["input_ids"])


def test_pan_and_scan_and_tiles_give_more_placeholders():
    """The cases above are what they say: crops and tiles are there."""
    counts = {}
    for name in ("gemma3", "gemma3 pan and scan", "idefics2", "idefics2 in crops"):
        case = CASES[name]
        tokenizer = trained_tokenizer(case.special)
        config = registry.families()[case.family].tiny()
        inputs = processor_of(case, config, tokenizer)(
            images=[[picture(50, 110)]], text=[case.shown], return_tensors="pt", **case.call
        )
        mark = tokenizer.convert_tokens_to_ids(case.special["image"])
        counts[name] = int((inputs["input_ids"] == mark).sum())
    assert counts == {
        "gemma3": 4,
        "gemma3 pan and scan": 4 * (1 + 2),
        "idefics2": 8,
        "idefics2 in crops": 8 * (1 + 4),
    }
