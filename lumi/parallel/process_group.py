"""Joining torch's process group: NCCL on CUDA, gloo on the CPU, and the mesh over it."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lumi.config import UserError
from lumi.host.devices import choose_device
from lumi.host.interruption import StopSignal
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.parallel.rendezvous import fresh_store
from lumi.parallel.world import World


@contextlib.contextmanager
def process_group(
    device: str = "auto",
    parallel: ParallelConfig | None = None,
    stop: StopSignal | None = None,
    timeout_seconds: float = 600.0,
) -> Iterator[World]:
    """Join the group that torchrun describes in the environment, or make a group of one; leave it at the end.

    Args:
        device: "cpu", "cuda", "mps", or "auto": CUDA where there is one.
        parallel: how the processes share the work; None: each has the whole model.
        stop: knows of signals; None: nothing does.
        timeout_seconds: how long processes may wait for each other in a step. The groups' own limit is well
            above it: `lumi.parallel.watchdog`, which knows who is late, speaks first.

    Raises:
        UserError: CUDA is asked for and absent, a node starts more processes than it has GPUs, or `parallel`
            does not fit their number.
    """
    device = choose_device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device)
    if gpus is not None and local_rank >= gpus:
        raise UserError(f"torchrun --nproc-per-node must be at most {gpus} (GPUs here), got {local_rank + 1}")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend, limit = "nccl" if device == "cuda" else "gloo", timedelta(seconds=2 * timeout_seconds + 60)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        layout = (parallel or ParallelConfig()).layout(size)
    except UserError as error:
        if rank:
            raise SystemExit(2) from error  # one message is enough
        raise
    store = fresh_store() if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        patient, saving = (dist.new_group(backend="gloo", timeout=timedelta(days=7)) for _ in range(2))
        mesh = _mesh(device, backend, layout, limit) if size > 1 else None
        place = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        yield World(rank, size, place, patient, saving, stop or StopSignal(), layout, mesh)
    finally:
        dist.destroy_process_group()


def _mesh(device: str, backend: str, layout: Layout, limit: timedelta) -> DeviceMesh:
    """The mesh.

    Its groups get the run's time limit: they do not inherit it from the group of all processes.
    """
    override: dict[int | str, Any] = {}
    for side in Layout._fields:  # one for each: torch writes the group's name and members into it
        group: Any = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
        options = group.Options() if backend == "nccl" else group._Options()
        options._timeout = limit
        override[side] = backend, options
    return init_device_mesh(device, layout, mesh_dim_names=Layout._fields, backend_override=override)
