"""What a training run is told: its config, the parts' configs put together, and its paths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lumi.data.batches import BatchConfig
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import ParallelConfig
from lumi.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Paths are not in it: they come from the command line."""

    model: ModelConfig | None = None  # null: that of --model-path
    lora: LoraConfig | None = None  # null: every parameter is trained
    batches: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_steps: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = (
        "bfloat16"  # of activations and products; master weights are float32
    )
    kernels: Literal["auto", "reference", "triton"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    validate_every: int = 250
    validation_tokens: int | None = 1_000_000  # of each data folder; null: the whole split
    save_every: int = 1000
    keep_last: int = 2  # checkpoints; the best one is kept beside them
    final: Literal["last", "best"] = (
        "last"  # which weights final/ holds; "best": of the checkpoint of the lowest validation loss
    )
    max_loss_sigmas: float | None = (
        None  # a step whose loss is this many deviations above those before it is skipped; null: none is
    )
    max_skipped_steps: int = (
        5  # in a row, for a loss or gradient that is not finite or a spike, before the run stops
    )
    step_timeout_seconds: float = (
        600.0  # what a process may take between two marks of a step before all are stopped
    )
    preflight: bool = True  # before step 1: time a micro-step, and rehearse an evaluation and a save

    def __post_init__(self):
        for name in (
            "num_steps",
            "validate_every",
            "save_every",
            "keep_last",
            "max_skipped_steps",
            "validation_tokens",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("max_loss_sigmas", "step_timeout_seconds"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if self.model is not None and self.batches.sequence_length > self.model.max_positions:
            raise ValueError(
                f"batches.sequence_length must be at most model.max_positions = {self.model.max_positions}, "
                f"got {self.batches.sequence_length}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.num_steps * self.batches.batch_tokens


@dataclass(frozen=True)
class Paths:
    """What the command line says. `model_path`: the model that a run begins with; None: random weights. `resume`: None, "auto", or a
    checkpoint folder."""

    data_dirs: Sequence[str]
    tokenizer_dir: str
    output_dir: Path
    data_weights: Sequence[float] | None = None
    resume: str | None = None
    model_path: Path | None = None
