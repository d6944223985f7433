"""What a training run is told: its config, the parts' configs put together, and its paths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lumi.config import UserError
from lumi.data.batches import BatchConfig
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import ParallelConfig
from lumi.training.dpo import DpoConfig
from lumi.training.optimizer_config import OptimizerConfig
from lumi.training.schedule import check_fits


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. Paths are not in it: they come from the command line."""

    # The model's shape; null: that of --model-path.
    model: ModelConfig | None = None
    # Adapters to train instead of the model; null: every parameter is trained.
    lora: LoraConfig | None = None
    # Learn from pairs which answer is preferred; null: learn the next token.
    dpo: DpoConfig | None = None
    # How rows and batches are made of the data.
    batches: BatchConfig = field(default_factory=BatchConfig)
    # The optimizer and its schedule.
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # How processes share the work.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # Optimizer steps of the whole run.
    num_steps: int
    # Decides new weights, the order of the data, and what a step draws.
    seed: int = 0
    # Of activations and products; master weights are float32.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    # The operators; "auto": Triton on GPUs that it fits, C++ on CPUs in float32 and bfloat16, the reference
    # elsewhere.
    kernels: Literal["auto", "reference", "native", "triton"] = "auto"
    # Keep only each layer's input for backward and compute the rest again: less memory, a third more time.
    gradient_checkpointing: bool = False
    # Compile each layer with torch.compile.
    compile: bool = False
    # Steps between validations.
    validate_every: int = 250
    # Of each data folder in one validation; null: the whole split.
    validation_tokens: int | None = 1_000_000
    # Steps between checkpoints.
    save_every: int = 1000
    # The newest checkpoints that stay; the best one stays beside them.
    keep_last: int = 2
    # Which weights final/ holds; "best": those of the saved step with the lowest validation loss; "ema": a
    # moving average over the steps.
    final: Literal["last", "best", "ema"] = "last"
    # What the weights before a step count for in that average, such as 0.999; null where final is not "ema".
    ema_decay: float | None = None
    # Weight of log(sum of exp(logits))^2 in the loss of a token, such as 1e-4. The loss of training contains
    # it, that of validation does not.
    z_loss: float = 0.0
    # Skip a step whose loss lies more deviations than this above those before it; null: skip none.
    max_loss_sigmas: float | None = None
    # Skipped steps in a row (not finite, or a spike) after which the run stops.
    max_skipped_steps: int = 5
    # The longest that a process may take between two marks of a step; then all processes are stopped.
    step_timeout_seconds: float = 600.0
    # Before step 1, time a micro-step, and rehearse a validation and a save.
    preflight: bool = True
    # Programs that also get every record of `metrics.jsonl` (needs the extra `trackers`).
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
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
        if not 0 <= self.z_loss <= 1:
            raise UserError("z_loss", "must be between 0 and 1, such as 1e-4", got=self.z_loss)
        if self.z_loss and self.dpo is not None:
            raise UserError("z_loss", "must be 0 with dpo, which compares whole answers", got=self.z_loss)
        if (self.ema_decay is not None) != (self.final == "ema"):
            expected = "a number" if self.final == "ema" else "null"
            got = "null" if self.ema_decay is None else self.ema_decay
            raise UserError("ema_decay", f'must be {expected} where final is "{self.final}"', got=got)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            remedy = 'final "last" holds the last weights' if not self.ema_decay else ""
            raise UserError("ema_decay", "must be between 0 and 1", got=self.ema_decay, remedy=remedy)
        if self.lora is not None and self.optimizer.muon_beta2 is not None:
            expectation = "must be left out with lora, whose matrices begin at zero"
            raise UserError("optimizer.muon_beta2", expectation, got=self.optimizer.muon_beta2)
        if len(set(self.trackers)) < len(self.trackers):
            raise UserError("trackers", "must name each once", got=", ".join(self.trackers))
        check_fits(self.optimizer.schedule, self.num_steps)
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
    """What the command line says.

    Attributes:
        resume: None, "auto", or a checkpoint folder.
        tokenizer_dir, model_path: folders, or `org/name` on the hub until `resolve_run` has fetched it. The
            run begins with the model; None: random weights.
        data_dirs: folders, or URLs of token stores.
        cache_dir: for the tokens of corpus folders, and for what comes from URLs; None: as in
            `lumi.data.token_cache.open_or_tokenize`.
        cache_bytes: for the tokens that come from URLs; None: 64 GB.
    """

    data_dirs: Sequence[str]
    tokenizer_dir: str
    output_dir: Path
    data_weights: Sequence[float] | None = None
    resume: str | None = None
    model_path: Path | None = None
    cache_dir: Path | None = None
    cache_bytes: int | None = None
