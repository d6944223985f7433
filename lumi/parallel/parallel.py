"""The processes of a run: torch's process group (NCCL on CUDA, gloo on the CPU), their mesh, and the model among them: torch's DDP where
each holds all of it, otherwise torch's FSDP2 over the mesh's data sides, with tensor parallelism below it."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lumi.config import UserError
from lumi.host.interruption import Interrupted, StopSignal
from lumi.model.transformer import Transformer
from lumi.parallel.rendezvous import fresh_store
from lumi.parallel.tensor_parallel import tensor_parallel
from lumi.parallel.tensor_pieces import piece

Value = TypeVar("Value")


class Layout(NamedTuple):
    """How many processes there are along each side of the mesh; the product is all of them."""

    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Groups of processes that read different rows."""
        return self.replicate * self.shard


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work; -1, in one place at most, is all that the others leave.

    `replicate`: whole copies of the model (or of its shards), which read different rows. `shard`: processes that hold a copy's weights,
    gradients and optimizer states in parts, and read different rows too (FSDP, Zhao et al. 2023, arXiv:2304.11277). `tensor`: processes
    that share every layer's products and read the same rows (Shoeybi et al. 2019, arXiv:1909.08053, with sequence-parallel norms,
    Korthikanti et al. 2022, arXiv:2205.05198). Processes of one `tensor` group stand next to each other in rank, then those of `shard`.

    `reduce_dtype`: of gradients between processes, where the run computes in bfloat16 (elsewhere float32). Under FSDP2 the micro-steps of
    a step add up in it too: with many of them float32 is more exact, and costs twice the bytes.
    """

    replicate: int = -1
    shard: int = 1
    tensor: int = 1
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        sides = self.replicate, self.shard, self.tensor
        for name, side in zip(Layout._fields, sides, strict=True):
            if side < 1 and side != -1:
                raise ValueError(f"{name} must be at least 1, or -1 for the rest, got {side}")
        if sides.count(-1) > 1:
            raise ValueError(
                f"must leave the rest to one side at most, got replicate, shard, tensor = {', '.join(map(str, sides))}"
            )

    def layout(self, num_processes: int) -> Layout:
        """The sides of the mesh for a number of processes. Raises UserError where they do not come out even."""
        sides = [self.replicate, self.shard, self.tensor]
        given = math.prod(side for side in sides if side != -1)
        shown = " x ".join(f"{name} {side}" for name, side in zip(Layout._fields, sides, strict=True))
        if num_processes % given or (-1 not in sides and given != num_processes):
            wanted = (
                f"divide the {num_processes} processes"
                if -1 in sides
                else f"be the {num_processes} processes"
            )
            raise UserError(
                f"parallel: {shown} = {given} must {wanted} of this run; mend the config, or torchrun --nproc-per-node"
            )
        return Layout(*(num_processes // given if side == -1 else side for side in sides))


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    patient: (
        dist.ProcessGroup
    )  # on the CPU, without the time limit of a step: for what takes the main process hours
    saving: dist.ProcessGroup  # likewise, for the threads that write checkpoints
    stop: StopSignal
    layout: Layout
    mesh: DeviceMesh | None  # of the layout's sides, by their names; None for one process

    @property
    def data_rank(self) -> int:
        """Which share of a step's rows this process reads, of `layout.data`."""
        return self.rank // self.layout.tensor

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, as float64: exact for counts below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something in the main process while the others wait, however long it takes. A signal ends it, on all.

        Raises:
            UserError: what `work` raised, or the disk's error. The others then leave with exit code 2: one message is enough.
            Interrupted: a signal came to the main process.
        """
        outcome: str | int | None = None
        if self.is_main:
            try:
                with self.stop.interrupting():
                    _, outcome = attempt(work)
            except Interrupted as interrupted:
                outcome = interrupted.number
        outcome = self.from_main(outcome)
        if isinstance(outcome, int):
            raise Interrupted(outcome)
        if outcome is not None:
            self.refuse(outcome)

    def signal(self) -> int:
        """The signal that a process was told to stop by; 0 where none was."""
        signals: list[int] = [0] * self.size
        dist.all_gather_object(signals, self.stop.received, group=self.patient)
        return max(signals)

    def first(self, message: str | None) -> str | None:
        """The first of all processes' messages, on all of them, which call this together; None where none has one."""
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message, group=self.patient)
        return next((message for message in messages if message is not None), None)

    def agreed(self, work: Callable[[], Value]) -> Value:
        """Do something in every process, without exchange among them. Where it fails on any, all end with the first message: `refuse`."""
        result, fault = attempt(work)
        self.refuse_first(fault)
        return cast(Value, result)

    def refuse_first(self, fault: str | None) -> None:
        """Where any process has a fault, end the run on all with the first: all call this together. Raises as `refuse`."""
        if fault := self.first(fault):
            self.refuse(fault)

    def alike(self, work: Callable[[], Value]) -> Value:
        """Do what fails on all processes alike, if it does: then one message is enough. Raises as `refuse`."""
        try:
            return work()
        except UserError as error:
            self.refuse(str(error))

    def refuse(self, message: str) -> NoReturn:
        """End the run on all processes, which call this together. Raises UserError in the main one, SystemExit(2) in the others."""
        if self.is_main:
            raise UserError(message)
        raise SystemExit(2)

    def from_main(self, value: Value) -> Value:
        """The main process's value, on all."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def least(self, value: float) -> float:
        """The least of all processes' values."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.item()


