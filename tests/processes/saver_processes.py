"""What test_saver.py and test_tensor_pieces.py run in processes of its own; `case_server.py` starts them.

Every process of a case is a fork, and they talk over gloo.
"""

import contextlib
import functools
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # FSDP2 imports it when it is first used: here once, before the forks
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint
from lumi.checkpoint.saver import Saver
from lumi.config import UserError, write_json
from lumi.host.storage import sweep_temporaries
from lumi.parallel.tensor_pieces import own_pieces, piece

DEADLINE_SECONDS = 120
SHAPES = {"even": (12, 8), "uneven": (7, 3), "few": (2, 5), "vector": (5,), "narrow": (10, 4)}
LAYOUTS = {
    "one": (1, 1, 1),
    "ddp": (4, 1, 1),
    "fsdp": (1, 4, 1),
    "hsdp": (2, 2, 1),
    "fsdp x tp": (1, 2, 2),
    "hsdp x tp": (2, 1, 2),
}
TENSOR_DIMS = {"even": 0, "uneven": 0, "narrow": 1}  # which dimension tensor parallelism cuts


def whole(scale=1.0):
    """The truth: every tensor by group and name, in one piece."""
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
    model["narrow"] = model["narrow"].to(torch.bfloat16)
    optimizer = {f"{name}/exp_avg": tensor * 3 for name, tensor in model.items()}
    rest = {"step": torch.tensor(7.0), "count": torch.arange(2**40, 2**40 + 3), "empty": torch.zeros(0, 4)}
    return {"model": model, "optimizer": optimizer | rest}


@functools.cache
def mesh_of(sides):
    return init_device_mesh("cpu", sides, mesh_dim_names=("replicate", "shard", "tensor"))


