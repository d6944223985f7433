"""Generation on a CPU, greedy, with a cache, against `generate` of transformers.

    python benchmarks/cpu_generation.py [--output-dir benchmarks/results] [--rounds 2]

A model of 15 M parameters with random weights: 6 layers of 288, 32,000 pieces, tied. 128 new tokens after a
prompt of 16, one row and eight rows. Peers have the same
weights, and their tokens must be the same in float32. dtype: float32, and bfloat16 where the CPU multiplies
it.

The floor of one row is the reading of all weights, at the rate at which torch sums a large tensor.
"""

import sys
from collections.abc import Callable

import peers
import torch
from cpu_training import best_seconds, fastest_dtype
from results import Results, main

from lumi.formats.pretrained import narrow
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import select
from lumi.model.transformer import ModelConfig, Transformer

SHAPE = ModelConfig(
    vocab_size=32_000,
    num_layers=6,
    model_dim=288,
    num_heads=6,
    mlp_dim=768,
    max_positions=2048,
    tied_embeddings=True,
)
NEW, PROMPT, BATCHES = 128, list(range(1, 17)), (1, 8)
OVER_HF = 4.0


def read_rate() -> float:
    """Bytes per second that torch reads."""
    numbers = torch.ones(2**26)
    return numbers.nbytes / best_seconds(numbers.sum)


def run(results: Results) -> None:
    dtypes = dict.fromkeys((torch.float32, fastest_dtype()))
    rate = read_rate()
    results.note(**{"GB/s read": round(rate / 1e9, 1)})
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        model = Transformer(SHAPE, select("auto", "cpu", SHAPE.head_dim, dtype), compute_dtype=dtype)
        narrow(model.init_weights(0).eval())
        model.join_weights()
        floor = sum(p.numel() for p in model.parameters()) * dtype.itemsize / rate

        def lumi(batch: int, model: Transformer = model) -> Callable[[], list[list[int]]]:
            config = SamplingConfig(max_new_tokens=NEW, temperature=0)
            options = {"stop_ids": frozenset(), "pad_id": 0}
            return lambda: [row.ids for row in generate_ids(model, [PROMPT] * batch, config, **options)]

        def hf(batch: int, model: Transformer = model, dtype: torch.dtype = dtype) -> Callable:
            theirs = peers.hf_llama(model, dtype).eval()
            theirs.config.use_cache = theirs.generation_config.use_cache = True
            tokens = torch.tensor([PROMPT] * batch)
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

            def generate() -> list[list[int]]:
                with torch.inference_mode():
                    ids = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
                return ids[:, len(PROMPT) :].tolist()

            return generate

        for batch in BATCHES:
            case = f"{short}, {batch} row{'s' if batch > 1 else ''}"
            with results.case(case):
                if dtype == torch.float32 and lumi(batch)() != hf(batch)():
                    raise RuntimeError("the tokens differ from those of transformers")
                candidates = {"lumi": lambda b=batch: [lumi(b)], "hf": lambda b=batch: [hf(b)]}
                times = results.time(case, candidates)
                results.compare(case, at_least=OVER_HF)
                results.claim(f"{case}: tokens per second", batch * NEW / times["lumi"])
                results.claim(f"{case}: time of a step, over the floor", times["lumi"] / NEW / floor)


if __name__ == "__main__":
    sys.exit(main("cpu_generation", __doc__, run, device_type="cpu", rounds=2))
