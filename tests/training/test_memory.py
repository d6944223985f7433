from dataclasses import replace

import pytest
import torch

from lumi.data.batches import BatchConfig
from lumi.kernels.bundle import NATIVE, TRITON
from lumi.kernels.linear_cross_entropy import native_workspace_bytes, workspace_bytes
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout
from lumi.training.memory import Frozen, MemoryEstimate

MODEL = ModelConfig(vocab_size=100, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
BATCHES = BatchConfig(sequence_length=10, batch_tokens=30, micro_batch_size=3)


def estimate(model=MODEL, batches=BATCHES, optimizer="adamw", compute_bytes=2, device_type="cpu", **settings):
    settings |= {"optimizer": optimizer, "compute_bytes": compute_bytes, "device_type": device_type}
    return MemoryEstimate(model=model, batches=batches, **settings).by_part()


def test_memory_by_hand():
    parameters = 2 * 100 * 8 + 2 * (4 * 64 + 3 * 8 * 16 + 16) + 8
    narrow, wide = 4 * 8 + 2 * 4 * 4 + 3 * 16, 6 * 8 + 2 * 4 * 4 + 3 * 16  # values a token in a layer
    per_layer = 2 * narrow + 4 * wide
    adamw = estimate()
    assert adamw["weights"] == 4 * parameters + 2 * (parameters - 100 * 8)  # a copy of all but the embedding
    assert adamw["gradients"] == 4 * parameters
    assert adamw["optimizer"] == 8 * parameters
    assert adamw["activations"] == 30 * 2 * per_layer
    assert adamw["loss"] == (4 + 2 + 2) * 30 * 100 + 8 * 100 * 8
    assert adamw["total"] == sum(value for key, value in adamw.items() if key != "total")
    assert estimate(optimizer="muon")["optimizer"] == 4 * (parameters + 2 * 100 * 8 + 2 * 16 + 8)
    rows = (
        estimate(optimizer="muon", has_row_means=True)["optimizer"] - estimate(optimizer="muon")["optimizer"]
    )
    assert rows == 4 * 2 * (4 * 8 + 2 * 16 + 8)
    averaged = estimate(has_average=True)
    assert averaged == adamw | {"average": 4 * parameters, "total": adamw["total"] + 4 * parameters}
    assert estimate(checkpointing=True)["activations"] == 30 * (2 * 2 * 8 + per_layer)
    assert estimate(compute_bytes=4)["weights"] == 4 * parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True}, {"window": 4}, {"no_rope_layer_interval": 1}],
    ids=["plain", "biases", "window", "no rope"],
)
@pytest.mark.parametrize(
    ("ops", "dtype"),
    [(TRITON, torch.float32), (NATIVE, torch.float32), (NATIVE, torch.bfloat16)],
    ids=["triton", "native", "native bfloat16"],
)
@pytest.mark.parametrize("joined", [True, False], ids=["joined", "plain"])
def test_activations_under_kernels_are_what_autograd_keeps(ops, dtype, joined, changes):
    if dtype == torch.bfloat16 and not joined:
        pytest.skip("no run trains so: each use casts the masters")
    model = ModelConfig(
        vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, **changes
    )
    # 128 tokens, the multiple that attention's statistics are padded to.
    batches = BatchConfig(sequence_length=64, batch_tokens=128, micro_batch_size=2)

    def kept(num_layers):
        """Bytes that backward keeps, without the weights and their copies."""
        config = replace(model, num_layers=num_layers)
        transformer = Transformer(config, ops, compute_dtype=dtype).init_weights(0)
        if joined:
            transformer.join_weights()
        storages = {}
        place = lambda tensor: tensor.untyped_storage().data_ptr()
        weights = {place(p) for p in transformer.parameters()}
        if joined:
            weights |= {place(copy.rows) for copy in transformer.compute_weights.copies().values()}

        def pack(tensor):
            storages[place(tensor)] = tensor  # kept alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            transformer(*torch.zeros(2, 2, 64, dtype=torch.int64))
        kept = (t.untyped_storage().nbytes() for address, t in storages.items() if address not in weights)
        return sum(kept)

    whole = estimate(model, batches, compute_bytes=dtype.itemsize, kernels=ops.name)
    assert whole["activations"] == (kept(3) - kept(2)) * 3
    if ops is NATIVE:
        assert whole["loss"] == native_workspace_bytes(128, 32, 50, dtype, has_copy=True)
        return
    assert whole["loss"] == workspace_bytes(128, 32, 50, torch.float32, torch.float32, device_type="cpu")
    frozen = Frozen(10, 2, False)
    adapters = estimate(model, batches, device_type="cuda", kernels="triton", frozen=frozen)
    assert adapters["loss"] == workspace_bytes(128, 32, 50, *[torch.bfloat16] * 2, needs_dweight=False)


