"""One dial: how a model of a size is trained on so many tokens.

- Tokens: 20 for each parameter (Hoffmann et al. 2022, arXiv:2203.15556).
- Batch: the best of three for 1.84 million tokens, 2,048, grows with tokens^0.57.
- Rate: of Muon, through bowls of rates for 0.48 to 2.5 million parameters. It falls with parameters^0.7 and
  grows with the root of the batch.
- Exponents: those of Li et al. 2025 (arXiv:2503.04715), who tuned AdamW for models of up to 1 billion
  parameters. The bowls agree with them.
- The rest of the optimizer: what won for 0.92 million parameters.

docs/results.md has the runs. For larger models the rules are extrapolated.
"""

import math
from typing import Any

from lumi.config import UserError
from lumi.model.transformer import ModelConfig
from lumi.planning.finetuning import Choice
from lumi.training.metrics import human

TOKENS_PER_PARAMETER = 20
HEAD_DIM, LARGEST_DIM = 64, 8192
SMALL_VOCABULARY, VOCABULARY = 8192, 32768
SMALL_VOCABULARY_UP_TO = 60e6  # parameters: a large vocabulary would be most of such a model
MLP_RATIO, ASPECT = 3, 48  # mlp_dim and layers for model_dim
WORST_FIT = 0.05  # of the parameters that were asked for

BATCH, BATCH_TOKENS, BATCH_EXPONENT = 2048, 1.84e6, 0.57
RATE, RATE_PARAMETERS, RATE_EXPONENT = 7e-3, 0.92e6, 0.7
RATE_BATCH, RATE_BATCH_EXPONENT = 4096, 0.5
OPTIMIZER = {"embedding_lr_ratio": 3.0, "weight_decay": 0.1, "beta2": 0.98, "muon_beta2": 0.95}  # NorMuon
DECAY_FRACTION = 0.8
LEAST_WARMUP, WARMUP_SHARE = 20, 0.02
SHORT_ROWS_BELOW = 20e6  # tokens of a run
LONG_ROWS_FROM = 30e6  # parameters

NAMED: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": VOCABULARY, "num_layers": layers, "model_dim": dim, "num_heads": dim // HEAD_DIM,
        "mlp_dim": 4 * dim, "max_positions": 2048,
    }
    for name, layers, dim in (
        ("micro", 4, 128), ("tiny", 6, 256), ("small", 7, 384), ("medium", 12, 512), ("base", 24, 768),
    )
}  # fmt: skip


def model_of(size: str | float) -> dict[str, Any]:
    """The `model` of a named size, or one with about so many parameters, embeddings included.

    Raises:
        UserError: no shape comes within 5%.
    """
    if isinstance(size, str):
        return NAMED[size]
    small = size <= SMALL_VOCABULARY_UP_TO
    best: tuple[float, dict[str, Any]] | None = None
    for dim in range(HEAD_DIM, LARGEST_DIM + 1, HEAD_DIM):
        for layers in range(2, 81):
            model: dict[str, Any] = {
                "vocab_size": SMALL_VOCABULARY if small else VOCABULARY, "num_layers": layers,
                "model_dim": dim, "num_heads": dim // HEAD_DIM, "mlp_dim": MLP_RATIO * dim,
                "max_positions": 2048, "tied_embeddings": small, "qk_norm": True,
            }  # fmt: skip
            miss = abs(ModelConfig(**model).num_parameters / size - 1)
            cost = abs(math.log(dim / layers / ASPECT)) + 4 * miss
            if miss <= WORST_FIT and (best is None or cost < best[0]):
                best = cost, model
    if best is None:
        expected = f"must be {', '.join(NAMED)}, or a number of parameters from 0.7M to 20B"
        raise UserError("--size", expected, got=human(size))
    return best[1]


def choose_training(model: dict[str, Any], num_tokens: int) -> Choice:
    """How to train a model on so many tokens.

    Args:
        model: of the config.
        num_tokens: at least; the run has whole steps.
    """
    parameters = ModelConfig(**model).num_parameters
    length = 256 if num_tokens < SHORT_ROWS_BELOW else 1024 if parameters < LONG_ROWS_FROM else 2048
    batch_tokens = max(length, 2 ** round(math.log2(best_batch(num_tokens))))
    num_steps = -(-num_tokens // batch_tokens)
    rate = float(f"{best_rate(parameters, batch_tokens):.2g}")
    warmup = min(max(LEAST_WARMUP, round(WARMUP_SHARE * num_steps)), int((1 - DECAY_FRACTION) * num_steps))
    every = max(1, min(250, num_steps // 4))
    config: dict[str, Any] = {
        "model": model,
        "batches": {"sequence_length": length, "batch_tokens": batch_tokens, "micro_batch_size": "auto"},
        "optimizer": {
            "kind": "muon", "peak_lr": rate, **OPTIMIZER,
            "schedule": {"kind": "wsd", "warmup_steps": warmup, "decay_fraction": DECAY_FRACTION},
        },
        "num_steps": num_steps,
        "seed": 0,
        "dtype": "bfloat16",
        "validate_every": every,
        "validation_tokens": 1_000_000,
        "save_every": 2 * every,
        "keep_last": 2,
    }  # fmt: skip
    ratio = num_tokens / parameters
    reasons = {
        "model": f"{parameters:,} parameters: {model['num_layers']} layers of {model['model_dim']}, "
        f"a vocabulary of {model['vocab_size']:,}{', tied' if model.get('tied_embeddings') else ''}",
        "tokens": f"{num_steps * batch_tokens:,}, {ratio:.3g} per parameter",
        "batch_tokens": f"{batch_tokens:,}: the best batch grows with tokens^{BATCH_EXPONENT}",
        "peak_lr": f"{rate:g} of Muon, for {human(parameters)} parameters and this batch",
        "schedule": f"{warmup} steps of warm-up; the rate falls to 0 over the last {DECAY_FRACTION:.0%}",
        "validation": f"every {every} steps",
    }
    return Choice(config, reasons)


def best_batch(num_tokens: float) -> float:
    """Tokens of a step for a run of so many tokens."""
    return BATCH * (num_tokens / BATCH_TOKENS) ** BATCH_EXPONENT


def best_rate(num_parameters: float, batch_tokens: float) -> float:
    """The peak rate of Muon."""
    by_size = (RATE_PARAMETERS / num_parameters) ** RATE_EXPONENT
    return RATE * by_size * (batch_tokens / RATE_BATCH) ** RATE_BATCH_EXPONENT
