"""What a run's config refuses, before anything is read."""

import pytest
from runs import CONFIG

from lumi.config import UserError, from_dict
from lumi.training.run_config import TrainConfig

MODEL = CONFIG["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": "tritn"}, 'kernels must be one of "auto", "reference", "native", "triton", got "tritn"'),
        ({"trackers": ["wanbd"]}, r"trackers\.0 must be one of .*, got \"wanbd\"; did you mean 'wandb'\?"),
        ({"trackers": ["wandb", "wandb"]}, "trackers must name each once, got wandb, wandb"),
        ({"seed": -1}, "seed must be between 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (
            {"num_steps": 8},
            r"optimizer\.schedule\.warmup_steps must be less than num_steps = 8, got 100; lower it, or train",
        ),
        (
            {"num_steps": 100, "optimizer": {"schedule": {"kind": "wsd", "warmup_steps": 90}}},
            r"decay_fraction must be at most 0\.1, what 90 steps of warm-up leave of num_steps = 100",
        ),
        (
            {"model": None, "lora": {}, "optimizer": {"kind": "muon", "muon_beta2": 0.9}},
            r"optimizer\.muon_beta2 must be left out with lora, whose matrices begin at zero, got 0\.9",
        ),
        ({"final": "ema"}, 'ema_decay must be a number where final is "ema", got null'),
        ({"ema_decay": 0.9}, r'ema_decay must be null where final is "last", got 0\.9'),
        ({"final": "ema", "ema_decay": 1.0}, r"ema_decay must be between 0 and 1, got 1\.0$"),
        (
            {"final": "ema", "ema_decay": 0.0},
            r'ema_decay must be between 0 and 1, got 0\.0; final "last" holds the last weights$',
        ),
        ({"z_loss": -1.0}, r"z_loss must be between 0 and 1, such as 1e-4, got -1\.0"),
        ({"z_loss": 1e4}, r"z_loss must be between 0 and 1, such as 1e-4, got 10000\.0"),
        ({"model": None, "dpo": {}, "z_loss": 0.1}, r"z_loss must be 0 with dpo, .*, got 0\.1"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"validation_tokens": 0}, "validation_tokens must be at least 1, got 0"),
        ({"max_loss_sigmas": 0.0}, r"max_loss_sigmas must be positive, got 0\.0"),
        ({"step_timeout_seconds": -1.0}, r"step_timeout_seconds must be positive, got -1\.0"),
        (
            {"batches": {"sequence_length": 256, "batch_tokens": 512, "micro_batch_size": 1}},
            r"sequence_length must be at most model\.max_positions = 128, got 256",
        ),
    ],
    ids=str,
)
def test_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, {"model": MODEL, "num_steps": 300} | changes)


def test_the_tokens_of_a_run():
    batches = {"sequence_length": 32, "batch_tokens": 256, "micro_batch_size": 2}
    config = from_dict(TrainConfig, {"model": MODEL, "num_steps": 300, "batches": batches})
    assert config.num_tokens == 76_800
