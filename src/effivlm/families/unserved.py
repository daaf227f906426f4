"""Model types that people ask for and no family serves, with the reason."""

ABSENT = (
    "transformers 5.24 has no such model type: its checkpoints bring code of their own, which is"
)
ABSENT += " never run"
LINEAR = "most of its decoder layers keep a state (linear attention or convolution) and no keys and"
LINEAR += " values, which this version's caches and masks cannot follow"
REASONS = {
    "qwen3_5": LINEAR,
    "qwen3_5_moe": LINEAR,
    "lfm2_vl": LINEAR,
    "minicpmv4_6": LINEAR,
    "gemma4": "decoder layers take the keys and values of earlier layers or inputs of their own per"
    " token, and its encoder sees padded images, none of which is followed yet",
    "llama4": "its image features leave the encoder before the projector, and its decoder attends"
    " in chunks counted by position, neither of which is followed yet",
    "ovis2": "tokens are mixtures over a visual vocabulary, and indicator tokens between the words"
    " are written by the encoder, which is not followed yet",
    "molmo2": "its projector pools patches by an index that the processor makes, which no family"
    " can say yet",
    "kimi_k25": "multi-head latent attention: keys and values have different widths, which no cache"
    " method here is checked on",
    "kimi_vl": ABSENT,
    "llava_onevision1_5": ABSENT,
    "internvl_chat": "InternVL before its conversion to transformers: load the checkpoint whose"
    " name ends in -HF, which is served as internvl (3.5 too)",
}
