import torch

from lumi.batches import BatchConfig
from lumi.lora import LoraConfig
from lumi.model import ModelConfig
from lumi.plan import Frozen, describe_plan, memory_estimate
from lumi.run_config import TrainConfig


def test_memory_by_hand():
    model = ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
    batches = BatchConfig(sequence_length=10, batch_tokens=30, micro_batch_size=3)
    parameters = 2 * 100 * 8 + 2 * (4 * 64 + 3 * 8 * 16 + 16) + 8
    narrow, wide = 4 * 8 + 2 * 4 * 4 + 3 * 16, 6 * 8 + 2 * 4 * 4 + 3 * 16  # values a token in a layer
    per_layer = 2 * narrow + 4 * wide
    adamw = memory_estimate(model, batches, "adamw", 2, False, "cpu")
    assert adamw["weights"] == 4 * parameters + 2 * (parameters - 2 * 100 * 8)
    assert adamw["gradients"] == 4 * parameters
    assert adamw["optimizer"] == 8 * parameters
    assert adamw["activations"] == 30 * 2 * per_layer
    assert adamw["loss"] == (4 + 2 + 2) * 30 * 100 + 8 * 100 * 8
    assert adamw["total"] == sum(value for key, value in adamw.items() if key != "total")
    assert memory_estimate(model, batches, "muon", 2, False, "cpu")["optimizer"] == 4 * (parameters + 2 * 100 * 8)
    assert memory_estimate(model, batches, "adamw", 2, True, "cpu")["activations"] == 30 * (2 * 2 * 8 + per_layer)
    assert memory_estimate(model, batches, "adamw", 4, False, "cpu")["weights"] == 4 * parameters


def test_memory_under_adapters_by_hand():
    model = ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
    batches = BatchConfig(sequence_length=10, batch_tokens=30, micro_batch_size=3)
    whole = memory_estimate(model, batches, "adamw", 2, False, "cpu")
    narrow = memory_estimate(model, batches, "adamw", 2, False, "cpu", frozen=Frozen(50, 2, False))
    assert narrow["weights"] == 2 * model.num_parameters + 4 * 50
    assert (narrow["gradients"], narrow["optimizer"]) == (4 * 50, 8 * 50)
    assert narrow["activations"] == whole["activations"]
    assert narrow["loss"] == whole["loss"] - 8 * 100 * 8  # no gradient of lm_head
    wide = memory_estimate(model, batches, "muon", 2, False, "cpu", frozen=Frozen(50, 4, False))
    assert wide["weights"] == whole["weights"] + 4 * 50
    assert wide["optimizer"] == 4 * 50
    rows = memory_estimate(model, batches, "adamw", 2, False, "cpu", frozen=Frozen(50, 2, True))
    assert rows["loss"] == whole["loss"]
    assert rows["weights"] == narrow["weights"] + 2 * 2 * 100 * 8  # the embedding and lm_head, put together


def test_the_plan_of_adapters_says_what_is_trained():
    config = TrainConfig(
        model=ModelConfig(vocab_size=10, num_layers=1, model_dim=4, num_heads=2, mlp_dim=8, max_positions=16),
        lora=LoraConfig(rank=2),
        batches=BatchConfig(sequence_length=16, batch_tokens=128, micro_batch_size=2),
        num_steps=1000,
    )
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4 + 3 * 4
    lines = describe_plan(config, [("A", 1.0, 32_000)], 0, 1, torch.device("cpu"), "reference", None, 63).splitlines()
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
    assert plan["device"] == "2 x cpu, bfloat16, reference kernels"
    assert plan["tokens"] == f"128,000 ({128_000 / 252:.1f} per parameter)"
    assert plan["steps"] == "1,000 of 128 tokens: 2 processes x 2 micro-steps x 2 rows x 16"
    assert plan["compute"] == f"{flops:.3g} FLOPs, {flops / 1e6 / 3600:.2f} h at peak"
    assert plan["data"] == "A: 75.0% of the rows, 32,000 tokens, 3.00 epochs; B: 25.0% of the rows, 64,000 tokens, 0.50 epochs"
    assert plan["validation"] == "none: no validation split"
