"""The settings of a fine-tuning, chosen by the model's size, the data and the machine.

They are a sound start, not an optimum. The learning rate of LoRA falls slowly with the model's size. It is
about ten times that of full training (Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/). DPO
takes a tenth of it.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lumi.data.token_store import TokenStore
from lumi.host.devices import peak_flops
from lumi.model.transformer import ModelConfig

LONGEST_ROW = 2048
MAX_STEPS_PER_EPOCH, MIN_STEPS = (
    200,
    40,
)  # fewer rows a step where there are few: adapters need steps to learn
ANCHOR_LR, ANCHOR_PARAMETERS, LR_EXPONENT = 2e-4, 1e9, 0.35
LR_RANGE = (1e-4, 1e-3)
PREFERENCE_LR_RATIO = 0.1
SHARE_OF_PEAK = 0.35
SHARE_OF_PRODUCTS = 0.6  # of the rate of a large product, that a step reaches on a CPU


class Choice(NamedTuple):
    """A run's config as plain JSON values, and the reason for each number, by name."""

    config: dict[str, Any]
    reasons: dict[str, str]


def choose(
    shape: ModelConfig,
    store: TokenStore,
    *,
    tokens: Sequence[str],
    bfloat16: bool,
    epochs: float | None,
    num_steps: int | None = None,
) -> Choice:
    """Choose the settings.

    Args:
        shape: of the model.
        store: the conversations or pairs.
        tokens: control tokens whose rows are trained too.
        bfloat16: whether the machine multiplies it in hardware.
        epochs: passes over the data; None: 3 for a few conversations down to 1 for many.
        num_steps: None: what the epochs take.
    """
    split = store.split("train")
    lengths = np.diff(split.offsets)
    is_pairs = store.manifest.pairs
    documents = len(lengths) // 2 if is_pairs else len(lengths)
    units = lengths.reshape(-1, 2).sum(axis=1) if is_pairs else lengths  # a pair lies in one row
    length = _row_length(int(units.max()), shape.max_positions)
    if epochs is None:
        epochs = 1 if is_pairs else 3 if documents < 2_000 else 2 if documents < 20_000 else 1
    rows = max(1, round(int(np.minimum(units, length).sum()) / length))  # packed
    rows_per_step = _rows_per_step(rows, epochs)
    if num_steps is None:
        num_steps = max(1, round(rows * epochs / rows_per_step))
    epochs = num_steps * rows_per_step / rows
    supervised = int(split.loss_mask(0, len(split.tokens)).sum())
    rank = 16 if supervised < 1_000_000 else 32
    rate = ANCHOR_LR * (ANCHOR_PARAMETERS / shape.num_parameters) ** LR_EXPONENT
    rate = float(f"{min(max(rate, LR_RANGE[0]), LR_RANGE[1]) * (PREFERENCE_LR_RATIO if is_pairs else 1):.2g}")
    every = max(1, num_steps // 10)
    config: dict[str, Any] = {
        "lora": {"rank": rank, "alpha": 2 * rank, "dropout": 0.05, "tokens": list(tokens)},
        "batches": {
            "sequence_length": length, "batch_tokens": length * rows_per_step, "micro_batch_size": "auto",
        },
        "optimizer": {
            "kind": "adamw",
            "peak_lr": rate,
            "weight_decay": 0.0,
            "schedule": {"kind": "cosine", "warmup_steps": num_steps // 20, "final_lr_ratio": 0.1},
        },
        "num_steps": num_steps,
        "dtype": "bfloat16" if bfloat16 else "float32",
        "validate_every": every,
        "save_every": every,
        "final": "best",
    }  # fmt: skip
    if is_pairs:
        config["dpo"] = {"beta": 0.1}
    kind = "pairs" if is_pairs else "documents"
    packed = "1 packed row" if rows_per_step == 1 else f"{rows_per_step} packed rows"
    reasons = {
        "sequence_length": f"{length:,}: the longest of {documents:,} {kind} has {int(units.max()):,} tokens",
        "epochs": f"{epochs:.3g}, in {num_steps:,} steps of {packed}",
        "rank": f"{rank} on all linears, for {supervised:,} supervised tokens",
        "peak_lr": f"{rate:g}, for {shape.num_parameters / 1e6:,.3g}M parameters",
        "dtype": f"{config['dtype']}{'' if bfloat16 else ': this machine has no bfloat16 products'}",
    }
    return Choice(config, reasons)


def estimated_seconds(shape: ModelConfig, tokens: int, context: int, device: torch.device) -> float | None:
    """About how long a CPU trains on so many tokens with frozen matrices: their FLOPs over the measured rate
    of a product. None on a GPU, where the first steps say it sooner."""
    if device.type != "cpu":
        return None
    return tokens * shape.flops_per_token(context, frozen=True) / training_rate(shape.model_dim, device)


def training_rate(model_dim: int, device: torch.device) -> float:
    """FLOP/s that a training step reaches, about.

    On a GPU a share of its peak, elsewhere a share of what the fastest of some products of float32 just
    reached: other work slows down the others.
    """
    if peak := peak_flops(device):
        return SHARE_OF_PEAK * peak
    left, right = torch.ones(512, model_dim, device=device), torch.ones(model_dim, 2048, device=device)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(left, right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return SHARE_OF_PRODUCTS * 2 * left.numel() * right.shape[1] / min(seconds)


def _row_length(longest: int, max_positions: int) -> int:
    """A multiple of 64 that holds the longest, within the model's positions."""
    return min(-(-max(longest, 256) // 64) * 64, LONGEST_ROW, max_positions)


def _rows_per_step(rows: int, epochs: float) -> int:
    """A power of two up to 32: large, unless too few steps were left."""
    count = 1
    while count < 32 and rows / (2 * count) * epochs >= MIN_STEPS and rows / count > MAX_STEPS_PER_EPOCH / 2:
        count *= 2
    return count
