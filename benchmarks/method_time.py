"""What choosing costs: every pre-LLM method's selection as a share of one 7B decoder layer's
prefill of the same tokens.

    nice python benchmarks/method_time.py --threads 1 --keep 0.1

One image of 2,880 tokens of width 4,096 (encoder width 1,024, 64 text tokens), float32 on the CPU,
random clustered features. Signals are given: their cost belongs to the encoder. The layer is a
Llama layer 4096/11008/32 with random weights and SDPA attention. Times are processor time, so that
other jobs on the machine matter less. The largest tensor that a selection makes is given in units
of N x N float32; anything near N x N x D is an error. Prints Markdown.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from effivlm import registry
from effivlm.budget import parse_budget
from effivlm.measure.memory import LargestTensor
from effivlm.methods.base import ImageTokens, PreLLM
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency, TextEmbeds

ROWS, COLUMNS, WIDTH, ENCODER, HEADS, TEXT = 48, 60, 4096, 1024, 16, 64
TOKENS = ROWS * COLUMNS


def seconds(function, repeats: int) -> float:
    """Median processor time of ``repeats`` calls after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def largest(function) -> float:
    """The largest tensor the call makes, in units of N x N float32.

    Raises:
        AssertionError: if it is anywhere near N x N x D.
    """
    with LargestTensor() as seen:
        function()
    units = seen.bytes / (4 * TOKENS * TOKENS)
    assert units < 8, f"a tensor of {units:.0f} N x N: a selection must not hold N x N x D"
    return units


def layer_prefill(repeats: int) -> float:
    """One decoder layer on all tokens."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=1,
        vocab_size=32,
    )
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
        return centres[torch.randint(64, (TOKENS,), generator=g)] + 0.7 * torch.randn(
            TOKENS, width, generator=g
        )

    logits = 2 * torch.randn(TOKENS, generator=g)
    values = {
        Saliency(): logits.softmax(0),
        ClsLogits(): logits,
        EncoderKeys(): clustered(ENCODER // HEADS),
        EncoderKeys("last", "concat"): clustered(ENCODER),
        EncoderFeatures(): clustered(ENCODER),
        TextEmbeds(): torch.randn(TEXT, WIDTH, generator=g),
    }
    place = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS)).float()
    return values, clustered(WIDTH), place


def run(
    method: PreLLM, k: int, values: dict, embeds: torch.Tensor, place: torch.Tensor, repeats: int
) -> tuple[float, float]:
    """Seconds and largest tensor of one method's selection."""
    given = {
        s: values[Saliency()] if isinstance(s, Saliency) else values.get(s) for s in method.signals
    }
    tokens = ImageTokens(given.__getitem__, method.signals, 0, {}, embeds, place, 0, 0)

    def select() -> None:
        method.select_image(tokens, k)

    return seconds(select, repeats), largest(select)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", default="0.1")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    k = parse_budget(options.keep, "visual").count(TOKENS)
    with torch.inference_mode():
        values, embeds, place = image()
        kinds = [
            c
            for c in registry.methods().values()
            if issubclass(c, PreLLM) and c.select_image is not PreLLM.select_image
        ]
        costs = {c.name: run(c(), k, values, embeds, place, options.repeats) for c in kinds}
        layer = layer_prefill(options.repeats)
    where = f"{options.threads} thread(s), {machine()}, torch {torch.__version__}"
    print(f"{TOKENS} tokens of width {WIDTH}, keep {k}, float32, {where}")
    print(f"One 7B decoder layer, prefill of {TOKENS} tokens: {layer:.2f} s of processor time.\n")
    print("| method | seconds | share of one layer | largest tensor, N x N |\n|---|---:|---:|---:|")
    for name, (cost, units) in sorted(costs.items(), key=lambda item: item[1]):
        print(f"| {name} | {cost:.3f} | {100 * cost / layer:.1f} % | {units:.2f} |")


def machine() -> str:
    """The processor, by its own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in path.read_text().splitlines()
            if "model name" in line
        ]
        if path.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
