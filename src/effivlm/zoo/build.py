"""The tiny LLaVA-architecture model of the zoo: configuration, tokenizer and processor, from transformers' own classes."""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from effivlm.zoo.render import COLOURS, COLUMNS, LETTERS, NUMBERS, PLURALS, ROWS, SHAPES, SIZE

PATCH = 16
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
QUESTION_WORDS = "what number is written word list all shapes colour the shape where there a how many yes no".split()
TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<user>{% else %}<assistant>{% endif %}"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """Every token; words and characters exist with and without the space before them."""
    words = [
        *QUESTION_WORDS,
        *COLOURS,
        *SHAPES,
        *PLURALS.values(),
        *NUMBERS,
        *ROWS,
        *COLUMNS,
        "and",
        "picture",
        "first",
        "second",
    ]
    pieces = [*dict.fromkeys(words), *LETTERS, *"0123456789", "?", ".", ","]
    return [*SPECIAL, "<unk>", *(form for p in pieces for form in (p, " " + p))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words, single capital letters and single digits; a space belongs to what follows it."""
    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+| ?[A-Z]| ?[0-9]| ?[^\sA-Za-z0-9]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   additional_special_tokens=["<image>", "<user>", "<assistant>"], padding_side="left",
                                   clean_up_tokenization_spaces=False)  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def make_processor() -> LlavaProcessor:
    """Images by the PIL back end, ``SIZE`` x ``SIZE``; 100 visual tokens an image."""
    images = CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False, do_convert_rgb=True,
                                   image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
    return LlavaProcessor(image_processor=images, tokenizer=make_tokenizer(), patch_size=PATCH,
                          vision_feature_select_strategy="default", num_additional_image_tokens=1,
                          image_token="<image>", chat_template=TEMPLATE)  # fmt: skip


def make_model(width: int = 96, vision_layers: int = 3, text_layers: int = 4) -> LlavaForConditionalGeneration:
    """An untrained model; the projector takes the output of the last encoder block."""
    tokenizer: Any = make_tokenizer()
    vision = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=vision_layers, num_attention_heads=4,
                              image_size=SIZE, patch_size=PATCH, projection_dim=width)  # fmt: skip
    text = LlamaConfig(vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=text_layers,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_layer=-1, image_seq_length=(SIZE // PATCH) ** 2, tie_word_embeddings=True)  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a transformers checkpoint folder: config, float16 safetensors, tokenizer, processor, chat template."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    make_processor().save_pretrained(folder)
