"""This process among the others: what they say to each other, and how they end together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lumi.config import UserError
from lumi.host.interruption import Interrupted, StopSignal
from lumi.parallel.layout import Layout

Value = TypeVar("Value")


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


def attempt(work: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """What `work` returns, or the message of the error of the user or of the disk that it raises: for `World.first`, where all are to hear
    of it."""
    try:
        return work(), None
    except (UserError, OSError) as error:
        return None, str(error)
