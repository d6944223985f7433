from dataclasses import replace

import torch

from lumi.data.batches import BatchConfig
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import ParallelConfig
from lumi.training.plan import describe_plan
from lumi.training.run_config import TrainConfig


def test_the_plan_of_adapters_says_what_is_trained():
    config = TrainConfig(
        model=ModelConfig(vocab_size=10, num_layers=1, model_dim=4, num_heads=2, mlp_dim=8, max_positions=16),
        lora=LoraConfig(rank=2),
        batches=BatchConfig(sequence_length=16, batch_tokens=128, micro_batch_size=2),
        num_steps=1000,
    )
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4 + 3 * 4
    lines = describe_plan(
        config, [("A", 1.0, 32_000)], 0, 1, torch.device("cpu"), "reference", None, 63
    ).splitlines()
    assert lines[0].endswith("252 parameters, 1 layers of 4; 63 of adapters are trained (25.00%)")
    assert f"{128_000 * (4 * weights + 6 * 4 * 16):.3g} FLOPs" in "".join(lines)


def test_the_plan_by_hand():
    config = TrainConfig(
        model=ModelConfig(vocab_size=10, num_layers=1, model_dim=4, num_heads=2, mlp_dim=8, max_positions=16),
        batches=BatchConfig(sequence_length=16, batch_tokens=128, micro_batch_size=2),
        num_steps=1000,
    )
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4 + 3 * 4
    flops = 128_000 * (6 * weights + 6 * 4 * 16)
    data = [("A", 0.75, 32_000), ("B", 0.25, 64_000)]
    lines = describe_plan(config, data, 0, 2, torch.device("cpu"), "reference", peak_flops=1e6).splitlines()
    plan = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert plan["model"] == "252 parameters, 1 layers of 4"
    assert plan["layout"] == "replicate 2 x shard 1 x tensor 1"
    assert plan["device"] == "2 x cpu, bfloat16, reference kernels"
    assert plan["tokens"] == f"128,000 ({128_000 / 252:.1f} per parameter)"
    assert plan["steps"] == "1,000 of 128 tokens: 2 processes x 2 micro-steps x 2 rows x 16"
    assert plan["compute"] == f"{flops:.3g} FLOPs, {flops / 1e6 / 3600:.2f} h at peak"
    folders = [
        "A: 75.0% of the rows, 32,000 tokens, 3.00 epochs",
        "B: 25.0% of the rows, 64,000 tokens, 0.50 epochs",
    ]
    assert plan["data"] == "; ".join(folders)
    assert plan["validation"] == "none: no validation split"
    shared = describe_plan(
        replace(config, parallel=ParallelConfig(tensor=2)), data, 0, 4, torch.device("cpu"), "reference", None
    )
    assert "layout      replicate 2 x shard 1 x tensor 2\n" in shared
    assert "1,000 of 128 tokens: 2 groups x 2 micro-steps x 2 rows x 16\n" in shared
