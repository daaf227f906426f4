"""What a method or the runtime could trip over in a model: read off its modules, built on the meta device."""

import torch
from transformers import AutoModelForImageTextToText

from effivlm.runtime.host import host_of


def traits(family, config):
    """The traits of a configuration of a family by name; sizes are left out."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return _text(host_of(model)) | _vision(host_of(model), family)


def _text(host):
    config, layer = host.text.config, host.layers[0]
    heads, kv, model = config.num_attention_heads, config.num_key_value_heads, host.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    per_kind = rope if "full_attention" in rope else {"": rope}
    return {
        "text model": type(host.text).__name__,
        "windows": sorted({w is not None for w in host.windows}),
        "tied head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "biases": _biased(layer),
        "norms": _norms(layer),
        "grouped heads": heads > kv,
        "width of heads": _compared(heads * head_dim, config.hidden_size),
        "soft caps": [
            getattr(config, k, None) is not None
            for k in ("attn_logit_softcapping", "final_logit_softcapping")
        ],
        "scaled logits": hasattr(config, "logit_scale"),
        "rope": {
            kind: (r["rope_type"], "mrope_section" in r, r.get("mrope_interleaved", False))
            for kind, r in per_kind.items()
        },
        "activation": getattr(config, "hidden_act", None) or config.hidden_activation,
    }


def _vision(host, family):
    config, blocks = host.model.config, host.blocks
    full = family.full_blocks(config, len(blocks))
    return {
        "encoder": type(host.encoder).__name__,
        "encoder biases": _biased(blocks[0]),
        "encoder norms": _norms(blocks[0]),
        "encoder windows": len(full) < len(blocks),
        "encoder head": any("head" in name.split(".") for name, _ in host.encoder.named_modules()),
        "[CLS]": family.prefix(config),
        "feature block from the end": len(blocks) - family.feature_block(config, len(blocks)),
        "strategy": getattr(config, "vision_feature_select_strategy", None),
        "deep stack": len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
        "patches a token": _members(family, config),
    }


def _compared(heads, hidden):
    return "as the hidden state" if heads == hidden else "more" if heads > hidden else "less"


def _members(family, config):
    group = family.group(config)
    return group if isinstance(group, int) else len(group) // (int(group.max()) + 1)


def _biased(module):
    return sorted(n.split(".")[-2] for n, _ in module.named_parameters() if n.endswith("bias"))


def _norms(module):
    return {n: type(m).__name__ for n, m in module.named_modules() if "norm" in n.split(".")[-1]}
