"""Formulas of `lumi plan` against two processes that train and against counts by hand."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scale_processes

import lumi.configs
from lumi.config import UserError, load_config
from lumi.data.batches import BatchConfig
from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.planning.scale import (
    Cluster,
    checkpoint_bytes,
    collectives,
    matrices_of_layers,
    optimizer_seconds,
    step_time,
)
from lumi.planning.scale_report import describe_scale, what_fits
from lumi.training.memory import memory_estimate, memory_of, parameters_held
from lumi.training.run_config import TrainConfig

FOLDER = Path(lumi.configs.__file__).parent / "pretrain"
EIGHT = Cluster(nodes=1, gpus_per_node=8)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two processes held and sent in every case of `scale_processes`."""
    folder = tmp_path_factory.mktemp("measured")
    program = [sys.executable, scale_processes.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(folder / "rendezvous"), str(folder / "out.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", scale_processes.CASES)
def test_processes_hold_what_is_estimated(name, measured):
    config, held = scale_processes.CASES[name], measured[name]["held"]
    layout = config.parallel.layout(2)
    estimate = memory_of(config, layout, "cpu", "reference")
    norms = 0
    if config.optimizer.kind == "muon":  # of norms the estimate leaves out one state
        matrices = sum(
            rows * columns * count for (rows, columns), count in matrices_of_layers(config.model).items()
        )
        norms = (
            4
            * (config.model.num_parameters - matrices - 2 * config.model.vocab_size * config.model.model_dim)
            // layout.shard
        )
    assert estimate["weights"] == held["weights"]
    assert estimate["gradients"] == held["gradients"]
    assert estimate["optimizer"] + norms == held["optimizer"]
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
    batches = BatchConfig(sequence_length=10, batch_tokens=40, micro_batch_size=2)
    estimate = memory_estimate(
        scale_processes.FOR_TRITON, batches, "adamw", 4, False, "cpu", "triton", layout=layout
    )
    assert estimate["activations"] == 3 * measured["a layer's activations"][side]


@pytest.mark.parametrize(("name", "nodes"), [("1b", 1), ("8b", 1), ("8b", 2), ("70b", 16), ("70b", 32)])
def test_the_large_configs_fit_where_they_say(name, nodes):
    config = load_config(TrainConfig, FOLDER / f"{name}.json")
    report = describe_scale(config, replace(EIGHT, nodes=nodes), name)
    assert "\n  FITS in 90% of 80 = 72.0 GiB" in report
    assert "SAVES WAIT" not in report


def test_shards_of_8b_by_hand():
    model = load_config(TrainConfig, FOLDER / "8b.json").model
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    assert parameters_held(model) == (layer, 2 * 128256 * 4096 + 4096)
    assert parameters_held(model, 8) == (layer // 8, (2 * 128256 * 4096 + 4096) // 8)
    assert parameters_held(model, 8, 2) == ((layer - 8192) // 16 + 1024, 2 * 128256 * 4096 // 16 + 512)
    config = replace(load_config(TrainConfig, FOLDER / "8b.json"), gradient_checkpointing=False)
    total = 8_030_261_248
    assert (
        memory_of(config, Layout(1, 8, 1), "cuda", "triton")["optimizer"] == total
    )  # 8 bytes each, in 8 parts
    sent = {call.name: call.sent_bytes(Layout(2, 8, 1)) for call in collectives(config, Layout(2, 8, 1))}
    assert sent["layers' weights, forward"] == pytest.approx(
        16 * 2 * 32 * layer * 7 / 8
    )  # 16 micro-steps, bfloat16
    assert sent["layers' gradients"] == pytest.approx(2 * 32 * layer * 7 / 8)
    assert sent["shards of gradients, layers"] == pytest.approx(2 * 2 * 32 * layer / 8 / 2)


def test_where_groups_lie():
    cluster = Cluster(nodes=4, gpus_per_node=8, nvlink_gbps=3200, network_gbps=400, link_share=0.5)
    nvlink, card = 0.5 * 400e9, 0.5 * 50e9
    assert cluster.bandwidth(Layout(4, 8, 1), "shard") == (nvlink, False)
    assert cluster.bandwidth(Layout(4, 8, 1), "replicate") == (card, True)
    assert cluster.bandwidth(Layout(1, 32, 1), "shard") == (
        8 * card,
        True,
    )  # all cards of a node work for the ring
    assert cluster.bandwidth(Layout(1, 16, 2), "shard") == (4 * card, True)
    assert cluster.bandwidth(Layout(1, 4, 8), "tensor") == (nvlink, False)
    assert cluster.bandwidth(Layout(1, 4, 8), "shard") == (card, True)
    assert cluster.bandwidth(Layout(1, 2, 16), "tensor") == (8 * card, True)
    assert replace(cluster, nvlink_gbps=1600).bandwidth(Layout(1, 32, 1), "shard") == (
        nvlink / 2,
        True,
    )  # NVLink is the narrower
    assert Cluster(nodes=1, gpus_per_node=6).bandwidth(Layout(2, 3, 1), "replicate") == (0.8 * 450e9, False)


SMALL = ModelConfig(vocab_size=64, num_layers=2, model_dim=32, num_heads=4, mlp_dim=64, max_positions=16)


def small(layout, *, rows=8, **settings):
    config = scale_processes.case(SMALL, layout, rows=rows)
    return replace(config, **settings)


def test_the_time_of_a_step_by_hand():
    fast = {"nvlink_gbps": 1e9, "network_gbps": 1e9}
    alone = step_time(small(Layout(1, 1, 1)), Layout(1, 1, 1), Cluster(nodes=1, gpus_per_node=1, mfu=0.5))
    weights = SMALL.num_parameters - 64 * 32
    assert alone.products == pytest.approx(64 * (6 * weights + 6 * 2 * 32 * 8) / (0.5 * 989e12))
    assert alone.optimizer == pytest.approx(28 * SMALL.num_parameters / 3.35e12)
    assert (alone.recomputation, alone.communication, alone.exposed) == (0, 0, 0)
    assert alone.total == alone.products + alone.optimizer
    checkpointed = step_time(
        small(Layout(1, 1, 1), gradient_checkpointing=True),
        Layout(1, 1, 1),
        Cluster(nodes=1, gpus_per_node=1),
    )
    layers = weights - 64 * 32 - 32
    assert checkpointed.recomputation / checkpointed.products == pytest.approx(
        (2 * layers + 1024) / (6 * weights + 3072)
    )
    hidden = step_time(small(Layout(2, 1, 1)), Layout(2, 1, 1), Cluster(nodes=2, gpus_per_node=1, **fast))
    assert hidden.communication > 0
    assert hidden.exposed == 0  # DDP's sums end before backward does
    slow = step_time(
        small(Layout(2, 1, 1), dtype="float32"),
        Layout(2, 1, 1),
        Cluster(nodes=2, gpus_per_node=1, network_gbps=8, link_share=1),
    )
    assert slow.communication == pytest.approx(
        4 * SMALL.num_parameters / 1e9
    )  # an all-reduce by two sends all bytes once, at 1 GB/s
    assert slow.exposed == pytest.approx(
        slow.communication - slow.products / 3
    )  # the last of two micro-steps' backward hides as much
    sharded = step_time(small(Layout(1, 2, 1)), Layout(1, 2, 1), Cluster(nodes=1, gpus_per_node=2, **fast))
    outside = (
        2 * 64 * 32 + 32
    )  # gathered in both micro-steps and summed once, in bfloat16; half of it is sent
    assert sharded.exposed == pytest.approx(3 * outside / (0.8 * 1e18 / 8))


def test_the_time_of_muon_by_hand():
    config = small(Layout(1, 1, 1), optimizer=replace(small(Layout(1, 1, 1)).optimizer, kind="muon"))
    turn = 4 * (4 * 32**2 * 32 + 2 * 32**3) + 3 * (4 * 32**2 * 64 + 2 * 32**3)
    whole = 2 * 5 * turn / EIGHT.flops
    assert optimizer_seconds(config, Layout(8, 1, 1), EIGHT) == pytest.approx(
        whole + 28 * (2 * 64 * 32 + 32) / 3.35e12
    )
    rounds = math.ceil(2 * 7 / 8)  # eight processes share the 14 matrices
    assert optimizer_seconds(config, Layout(1, 8, 1), EIGHT) == pytest.approx(
        rounds / 14 * whole + 28 * (2 * 64 * 32 + 32) / 8 / 3.35e12
    )


def test_what_does_not_fit_says_what_would():
    config = replace(load_config(TrainConfig, FOLDER / "8b.json"), gradient_checkpointing=False)
    report = describe_scale(config, EIGHT, "8b")
    assert "DOES NOT FIT in 90% of 80 = 72.0 GiB with gradient_checkpointing = false" in report
    advice = what_fits(config, EIGHT)
    assert any("gradient_checkpointing=true" in line for line in advice)
    for line in advice:
        overrides = line.removeprefix("would fit: ").partition(" (")[0].split()
        mended = load_config(TrainConfig, FOLDER / "8b.json", ["gradient_checkpointing=false", *overrides])
        assert "\n  FITS" in describe_scale(mended, EIGHT, "8b")
    large = replace(load_config(TrainConfig, FOLDER / "70b.json"), parallel=ParallelConfig(shard=8))
    assert what_fits(large, EIGHT)[0].startswith("on ")


def test_auto_takes_the_largest_micro_batch_that_fits():
    config = load_config(TrainConfig, FOLDER / "8b.json", ["batches.micro_batch_size=auto"])
    line = next(line for line in describe_scale(config, EIGHT, "8b").splitlines() if "micro-steps" in line)
    rows = int(line.partition("micro-steps x ")[2].split()[0])
    assert rows in (4, 8, 16)
    for size, fits in ((rows, True), (2 * rows, False)):
        fixed = replace(config, batches=replace(config.batches, micro_batch_size=size))
        assert (memory_of(fixed, Layout(1, 8, 1), "cuda", "triton")["total"] <= 72 * 2**30) == fits


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (["model=null"], 1, "--config must be one of pre-training"),
        (
            ["parallel.replicate=3"],
            1,
            "parallel: replicate 3 x shard 8 x tensor 1 = 24 must be the 8 processes",
        ),
        (
            ["parallel.shard=1", "parallel.tensor=16"],
            2,
            "parallel.tensor must divide model.num_kv_heads = 8, got 16",
        ),
        (
            ["batches.batch_tokens=81920"],
            1,
            "batches.batch_tokens must be a multiple of .* = 8192 x 2 x 8, got 81920",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, nodes, message):
    config = load_config(TrainConfig, FOLDER / "8b.json", overrides)
    with pytest.raises(UserError, match=message):
        describe_scale(config, replace(EIGHT, nodes=nodes), "8b")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gpu": "H1000"}, "gpu must be one of A100, .* got 'H1000'"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"mfu": 1.5}, "mfu must be above 0 and at most 1, got 1.5"),
        ({"network_gbps": float("nan")}, "network_gbps must be positive, got nan"),
    ],
)
def test_clusters_that_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(EIGHT, **setting)