def parallel(tensors, layout):
    """The same tensors as a run of that layout holds them: FSDP2's parameters and optimizer states."""
    replicate, shard, tensor = LAYOUTS[layout]
    if shard == tensor == 1:
        return tensors
    mesh = mesh_of(LAYOUTS[layout])
    module = nn.Module()
    for name, value in tensors["model"].items():
        if tensor > 1:
            placement = Shard(TENSOR_DIMS[name]) if name in TENSOR_DIMS else Replicate()
            value = distribute_tensor(value, mesh["tensor"], [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(value))
    fully_shard(module, mesh=mesh["replicate", "shard"] if replicate > 1 else mesh["shard"])
    model = dict(module.named_parameters())
    optimizer = {f"{name}/exp_avg": parameter.detach() * 3 for name, parameter in model.items()}
    return {"model": model, "optimizer": tensors["optimizer"] | optimizer}


def fork(size, work, *arguments):
    """Run `work(rank, size, *arguments)` in `size` forks of this process.

    Returns:
        their exit codes: what `work` returned, below 0 where a signal ended one.
    """
    sys.stdout.flush()
    processes = []
    for rank in range(size):
        if (process := os.fork()) == 0:
            signal.alarm(DEADLINE_SECONDS)  # nobody is left over
            end_with(lambda rank=rank: work(rank, size, *arguments))
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def end_with(work):
    """Do something and end this process, without Python's clean-up, which costs more than most of this."""
    code = 1
    try:
        code = work() or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def served_store():
    """A store in this process, where its forks meet, as torchrun serves one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield server


@contextlib.contextmanager
def joined(rank, size, folder):
    """The process group of a case, and the group of its saver."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    yield dist.new_group(backend="gloo", timeout=timedelta(seconds=DEADLINE_SECONDS))
    dist.destroy_process_group()


def save_under_every_layout(rank, size, folder):
    with joined(rank, size, folder) as group, Saver(folder / "checkpoints", rank, size, group) as saver:
        for step, layout in enumerate(LAYOUTS):
            if layout != "one":
                saver.begin(step, parallel(whole(), layout), {"layout": layout})
        saver.wait()
        dist.barrier()
        read_under_every_layout(folder, [layout for layout in LAYOUTS if layout != "one"])


def read_under_two(rank, size, folder):
    LAYOUTS.update({"fsdp": (1, 2, 1), "tp": (1, 1, 2)})
    with joined(rank, size, folder):
        read_under_every_layout(folder, ["fsdp", "tp"])


def read_under_every_layout(folder, layouts):
    """Under whatever layout a checkpoint was saved, every process gets exactly its part of the truth."""
    for path in list_checkpoints(folder / "checkpoints"):
        checkpoint = open_checkpoint(path)
        for layout in layouts:
            expected, got = parallel(whole(), layout), parallel(whole(0.0), layout)
            for tensor in got["optimizer"].values():
                tensor.zero_()
            for group in got:
                checkpoint.fill(group, got[group])
                for name, tensor in got[group].items():
                    assert torch.equal(piece(tensor).local, piece(expected[group][name]).local), (
                        path,
                        layout,
                        name,
                    )


def fail_on_one(rank, size, folder):
    """A file cannot be written: on either process, before or after the pieces. Then a process goes away."""
    checkpoints = folder / "checkpoints"
    tensors = {"model": {name: torch.full((3000,), float(index)) for index, name in enumerate("abcd")}}
    few = {
        "model": {
            f"a long name, so that tensors.json is larger than its tensor: {index}": torch.ones(1)
            for index in range(40)
        }
    }
    with joined(rank, size, folder) as group:
        saver = Saver(checkpoints, rank, size, group)
        saver.begin(1, tensors, {"good": True})
        saver.wait()
        faults = {
            0: (tensors, r"rank 0: File too large"),
            1: (tensors, r"rank 1: File too large"),
            "json": (few, r"rank 0: File too large"),
        }
        for where, (unsaved, reason) in faults.items():
            with at_most_bytes(8000 if rank == where or (rank == 0 and where == "json") else None):
                saver.begin(2, unsaved, {})
                while not saver.failed:
                    time.sleep(0.001)
                with pytest.raises(
                    UserError,
                    match=rf"step-00000002: cannot be written: {reason}; earlier checkpoints are intact",
                ):
                    saver.wait()
            assert not saver.failed
            dist.barrier()
            assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001"]
            dist.barrier()  # before there is the next one's folder
        fail_to_finish(saver, rank, tensors)
        saver.begin(4, tensors, {})  # and goes on
        saver.wait()
        open_checkpoint(checkpoints / "step-00000004").verify()
        dist.barrier()
        if rank == 1:
            os._exit(0)
        saver.begin(5, tensors, {})
        with pytest.raises(RuntimeError):
            saver.close()
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            "step-00000001",
            "step-00000003",
            "step-00000004",
        ]
        os._exit(0)  # the process group has lost a member


def fail_to_finish(saver, rank, tensors):
    """`finish` fails when the checkpoint is complete: by an error of the disk, or by a bug."""

    def cannot_prune(path):
        raise PermissionError(13, "Permission denied")

    def mistake(path):
        raise ZeroDivisionError("a mistake")

    saver.begin(3, tensors, {}, cannot_prune)
    failure = "step-00000003: was saved, but not what follows: rank 0: Permission denied"
    with pytest.raises(UserError, match=f"{failure}; the checkpoint is whole, resume from it"):
        saver.wait()
    saver.begin(3, tensors, {}, mistake)
    with pytest.raises(
        ZeroDivisionError if rank == 0 else UserError,
        match="a mistake" if rank == 0 else "rank 0: an unexpected error",
    ):
        saver.wait()


