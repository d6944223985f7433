"""Settings that cannot be are refused."""

import pytest

from lumi.training.optimizer_config import OptimizerConfig


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: OptimizerConfig(peak_lr=0.0), "peak_lr must be positive, got 0.0"),
        (
            lambda: OptimizerConfig(muon_beta2=0.0),
            'kind must be "muon" where muon_beta2 is given, got "adamw"',
        ),
        (lambda: OptimizerConfig(kind="muon", muon_beta2=1.0), r"muon_beta2 must be in \[0, 1\), got 1.0"),
        (
            lambda: OptimizerConfig(muon_momentum=0.9),
            'kind must be "muon" where muon_momentum is given, got "adamw"',
        ),
        (
            lambda: OptimizerConfig(decay_embedding=False, weight_decay=0.0),
            "decay_embedding must be true where weight_decay is 0, got false",
        ),
        (lambda: OptimizerConfig(head_lr_ratio=0.0), "head_lr_ratio must be positive, got 0.0"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "weight_decay must be at least 0, got -1.0"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_refuses(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()
