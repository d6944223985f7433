"""This process among the others: what they tell each other, and how they end together."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lumi.config import UserError
from lumi.host.interruption import Interrupted, StopSignal
from lumi.parallel.layout import Layout

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process among the others. All processes call its methods together.

    Attributes:
        patient: a group on the CPU without the time limit of a step, for what takes one process hours, and
            for numbers that are on the host.
        saving: another one, for the threads that write checkpoints.
        mesh: of the layout's sides, by their names; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup
    saving: dist.ProcessGroup
    stop: StopSignal
    layout: Layout
    mesh: DeviceMesh | None

    @property
    def data_rank(self) -> int:
        """Which share of a step's rows this process reads, of `layout.data`."""
        return self.rank // self.layout.tensor

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def fail_together(self, *, interruptible: bool = False) -> Iterator[None]:
        """A block of work that ends all processes if it fails on one of them.

        Call no collective inside that may fail on some processes only. For work of one process:

            with world.fail_together(interruptible=True):
                if world.is_main:
                    work()

        Args:
            interruptible: a signal ends the block at once, on all processes. For long work that has nothing
                to save and that no other thread waits for.

        Raises:
            UserError: on the main process: the first process's UserError or OSError.
            SystemExit: with code 2 on the others: one message is enough.
            Interrupted: on all processes, if a signal came to one of them.
        """
        fault: UserError | Interrupted | None = None
        try:
            with self.stop.interrupting() if interruptible else contextlib.nullcontext():
                yield
        except (UserError, Interrupted) as error:
            fault = error
        except OSError as error:
            fault = UserError(str(error))
        if self._any(fault is not None):
            fault = next(fault for fault in self.gather(fault) if fault is not None)
            if self.is_main or isinstance(fault, Interrupted):
                raise fault
            raise SystemExit(2)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank. They may be any objects that pickle."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def sum(self, *values: float) -> list[float]:
        """The sums over all processes, as float64: exact for counts below 2^53.

        They never come near a GPU, so nothing waits for its work.
        """
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.patient)
        return tensor.tolist()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """The sums over all processes of numbers on their devices, for which the host does not wait.

        Args:
            values: float64; they may be changed.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def _any(self, value: bool) -> bool:
        return self.sum(value)[0] > 0
