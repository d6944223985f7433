"""What an optimizer is told: its kind, its rates and its decay."""

from dataclasses import dataclass, field
from typing import Literal

from lumi.training.schedule import CosineSchedule, WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate.

    `adamw` (Loshchilov & Hutter 2019, arXiv:1711.05101) trains all parameters. `muon` (`lumi.training.muon`)
    trains the matrices of the layers, and AdamW the rest.
    """

    # `adamw` for everything, or `muon` for the matrices of the layers and AdamW for the rest.
    kind: Literal["adamw", "muon"] = "adamw"
    # The highest learning rate, reached after warm-up.
    peak_lr: float = 1e-3
    # The embedding's rate as a multiple of `peak_lr`; tied, it is the output head's too.
    embedding_lr_ratio: float = 1.0
    # Likewise that of the output head (`lm_head`), where it is not tied.
    head_lr_ratio: float = 1.0
    # Likewise that of norms and biases.
    norm_lr_ratio: float = 1.0
    # Weight decay of matrices, times their rate; norms and biases have none.
    weight_decay: float = 0.1
    # Whether the embedding decays too.
    decay_embedding: bool = True
    # AdamW: decay of the mean of the gradients.
    beta1: float = 0.9
    # AdamW: decay of the mean of their squares.
    beta2: float = 0.95
    # AdamW: added to the denominator.
    eps: float = 1e-8
    # Muon: decay of the mean of the gradients.
    muon_momentum: float = 0.95
    # NorMuon: decay of the mean of the squares of each row of Muon's updates, such as 0.95; null: plain Muon.
    muon_beta2: float | None = None
    # Gradients are scaled down to this joint L2 norm.
    max_grad_norm: float = 1.0
    schedule: CosineSchedule | WarmupStableDecay = field(default_factory=CosineSchedule)

    def __post_init__(self) -> None:
        ratios = "embedding_lr_ratio", "head_lr_ratio", "norm_lr_ratio"
        for name in ("peak_lr", "eps", "max_grad_norm", *ratios):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("beta1", "beta2", "muon_momentum", "muon_beta2"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.kind != "muon":
            for name in ("muon_momentum", "muon_beta2"):
                if getattr(self, name) != getattr(type(self), name):  # the default
                    raise ValueError(f'kind must be "muon" where {name} is given, got "{self.kind}"')
        if not self.weight_decay and not self.decay_embedding:
            raise ValueError("decay_embedding must be true where weight_decay is 0, got false")
