"""Going on with a run: what must be the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumi.checkpoint.checkpoint import Checkpoint
from lumi.config import UserError, differences, from_dict, to_dict
from lumi.formats.fingerprint import is_fingerprint_of
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


def check_resumable(
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    config: TrainConfig,
    start: Path | None,
    say: Callable[[str], None],
) -> None:
    """Check that a run may go on from a checkpoint.

    Args:
        identity: as `run_identity` gives it for this run.
        start: the folder of the model that it begins with.
        say: is told what has changed in the config.

    Raises:
        UserError: the identity is another one, or the run was to end before the checkpoint's step.
    """
    state = checkpoint.state
    saved_identity, saved_config = (
        _resolved(state[name], str(checkpoint.path)) for name in ("identity", "config")
    )
    older = saved_identity["start"]
    if start and older and older != identity["start"] and is_fingerprint_of(older, start):
        saved_identity = saved_identity | {"start": identity["start"]}
    if changed := differences(saved_identity, identity):
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        changes = f"{'; '.join(changed[:3])}{more}"
        raise UserError(
            f"{checkpoint.path}: cannot go on from here: {changes}", remedy="use what the run began with"
        )
    if state["step"] > config.num_steps:
        raise UserError(
            f"num_steps must be at least the checkpoint's step {state['step']}, got {config.num_steps}"
        )
    for change in differences(saved_config, to_dict(config)):
        say(f"changed since the checkpoint: {change}")


def _resolved(saved: dict[str, Any], where: str) -> dict[str, Any]:
    """Saved values with all those of `model`.

    Older checkpoints hold null for numbers that follow from others, and name no kind of `rope_scaling`:
    there was only Llama 3's.
    """
    model = saved["model"]
    if model is None:
        return saved
    if (scaling := model.get("rope_scaling")) is not None:
        model = model | {"rope_scaling": {"kind": "llama3"} | scaling}
    return saved | {"model": to_dict(from_dict(ModelConfig, model, where))}
