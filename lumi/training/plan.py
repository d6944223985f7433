"""What a run is about to do: parameters, tokens, steps, FLOPs and memory, by arithmetic, before step 1."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lumi.kernels.native import has_native
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.training.memory import memory_of
from lumi.training.run_config import TrainConfig


def describe_plan(
    config: TrainConfig,
    data: Sequence[tuple[str, float, int]],
    num_validation_tokens: int,
    num_processes: int,
    device: torch.device,
    kernels: str,
    peak_flops: float | None,
    num_trained: int | None = None,
) -> str:
    """The plan as a table.

    Args:
        data: per data folder its name, its share of the rows and its training tokens.
        kernels: the name of the operators in use.
        peak_flops: of all devices together, in FLOP/s; None where it is not known.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
    """
    model, batches, layout = config.model, config.batches, config.parallel.layout(num_processes)
    assert model is not None
    flops = model.flops_per_token(batches.sequence_length, frozen=num_trained is not None) * config.num_tokens
    hours = f", {flops / peak_flops / 3600:.2f} h at peak" if peak_flops else ""
    rows = {
        "model": _model(model, num_trained),
        "device": f"{num_processes} x {device.type}, {config.dtype}, {kernels} kernels{_lacks(device)}",
        "layout": layout.describe(),
        "tokens": f"{config.num_tokens:,} ({config.num_tokens / model.num_parameters:.1f} per parameter)",
        "steps": f"{config.num_steps:,} of {batches.batch_tokens:,} tokens: {_shares(config, layout)}",
        "compute": f"{flops:.3g} FLOPs{hours}",
        "memory": _memory(config, layout, device.type, kernels, num_trained),
        "data": "; ".join(_epochs(config, *folder) for folder in data),
        "validation": "none: no validation split",
    }
    if num_processes == 1:
        del rows["layout"]
    if num_validation_tokens:
        rows["validation"] = f"{num_validation_tokens:,} tokens"
    width = max(map(len, rows))
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())


def _lacks(device: torch.device) -> str:
    is_pure = device.type == "cpu" and not has_native(device)
    return "; Lumi is installed without compiled ones, which are faster" if is_pure else ""


def _model(model: ModelConfig, num_trained: int | None) -> str:
    text = f"{model.num_parameters:,} parameters, {model.num_layers} layers of {model.model_dim}"
    if num_trained is None:
        return text
    return f"{text}; {num_trained:,} of adapters are trained ({num_trained / model.num_parameters:.2%})"


def _shares(config: TrainConfig, layout: Layout) -> str:
    """What each process reads in a step."""
    batches = config.batches
    one, several = ("group", "groups") if layout.tensor > 1 else ("process", "processes")
    readers = f"{layout.data} {one if layout.data == 1 else several}"
    rows = f"{batches.micro_batch_rows} rows x {batches.sequence_length}"
    return f"{readers} x {batches.micro_steps(layout.data)} micro-steps x {rows}"


def _memory(
    config: TrainConfig, layout: Layout, device_type: str, kernels: str, num_trained: int | None
) -> str:
    memory = memory_of(config, layout, device_type, kernels, num_trained)
    other = replace(config, gradient_checkpointing=not config.gradient_checkpointing)
    activations = memory_of(other, layout, device_type, kernels, num_trained)["activations"] / 2**20
    how = "with" if other.gradient_checkpointing else "without"
    parts = ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in memory.items())
    return f"{parts} (a process, estimated; {how} checkpointing activations {activations:,.0f} MiB)"


def _epochs(config: TrainConfig, name: str, share: float, num_tokens: int) -> str:
    epochs = share * config.num_tokens / num_tokens
    return f"{name}: {share:.1%} of the rows, {num_tokens:,} tokens, {epochs:.2f} epochs"