def test_memory_under_adapters_by_hand():
    whole, narrow = estimate(), estimate(frozen=Frozen(50, 2, False))
    assert narrow["weights"] == 2 * MODEL.num_parameters + 4 * 50
    assert (narrow["gradients"], narrow["optimizer"]) == (4 * 50, 8 * 50)
    assert narrow["activations"] == whole["activations"]
    assert narrow["loss"] == whole["loss"] - 8 * 100 * 8  # no gradient of lm_head
    wide = estimate(optimizer="muon", frozen=Frozen(50, 4, False))
    assert wide["weights"] == whole["weights"] + 4 * 50 - 2 * 100 * 8  # no copy of lm_head
    assert wide["optimizer"] == 4 * 50
    rows = estimate(frozen=Frozen(50, 2, True))
    assert rows["loss"] == whole["loss"]
    assert rows["weights"] == narrow["weights"] + 2 * 2 * 100 * 8  # the embedding and lm_head, put together


def test_memory_of_several_processes_by_hand():
    model = ModelConfig(vocab_size=101, num_layers=2, model_dim=8, num_heads=2, mlp_dim=16)
    batches = BatchConfig(sequence_length=10, batch_tokens=240, micro_batch_size=3)
    shared = lambda *layout, **settings: estimate(model, batches, layout=Layout(*layout), **settings)
    alone, ddp = estimate(model, batches), shared(2, 1, 1)
    assert ddp == alone | {"buckets": alone["gradients"], "total": alone["total"] + alone["gradients"]}

    matrices, norms = 4 * 8 * 8 + 3 * 8 * 16, 2 * 8  # of a layer
    rows = 51 * 8  # of embedding and of lm_head, on the process that has one more
    held, waiting = 2 * (matrices + norms) // 2 + 2 * rows + 4, 2 * (matrices + norms) + 2 * 101 * 8 + 8
    shard = shared(2, 2, 1, reduce_bytes=2)
    assert (shard["weights"], shard["gradients"], shard["optimizer"]) == (4 * held, 4 * held, 8 * held)
    assert shard["whole gradients"] == 2 * waiting  # of two micro-steps
    assert shard["reduced"] == 2 * held
    assert "reduced" not in shared(2, 2, 1)
    assert shard["gathered"] == 2 * (2 * (matrices + norms) + 2 * 101 * 8 + 8) + (2 + 2) * (matrices + norms)
    assert (shard["activations"], shard["loss"]) == (alone["activations"], alone["loss"])
    assert "whole gradients" not in shared(2, 4, 1)
    assert shared(2, 2, 1)["whole gradients"] == 4 * waiting

    tensor = shared(1, 1, 2, reduce_bytes=2)
    layer, root = matrices // 2 + norms, 101 * 8 + 8
    assert tensor["weights"] == 4 * (2 * layer + root)
    assert tensor["gathered"] == 2 * (2 * layer + root + 2 * 101 * 8) + (2 + 2) * layer
    narrow, wide = 2 * 8 + (2 * 8 + 2 * 4 * 4 + 3 * 16) // 2, (6 * 8 + 2 * 4 * 4 + 3 * 16) // 2
    assert tensor["activations"] == 30 * 2 * (2 * narrow + 4 * wide)
    assert tensor["loss"] == (4 + 2 + 2) * 15 * 101 + 8 * 101 * 8


def test_adapters_on_several_processes_by_hand():
    batches = BatchConfig(sequence_length=10, batch_tokens=120, micro_batch_size=3)
    layer, root = 4 * 64 + 3 * 8 * 16 + 16, 2 * 100 * 8 + 8
    frozen, layout = Frozen(51, 2, False), Layout(1, 2, 1)
    memory = estimate(batches=batches, frozen=frozen, layout=layout, reduce_bytes=2)
    assert memory["weights"] == 2 * (2 * layer + root) // 2 + 4 * 26
    assert (memory["gradients"], memory["whole gradients"], memory["optimizer"]) == (4 * 26, 2 * 51, 8 * 26)
    assert memory["gathered"] == 2 * (2 * layer + root)