def choose_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is CUDA where there is one. Raises UserError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            '--device must be "cpu" or "auto" on this machine, got "cuda": torch sees no CUDA device'
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def attempt(work: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """What `work` returns, or the message of the error of the user or of the disk that it raises: for `World.first`, where all are to hear
    of it."""
    try:
        return work(), None
    except (UserError, OSError) as error:
        return None, str(error)


@contextlib.contextmanager
def process_group(
    device: str = "auto",
    parallel: ParallelConfig | None = None,
    stop: StopSignal | None = None,
    timeout_seconds: float = 600.0,
) -> Iterator[World]:
    """Join the group that torchrun describes in the environment, or make a group of one; leave it at the end.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        parallel: how the processes share the work; None: each has the whole model.
        stop: tells of signals; None: nothing does.
        timeout_seconds: how long processes may wait for each other in a step; the groups' own limit is well above it, so that
            `lumi.parallel.watchdog`, which knows who is late, speaks first.

    Raises:
        UserError: if CUDA is asked for and absent, a node starts more processes than it has GPUs, or `parallel` does not fit their number.
    """
    device = choose_device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc-per-node must be at most {torch.cuda.device_count()} (GPUs here), got {local_rank + 1}"
            )
        torch.cuda.set_device(local_rank)
    backend, limit = "nccl" if device == "cuda" else "gloo", timedelta(seconds=2 * timeout_seconds + 60)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    layout, fault = attempt(lambda: (parallel or ParallelConfig()).layout(size))
    if layout is None:
        if rank:
            raise SystemExit(2)  # one message is enough
        raise UserError(fault)
    store = fresh_store() if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        patient, saving = (dist.new_group(backend="gloo", timeout=timedelta(days=7)) for _ in range(2))
        mesh = _mesh(device, backend, layout, limit) if size > 1 else None
        place = torch.device(f"cuda:{local_rank}" if device == "cuda" else "cpu")
        yield World(rank, size, place, patient, saving, stop or StopSignal(), layout, mesh)
    finally:
        dist.destroy_process_group()


def _mesh(device: str, backend: str, layout: Layout, limit: timedelta) -> DeviceMesh:
    """The mesh; its groups get the run's time limit, which they would not take over from the group of all."""
    override: dict[int | str, Any] = {}
    for side in Layout._fields:  # each its own, which torch writes the group's name and members into
        group: Any = dist.ProcessGroupNCCL if backend == "nccl" else dist.ProcessGroupGloo
        options = group.Options() if backend == "nccl" else group._Options()
        options._timeout = limit
        override[side] = backend, options
    return init_device_mesh(device, layout, mesh_dim_names=Layout._fields, backend_override=override)


def parallelize(
    model: Transformer,
    world: World,
    reduce_dtype: str = "bfloat16",
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> nn.Module:
    """Share a model among the processes, in place. All of them call the result together, and a gradient is the mean over `layout.data`.

    FSDP2 keeps float32 shards of the weights, gathers each layer's in the model's compute dtype when it is their turn, and sums gradients
    in the reduce dtype; where that is the compute dtype the gradients of inner micro-steps add up in it too.

    Args:
        model: whole, the same on all processes; or on the "meta" device, without values.
        reduce_dtype: "bfloat16" or "float32", of gradients between processes; float32 unless the model computes in bfloat16.
        weights: of a model without values, by the parameters' names: no process ever holds more than its own part and one of these.

    Returns:
        what to call: the model itself, or DDP around it.
    """
    narrow = reduce_dtype == "bfloat16" and model.compute_dtype == torch.bfloat16
    sharded = world.mesh is not None and (world.layout.shard > 1 or world.layout.tensor > 1)
    if sharded:
        _shard(model, world, torch.bfloat16 if narrow else torch.float32)
    if weights is None:
        model.to(world.device)
    else:
        model.to_empty(device=world.device)
        for name, value in weights:
            held = piece(model.get_parameter(name))
            held.local.copy_(held.part_of(value))
    if world.mesh is None or sharded:
        return model
    wrapped = DistributedDataParallel(model)
    if narrow:
        wrapped.register_comm_hook(world.size, _reduce_in_bfloat16)
    return wrapped


def _shard(model: Transformer, world: World, reduce_dtype: torch.dtype) -> None:
    """Tensor parallelism, then FSDP2 layer by layer, in place."""
    assert world.mesh is not None
    if world.layout.tensor > 1:
        tensor_parallel(model, world.mesh["tensor"])
    mesh = world.mesh["replicate", "shard"] if world.layout.replicate > 1 else world.mesh["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=model.compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _reduce_in_bfloat16(num_processes: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for the mean of a bucket of gradients; torch's own of this kind is for NCCL alone."""
    gradients = bucket.buffer()
    sent = (gradients / num_processes).bfloat16()
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: gradients.copy_(done.value()[0]))


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Reduce gradients in this micro-step's backward, or (`enabled=False`) leave it to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward has gathered, so that the parameters are this process's parts again."""
    if isinstance(model, FSDPModule):
        model.reshard()
