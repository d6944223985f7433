from dataclasses import replace

import torch

from lumi.data.batches import BatchConfig
from lumi.kernels.bundle import TRITON
from lumi.kernels.linear_cross_entropy import workspace_bytes
from lumi.model.lora import LoraConfig
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.training.memory import Frozen, memory_estimate
from lumi.training.plan import describe_plan
from lumi.training.run_config import TrainConfig


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
    assert memory_estimate(model, batches, "muon", 2, False, "cpu")["optimizer"] == 4 * (
        parameters + 2 * 100 * 8
    )
    assert memory_estimate(model, batches, "adamw", 2, True, "cpu")["activations"] == 30 * (
        2 * 2 * 8 + per_layer
    )
    assert memory_estimate(model, batches, "adamw", 4, False, "cpu")["weights"] == 4 * parameters


def test_activations_under_triton_are_what_autograd_keeps():
    model = ModelConfig(vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48)
    batches = BatchConfig(sequence_length=10, batch_tokens=20, micro_batch_size=2)

    def kept(num_layers):
        """Bytes of the tensors that are neither parameters nor shared by all layers."""
        config = replace(model, num_layers=num_layers)
        transformer = Transformer(config, TRITON).init_weights(0)
        storages = {}
        parameters = {p.data_ptr() for p in transformer.parameters()}
        pack = lambda t: (storages.__setitem__(t.data_ptr(), t), t)[
            1
        ]  # kept alive, so that no address comes twice
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            transformer(*torch.zeros(2, 2, 10, dtype=torch.int64))
        return sum(t.nbytes for address, t in storages.items() if address not in parameters)

    estimate = memory_estimate(model, batches, "adamw", 4, False, "cpu", "triton")
    assert estimate["activations"] == (kept(3) - kept(2)) * 3
    assert estimate["loss"] == workspace_bytes(20, 32, 50, torch.float32, torch.float32, device_type="cpu")
    adapters = memory_estimate(model, batches, "adamw", 2, False, "cuda", "triton", Frozen(10, 2, False))
    assert adapters["loss"] == workspace_bytes(
        20, 32, 50, torch.bfloat16, torch.bfloat16, needs_dweight=False
    )


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


def test_memory_of_several_processes_by_hand():
    model = ModelConfig(vocab_size=101, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
    batches = BatchConfig(sequence_length=10, batch_tokens=240, micro_batch_size=3)
    estimate = lambda layout, **settings: memory_estimate(
        model, batches, "adamw", 2, False, "cpu", layout=layout, **settings
    )
    alone = memory_estimate(model, batches, "adamw", 2, False, "cpu")
    ddp = estimate(Layout(2, 1, 1))
    assert ddp == alone | {"buckets": alone["gradients"], "total": alone["total"] + alone["gradients"]}

    matrices, norms = 4 * 8 * 8 + 3 * 8 * 16, 2 * 8  # of a layer
    rows = 51 * 8  # of embedding and of lm_head, on the process that has one more
    held, waiting = 2 * (matrices + norms) // 2 + 2 * rows + 4, 2 * (matrices + norms) + 2 * 101 * 8 + 8
    shard = estimate(Layout(2, 2, 1), reduce_bytes=2)
    assert (shard["weights"], shard["gradients"], shard["optimizer"]) == (4 * held, 4 * held, 8 * held)
    assert shard["whole gradients"] == 2 * waiting  # of two micro-steps
    assert shard["reduced"] == 2 * held
    assert "reduced" not in estimate(Layout(2, 2, 1))
    assert shard["gathered"] == 2 * (2 * (matrices + norms) + 2 * 101 * 8 + 8) + (2 + 2) * (matrices + norms)
    assert (shard["activations"], shard["loss"]) == (alone["activations"], alone["loss"])
    assert "whole gradients" not in estimate(Layout(2, 4, 1))
    assert estimate(Layout(2, 2, 1))["whole gradients"] == 4 * waiting

    tensor = estimate(Layout(1, 1, 2), reduce_bytes=2)
    layer, root = matrices // 2 + norms, 101 * 8 + 8
    assert tensor["weights"] == 4 * (2 * layer + root)
    assert tensor["gathered"] == 2 * (2 * layer + root + 2 * 101 * 8) + (2 + 2) * layer
    narrow, wide = 2 * 8 + (2 * 8 + 2 * 4 * 4 + 3 * 16) // 2, (6 * 8 + 2 * 4 * 4 + 3 * 16) // 2
    assert tensor["activations"] == 30 * 2 * (2 * narrow + 4 * wide)
    assert tensor["loss"] == (4 + 2 + 2) * 15 * 101 + 8 * 101 * 8


def test_adapters_on_several_processes_by_hand():
    model = ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
    batches = BatchConfig(sequence_length=10, batch_tokens=120, micro_batch_size=3)
    layer, root = 4 * 64 + 3 * 8 * 16 + 16, 2 * 100 * 8 + 8
    memory = memory_estimate(
        model,
        batches,
        "adamw",
        2,
        False,
        "cpu",
        frozen=Frozen(51, 2, False),
        layout=Layout(1, 2, 1),
        reduce_bytes=2,
    )
    assert memory["weights"] == 2 * (2 * layer + root) // 2 + 4 * 26
    assert (memory["gradients"], memory["whole gradients"], memory["optimizer"]) == (4 * 26, 2 * 51, 8 * 26)
    assert memory["gathered"] == 2 * (2 * layer + root)


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
    assert (
        plan["data"]
        == "A: 75.0% of the rows, 32,000 tokens, 3.00 epochs; B: 25.0% of the rows, 64,000 tokens, 0.50 epochs"
    )
    assert plan["validation"] == "none: no validation split"
    shared = describe_plan(
        replace(config, parallel=ParallelConfig(tensor=2)), data, 0, 4, torch.device("cpu"), "reference", None
    )
    assert "layout      replicate 2 x shard 1 x tensor 2\n" in shared
    assert "1,000 of 128 tokens: 2 groups x 2 micro-steps x 2 rows x 16\n" in shared
