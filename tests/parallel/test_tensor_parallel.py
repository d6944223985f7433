"""Tensor parallelism; `group_processes.py` is what runs in several processes."""

import os

import pytest
from case_server import run_case

from lumi.config import UserError
from lumi.model.transformer import ModelConfig
from lumi.parallel.tensor_parallel import check_tensor_parallel


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_loss_and_gradients_are_those_of_one_process(tmp_path):
    """In float64, on 2 and 4 processes: grouped heads, ties, qk-norm, checkpointing, LoRA, rows of tokens."""
    run_case("group_processes", "layers", tmp_path, log=tmp_path / "log")


SHAPE = {"vocab_size": 45, "num_layers": 1, "model_dim": 24, "num_heads": 6, "mlp_dim": 48}


@pytest.mark.parametrize(
    ("changes", "length", "size", "message"),
    [
        ({}, 32, 4, r"parallel\.tensor must divide model\.num_heads = 6, got 4"),
        ({"num_kv_heads": 3}, 32, 2, r"parallel\.tensor must divide model\.num_kv_heads = 3, got 2"),
        ({"mlp_dim": 45}, 32, 2, r"parallel\.tensor must divide model\.mlp_dim = 45, got 2"),
        (
            {"model_dim": 25, "head_dim": 4},
            32,
            2,
            r"parallel\.tensor must divide model\.model_dim = 25, got 2",
        ),
        ({}, 32, 3, r"parallel\.tensor must divide batches\.sequence_length = 32, got 3"),
    ],
)
def test_refuses_what_does_not_divide(changes, length, size, message):
    config = ModelConfig(**SHAPE | changes)
    check_tensor_parallel(config, length, 1, dora=True)
    with pytest.raises(UserError, match=message):
        check_tensor_parallel(config, length, size, dora=False)


def test_refuses_dora():
    config = ModelConfig(**SHAPE)
    check_tensor_parallel(config, 32, 2, dora=False)
    with pytest.raises(UserError, match=r"parallel\.tensor must be 1 with lora\.dora .*, got 2"):
        check_tensor_parallel(config, 32, 2, dora=True)
