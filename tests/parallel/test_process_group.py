"""Joining a group, and leaving it. Groups of several processes: test_sharding.py, test_faults.py."""

import pytest
import torch
import torch.distributed as dist

from lumi.config import UserError
from lumi.parallel.layout import ParallelConfig
from lumi.parallel.process_group import process_group


def test_one_process_needs_no_environment_and_leaves_no_group():
    with process_group("cpu") as world:
        assert dist.is_initialized()
        assert (world.size, world.mesh, world.device) == (1, None, torch.device("cpu"))
        assert world.layout == (1, 1, 1)
    assert not dist.is_initialized()


def test_an_error_leaves_no_group_either():
    with pytest.raises(ZeroDivisionError), process_group("cpu"):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_a_layout_that_does_not_fit_is_said_by_the_first_process(monkeypatch):
    three = ParallelConfig(shard=3)
    with pytest.raises(UserError, match="shard 3"), process_group("cpu", three):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left, process_group("cpu", three):
        pass
    assert left.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_must_be_there():
    with (
        pytest.raises(UserError, match='--device must be "cpu" or "auto" on this machine'),
        process_group("cuda"),
    ):
        pass
