import math
from dataclasses import replace

import pytest
import scale_processes

from lumi.model.transformer import ModelConfig
from lumi.parallel.layout import Layout
from lumi.planning.cluster import Cluster
from lumi.planning.scale import optimizer_seconds, step_time

EIGHT = Cluster(nodes=1, gpus_per_node=8)
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
    # An all-reduce by two sends all bytes once, at 1 GB/s; the last of two backwards hides some of it.
    assert slow.communication == pytest.approx(4 * SMALL.num_parameters / 1e9)
    assert slow.exposed == pytest.approx(slow.communication - slow.products / 3)
    sharded = step_time(small(Layout(1, 2, 1)), Layout(1, 2, 1), Cluster(nodes=1, gpus_per_node=2, **fast))
    # What is outside is gathered in both micro-steps and summed once, in bfloat16; half of it is sent.
    outside = 2 * 64 * 32 + 32
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