@contextlib.contextmanager
def at_most_bytes(limit):
    """No file of this process may grow larger: writing more fails as on a full disk."""
    import resource  # which Windows has not

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, before if limit is None else (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_for_ever(rank, size, folder, reports):
    with Saver(folder) as saver:
        for number in range(1, 1_000_000):
            tensors = {name: {"w": torch.full((100_000,), float(number))} for name in ("model", "optimizer")}
            saver.begin(
                number % 3, tensors, {"number": number}, lambda path, number=number: report(reports, number)
            )


def report(reports, number):
    os.write(reports, b"%d\n" % number)


def kill_at_random_moments(folder, times):
    """Every checkpoint is whole, the last reported one among them, before and after a sweep."""
    moments = random.Random(0)
    for attempt in range(times):
        place = folder / str(attempt)
        receiving, sending = os.pipe()
        process = os.fork()
        if process == 0:
            signal.alarm(DEADLINE_SECONDS)
            save_for_ever(0, 1, place, sending)
        os.close(sending)
        with os.fdopen(receiving) as reports:
            number = int(reports.readline())
            time.sleep(moments.uniform(0, 0.02))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            number = max([number, *map(int, reports.read().split())])
        check_whole(place, number)
        sweep_temporaries(place)
        assert all(path.name.startswith("step-") for path in place.iterdir())
        check_whole(place, number)


def check_whole(folder, reported):
    found = [open_checkpoint(path) for path in list_checkpoints(folder)]
    assert max(checkpoint.state["number"] for checkpoint in found) >= reported
    for checkpoint in found:
        checkpoint.verify()
        for group in ("model", "optimizer"):
            assert (checkpoint.read(group, "w") == checkpoint.state["number"]).all()


def end_while_saving(rank, size, folder, limit):
    """A program that ends without waiting for its save; `limit`: bytes that a file may have, or None."""
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    Saver(folder).begin(1, {"model": {"w": torch.ones(5_000_000)}}, {})
    sys.exit()


def cut_among_eight(rank, size, folder, layout):
    """What one of eight processes holds and writes; the others are absent, in a group that sends nothing."""
    LAYOUTS.update({"eight": layout})
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    truth, tensors = whole(), parallel(whole(), "eight")
    flat = {f"{group}/{name}": tensor for group in tensors for name, tensor in tensors[group].items()}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        local, offset, shape = piece(tensor)
        box = tuple(slice(start, start + length) for start, length in zip(offset, local.shape, strict=True))
        assert shape == truth[group][name].shape
        assert torch.equal(local, truth[group][name][box]), (key, tensor.placements)
    own = own_pieces(flat, rank, size)
    boxes = {key: [own[key].offset, list(own[key].local.shape)] for key in own}
    write_json(folder / f"{'x'.join(map(str, layout))}-{rank}.json", boxes)


def refuse(rank, size, folder):
    """What cannot be saved."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    mesh = mesh_of((2, 2, 2))
    two = mesh["shard", "tensor"]
    strided = _StridedShard(0, split_factor=2)
    cases = {
        "must be sharded or replicated": DTensor.from_local(torch.ones(4), two, [Partial(), Replicate()]),
        "must be boxes": DTensor.from_local(torch.ones(4), two, [strided, Replicate()]),
        "the parts of a tensor": DTensor.from_local(torch.ones(4), two, [Shard(0), strided]),
        r"must have shape \(4,\), got \(5,\)": DTensor.from_local(
            torch.ones(5), two, [Shard(0), Replicate()], shape=(8,), stride=(1,)
        ),
    }
    for message, tensor in cases.items():
        with pytest.raises(ValueError, match=message):
            piece(tensor)
    with pytest.raises(ValueError, match="must be on a mesh of all 8 processes"):
        own_pieces({"w": DTensor.from_local(torch.ones(4), two, [Shard(0), Replicate()])}, rank, size)


def main(case, folder, times=0):
    folder = Path(folder)
    if case == "layouts":
        assert fork(4, save_under_every_layout, folder) == [0] * 4
        assert fork(2, read_under_two, folder) == [0] * 2
    elif case == "faults":
        assert fork(2, fail_on_one, folder) == [0] * 2
    elif case == "pieces":
        for layout in ((2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 4, 2)):
            assert fork(8, cut_among_eight, folder, layout) == [0] * 8
        assert fork(1, lambda rank, size, folder: refuse(0, 8, folder), folder) == [0]
    elif case == "kills":
        kill_at_random_moments(folder, int(times))
    elif case == "end":
        assert fork(1, end_while_saving, folder / "whole", None) == [0]
        # The exit code is the program's own; the message is on stderr.
        assert fork(1, end_while_saving, folder / "failed", 100_000) == [0]


if __name__ == "__main__":
    main(*sys.argv[1:])
