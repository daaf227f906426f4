"""What choosing costs: every pre-LLM method's selection as a share of one 7B decoder layer's prefill of the same tokens.

    nice python benchmarks/method_time.py --threads 1 --keep 0.1

One image of 2,880 tokens of width 4,096 (encoder width 1,024, 64 text tokens), float32 on the CPU, random clustered
features. Signals are given: their cost belongs to the encoder. The layer is a Llama layer 4096/11008/32 with random
weights and SDPA attention. Prints a Markdown table; ``--json`` writes the same numbers.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from effivlm import registry
from effivlm.budget import parse_budget
from effivlm.methods.base import ImageTokens, PreLLM
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency, TextEmbeds

ROWS, COLUMNS, WIDTH, ENCODER, HEADS, TEXT = 48, 60, 4096, 1024, 16, 64
TOKENS = ROWS * COLUMNS


def seconds(function, repeats: int) -> float:
    """Median wall time of ``repeats`` calls after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def layer_prefill(repeats: int) -> float:
    """One decoder layer on all tokens."""
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=32)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(1, TOKENS, WIDTH)
    tables = LlamaRotaryEmbedding(config)(hidden, torch.arange(TOKENS)[None])
    return seconds(lambda: layer(hidden, position_embeddings=tables), repeats)


def image() -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Signals, embeddings and places of one image."""
    g = torch.Generator().manual_seed(0)

    def clustered(width):
        centres = torch.randn(64, width, generator=g)
        return centres[torch.randint(64, (TOKENS,), generator=g)] + 0.7 * torch.randn(TOKENS, width, generator=g)

    logits = 2 * torch.randn(TOKENS, generator=g)
    values = {Saliency(): logits.softmax(0), ClsLogits(): logits, EncoderKeys(): clustered(ENCODER // HEADS),
              EncoderKeys("last", "concat"): clustered(ENCODER), EncoderFeatures(): clustered(ENCODER),
              TextEmbeds(): torch.randn(TEXT, WIDTH, generator=g)}  # fmt: skip
    place = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS)).float()
    return values, clustered(WIDTH), place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", default="0.1")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    k = parse_budget(options.keep, "visual").count(TOKENS)
    times = {}
    with torch.inference_mode():
        values, embeds, place = image()
        for name, kind in registry.methods().items():
            if issubclass(kind, PreLLM) and kind.select_image is not PreLLM.select_image:
                method = kind()
                given = {s: values[Saliency()] if isinstance(s, Saliency) else values.get(s) for s in method.signals}
                tokens = ImageTokens(given.__getitem__, method.signals, 0, {}, embeds, place, 0, 0)
                times[name] = seconds(lambda m=method, t=tokens: m.select_image(t, k), options.repeats)
        layer = layer_prefill(options.repeats)
    print(f"{TOKENS} tokens of width {WIDTH}, keep {k}, torch {torch.__version__}, float32, {options.threads} thread(s)")
    print(f"one 7B decoder layer, prefill of {TOKENS} tokens: {layer:.2f} s\n")
    print("| method | seconds | share of one layer |\n|---|---|---|")
    for name, cost in sorted(times.items(), key=lambda item: item[1]):
        print(f"| {name} | {cost:.3f} | {100 * cost / layer:.1f} % |")
    if options.json:
        report = {"tokens": TOKENS, "width": WIDTH, "keep": k, "threads": options.threads, "torch": torch.__version__,
                  "repeats": options.repeats, "layer_seconds": layer, "seconds": times}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
