"""Loading checkpoints and processors without torchvision, and the errors for what cannot be loaded."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from effivlm import registry
from effivlm.families import loading
from effivlm.families.loading import LoadError, family_of, load, require_video
from effivlm.runtime.before_llm import instruction

torch.set_num_threads(1)
PINS = [[28, 56], [56, 28], [56, 56]]
BOX56, BOX28 = {"height": 56, "width": 56}, {"height": 28, "width": 28}
IMAGE_PROCESSORS = {
    "llava": {"size": BOX56, "do_center_crop": False},
    "llava_next": {"size": BOX28, "crop_size": BOX28, "image_grid_pinpoints": PINS},
    "llava_onevision": {"size": BOX28, "image_grid_pinpoints": PINS},
    "qwen2_vl": {"patch_size": 7, "min_pixels": 28 * 28, "max_pixels": 56 * 56},
    "qwen2_5_vl": {"patch_size": 7, "min_pixels": 28 * 28, "max_pixels": 56 * 56},
    "qwen3_vl": {"patch_size": 7, "min_pixels": 28 * 28, "max_pixels": 56 * 56},
    "internvl": {"size": BOX56, "crop_to_patches": True, "max_patches": 4},
    "idefics2": {"do_image_splitting": False, "size": {"shortest_edge": 28, "longest_edge": 56}},
    "idefics3": {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
    "gemma3": {"size": BOX56},
}
OPTIONS = {
    "llava": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    },
    "llava_next": {
        "patch_size": 7,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    },
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<video>",
    },
    "internvl": {"image_seq_length": 16},
    "idefics2": {"image_seq_len": 8},
    "idefics3": {"image_seq_len": 4},
    "gemma3": {"image_seq_length": 4},
}
NAMES = {  # placeholder, video, start, end, in the words of each processor
    "qwen": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    "idefics": ("<image>", "<video>", "<fake_token_around_image>", "<end_of_utterance>"),
    "gemma3": ("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>"),
    "llava": ("<image>", "<video>", "<unused1>", "<unused2>"),
}
EXTRA = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
}


def names(family):
    return next(v for k, v in NAMES.items() if family.startswith(k))


def tokenizer(family):
    special = ["<pad>", "<s>", "</s>", *names(family)]
    vocab = {f"w{i}": i for i in range(120)}
    for token, i in zip(special, (0, 1, 2, 100, 101, 102, 103), strict=True):
        vocab = {t: j for t, j in vocab.items() if j != i} | {token: i}
    core = Tokenizer(models.WordLevel(vocab, unk_token="w5"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w5",
        **({"extra_special_tokens": EXTRA[family]} if family in EXTRA else {}),
    )


def image_processor(family):
    import importlib

    kind = IMAGE_PROCESSOR_MAPPING_NAMES[family]["pil"]
    for home in (family, "llava", "qwen2_vl", "got_ocr2", "clip", "siglip"):
        try:
            module = importlib.import_module(
                f"transformers.models.{home}.image_processing_pil_{home}"
            )
        except ImportError:
            continue
        if hasattr(module, kind):
            return getattr(module, kind)(**IMAGE_PROCESSORS[family])
    raise LookupError(kind)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny.build(family).save_pretrained(made[family])
            kind = loading._image_only(PROCESSOR_MAPPING[CONFIG_MAPPING[family]])
            kind(
                image_processor=image_processor(family),
                tokenizer=tokenizer(family),
                **OPTIONS.get(family, {}),
            ).save_pretrained(made[family])
        return made[family]

    return make


@pytest.mark.parametrize("name", list(IMAGE_PROCESSORS))
def test_a_folder_loads_and_answers_about_an_image(name, checkpoint):
    try:
        loaded = load(checkpoint(name), dtype="float32")
    except LoadError as error:
        if name.startswith("idefics") and "Missing optional dependencies: torchvision" in str(
            error
        ):
            pytest.skip(
                "Idefics' PIL image processors import torchvision on this transformers version"
            )
        raise
    assert loaded.family.name == name and loaded.processor.tokenizer.padding_side == "left"
    mark, _, start, end = names(name)
    shown = {"qwen": f"{start}{mark}{end}", "gemma3": start}.get(
        name[:4] if name.startswith("qwen") else name, mark
    )
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    inputs = loaded.processor(
        images=[[picture]] if name.startswith("idefics") else [picture],
        text=[f"w7 {shown} w8 w9"],
        return_tensors="pt",
    )
    model = loaded.model
    call = {
        k: inputs[k]
        for k in (
            "pixel_values",
            "image_sizes",
            "image_grid_thw",
            "batch_num_images",
            "pixel_attention_mask",
        )
        if k in inputs
    }
    pieces = loaded.family.layout(model, call)
    assert sum(len(p.source) for p in pieces) == int((inputs["input_ids"] == 100).sum()) > 0
    ids = inputs["input_ids"][0]
    said = instruction(ids == 100, torch.ones_like(ids).bool(), *loaded.family.markers)
    assert ids[said].tolist() == [7, 8, 9]  # of what the processor wrote, the user's words alone
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2


def test_weights_come_back_as_they_were(checkpoint):
    loaded, made = (
        load(checkpoint("qwen2_vl"), dtype="float32", attn="eager"),
        tiny.build("qwen2_vl"),
    )
    assert loaded.model.config._attn_implementation == "eager"
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.model.parameters(), made.parameters(), strict=True)
    )


def test_videos_are_refused_without_torchvision(checkpoint):
    processor = load(checkpoint("qwen2_vl"), dtype="float32").processor
    with pytest.raises(LoadError, match="torchvision"):
        processor(text=["<|video_pad|>"], videos=[torch.zeros(2, 3, 28, 28)])
    with pytest.raises(LoadError, match="torchvision"):
        require_video()


def test_a_folder_without_weights(checkpoint, tmp_path):
    shutil.copy(checkpoint("llava") / "config.json", tmp_path)
    with pytest.raises(LoadError, match="no weights"):
        load(tmp_path)


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(LoadError, match=r"config\.json"):
        load(tmp_path)


def test_pickled_weights_are_not_loaded(checkpoint, tmp_path):
    shutil.copy(checkpoint("llava") / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "near"), [("bert", "supported are"), ("qwen2_vll", "supported are")]
)
def test_a_model_type_nobody_serves(checkpoint, tmp_path, kind, near):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    shutil.copy(checkpoint("llava") / "model.safetensors", tmp_path)
    with pytest.raises(LoadError, match=kind):
        load(tmp_path)


def test_near_names_of_a_model_type():
    with pytest.raises(LoadError, match="did you mean qwen2_vl"):
        loading.family_named("qwen2_vll", "the checkpoint")


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="nobody/nothing"):
        load("nobody/nothing")


def test_an_unknown_shape_names_near_ones():
    with pytest.raises(registry.UnknownName, match=r"qwen2-vl-7b"):
        load("qwen2vl-7b", random_weights=True)


def test_family_of_a_model_that_is_not_a_vision_language_model():
    config = CONFIG_MAPPING["llama"](
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    from transformers import AutoModelForCausalLM

    with pytest.raises(LoadError, match="llama"):
        family_of(AutoModelForCausalLM.from_config(config))


def test_an_encoder_of_another_layout_is_refused_before_its_weights_are_read(checkpoint, tmp_path):
    config = json.loads((checkpoint("llava") / "config.json").read_text()) | {
        "vision_feature_select_strategy": "full"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="vision_feature_select_strategy='full'"):
        load(tmp_path)


def test_an_unknown_dtype(checkpoint):
    with pytest.raises(LoadError, match="float16"):
        load(checkpoint("llava"), dtype="half")
