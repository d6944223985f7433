"""What processes hold and send: estimates against two processes that train, and against counts by hand."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import scale_processes
from case_server import run_case

import lumi.configs
from lumi.config import load_config
from lumi.data.batches import BatchConfig
from lumi.parallel.layout import Layout
from lumi.planning.communication import collectives
from lumi.planning.scale import checkpoint_bytes
from lumi.training.memory import MemoryEstimate, memory_of, parameters_held
from lumi.training.run_config import TrainConfig

FOLDER = Path(lumi.configs.__file__).parent / "pretrain"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two processes held and sent in every case of `scale_processes`."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    folder = tmp_path_factory.mktemp("measured")
    run_case("scale_processes", folder, log=folder / "log")
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize("name", scale_processes.CASES)
def test_processes_hold_what_is_estimated(name, measured):
    config, held = scale_processes.CASES[name], measured[name]["held"]
    layout = config.parallel.layout(2)
    estimate = memory_of(config, layout, "cpu", "reference")
    assert estimate["weights"] == held["weights"]
    assert estimate["gradients"] == held["gradients"]
    assert estimate["optimizer"] == held["optimizer"]
    assert checkpoint_bytes(config) == held["checkpoint"]
    waiting = held["whole gradients"]
    assert estimate.get("whole gradients", 0) == waiting
    assert (waiting > 0) == (config.batches.micro_steps(layout.data) > 1 and layout.replicate == 1)
    assert ("buckets" in estimate) == ("gathered" not in estimate) == (name == "ddp")


@pytest.mark.parametrize("name", scale_processes.CASES)
def test_processes_say_what_is_estimated(name, measured):
    config = scale_processes.CASES[name]
    estimated = {}
    for call in collectives(config, config.parallel.layout(2)):
        calls, num_bytes = estimated.get(call.kind, (0, 0))
        estimated[call.kind] = [calls + call.calls, num_bytes + call.num_bytes]
    assert estimated == measured[name]["collectives"]


@pytest.mark.parametrize("side", ["shard", "tensor"])
def test_backward_finds_what_is_estimated(side, measured):
    layout = Layout(1, 1, 1)._replace(**{side: 2})
    # Micro-batches of 128 tokens, the multiple that attention's statistics are padded to.
    batches = BatchConfig(sequence_length=64, batch_tokens=256, micro_batch_size=2)
    estimate = MemoryEstimate(
        model=scale_processes.FOR_TRITON,
        batches=batches,
        optimizer="adamw",
        compute_bytes=4,
        device_type="cpu",
        kernels="triton",
        layout=layout,
    ).by_part()
    assert estimate["activations"] == 3 * measured["a layer's activations"][side]


def test_shards_of_8b_by_hand():
    model = load_config(TrainConfig, FOLDER / "8b.json").model
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    assert parameters_held(model) == (layer, 2 * 128256 * 4096 + 4096)
    assert parameters_held(model, 8) == (layer // 8, (2 * 128256 * 4096 + 4096) // 8)
    assert parameters_held(model, 8, 2) == ((layer - 8192) // 16 + 1024, 2 * 128256 * 4096 // 16 + 512)
    config = replace(load_config(TrainConfig, FOLDER / "8b.json"), gradient_checkpointing=False)
    memory = memory_of(config, Layout(1, 8, 1), "cuda", "triton")
    assert memory["optimizer"] == 8_030_261_248  # 8 bytes each, in 8 parts
    sent = {call.name: call.sent_bytes(Layout(2, 8, 1)) for call in collectives(config, Layout(2, 8, 1))}
    # 16 micro-steps, in bfloat16.
    assert sent["layers' weights, forward"] == pytest.approx(16 * 2 * 32 * layer * 7 / 8)
    assert sent["layers' gradients"] == pytest.approx(2 * 32 * layer * 7 / 8)
    assert sent["shards of gradients, layers"] == pytest.approx(2 * 2 * 32 * layer / 8 / 2)
