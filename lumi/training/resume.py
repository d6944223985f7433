"""Going on with a run: what must be the same, and what a checkpoint's values go back into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.config import UserError, differences, from_dict, to_dict
from lumi.model.transformer import ModelConfig
from lumi.training.run_config import TrainConfig
from lumi.training.run_data import RunData
from lumi.training.run_model import start_fingerprint


def run_identity(config: TrainConfig, start: Path | None, data: RunData) -> dict[str, Any]:
    """What decides the weights' shapes and which data a step sees, as JSON values."""
    return {
        "model": to_dict(config.model),
        "start": start_fingerprint(start),
        "lora": config.lora and to_dict(config.lora),
        "sequence_length": config.batches.sequence_length,
        "batch_tokens": config.batches.batch_tokens,
        "optimizer": config.optimizer.kind,
        "seed": config.seed,
        **data.identity(),
    }


def resumed_state(
    checkpoint: Checkpoint, identity: dict[str, Any], config: TrainConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    """The state of a checkpoint that this run may go on from; `say` is told what has changed in the config.

    Raises:
        UserError: the identity is another one, or the run was to end before the checkpoint's step.
    """
    state = dict(checkpoint.state)
    saved_identity, saved_config = (
        _resolved(state.pop(name), str(checkpoint.path)) for name in ("identity", "config")
    )
    if changed := differences(saved_identity, identity):
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{checkpoint.path}: cannot go on from here: {'; '.join(changed[:3])}{more}; use what the run began with"
        )
    if state["step"] > config.num_steps:
        raise UserError(
            f"num_steps must be at least the checkpoint's step {state['step']}, got {config.num_steps}"
        )
    for change in differences(saved_config, to_dict(config)):
        say(f"changed since the checkpoint: {change}")
    return state


def _resolved(saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Saved values with the numbers of `model` that follow from others: older checkpoints hold null for them."""
    if saved["model"] is None:
        return saved
    return saved | {"model": to_dict(from_dict(ModelConfig, saved["model"], where))}


def micro_batch_before(checkpoint: Checkpoint | None) -> int | None:
    """The micro-batch that a run had when the checkpoint was saved; None where there is none."""
    return None if checkpoint is None else checkpoint.state["config"]["batches"]["micro_batch_size"]
