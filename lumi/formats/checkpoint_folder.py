"""A checkpoint of a run as a model, or as an adapter of one: what its state says, and its tensors.

Its tokenizer lies in the run's folder, two levels up.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lumi.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lumi.checkpoint.manifest import MANIFEST, STATE
from lumi.config import UserError, from_dict
from lumi.host.hub_cache import name_of
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig

MODEL_PATH = "model_path"  # in the state: the model that the run began with, a folder or one on the hub
_TOKENIZER, _FINAL = "tokenizer", "final"  # in the run's folder


class CheckpointFolder(NamedTuple):
    """A checkpoint, and what its state says of the run.

    Attributes:
        lora: of its adapters; None: it holds a whole model.
        base: the model under the adapters, a folder or `org/name@commit`; None where it is not known.
        base_fingerprint: of the model that the run began with; None where it began with random weights.
    """

    checkpoint: Checkpoint
    shape: ModelConfig
    lora: LoraConfig | None
    base: str | None
    base_fingerprint: str | None
    tokenizer_fingerprint: str

    def weights(self) -> Checkpoint:
        """The checkpoint, the hashes of its weights checked. Raises UserError if one differs."""
        self.checkpoint.verify(group="model")
        return self.checkpoint


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint of a run."""
    return all((Path(folder) / name).is_file() for name in (MANIFEST, STATE))


def open_folder(folder: str | Path) -> CheckpointFolder:
    """Open a checkpoint.

    Raises:
        UserError: its JSON is damaged, or it is no checkpoint of a training.
    """
    checkpoint = open_checkpoint(folder)
    state, where = checkpoint.state, str(checkpoint.path / STATE)
    try:
        config, identity = state["config"], state["identity"]
        shape = from_dict(ModelConfig, config["model"], f"{where}: config.model")
        lora = config["lora"] and from_dict(LoraConfig, config["lora"], f"{where}: config.lora")
        start, tokenizer = identity["start"], identity["tokenizer_fingerprint"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}:", "must be the state of a training", got=f"one without {error}") from error
    return CheckpointFolder(checkpoint, shape, lora, state.get(MODEL_PATH), start, tokenizer)


def tokenizer_folder(folder: str | Path) -> Path:
    """Where a checkpoint's tokenizer lies. Raises UserError if the checkpoint is not in its run's folder."""
    if (found := find_tokenizer(folder)) is not None:
        return found
    got, remedy = "a checkpoint without a run", "pass one by --tokenizer-path, or leave the checkpoint there"
    raise UserError(f"{folder}: the tokenizer", "must be in the run's folder", got=got, remedy=remedy)


def find_tokenizer(folder: str | Path) -> Path | None:
    """Where a checkpoint's tokenizer lies; None: the checkpoint is not in its run's folder."""
    checkpoints = Path(folder).resolve().parent
    for name in (_TOKENIZER, _FINAL):  # older runs have none of their own
        if checkpoints.name == "checkpoints" and (checkpoints.parent / name).is_dir():
            return checkpoints.parent / name
    return None


def state_of_start(start: Path | None) -> dict[str, Any]:
    """What a checkpoint's state says of the model that the run began with."""
    return {MODEL_PATH: None if start is None else name_of(start.resolve())}
