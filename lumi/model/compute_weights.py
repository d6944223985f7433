"""The weights as products read them: in the compute dtype, and joined where linears share an input.

[q; k; v] are one product, and [gate; up] are another.

- Float32 masters under bfloat16 products have copies here. The optimizer writes master and copy together.
  Whatever else writes a master makes its copy stale; `ComputeWeights.refresh` then casts it again.
- Masters that have the compute dtype need no copy. They move: each becomes rows of the joined tensor.

Checkpoints, LoRA, tied weights and exports know the masters alone. FSDP2 gathers weights in the compute dtype
itself, so nothing is joined there.

Shape letters: I and O features in and out of a linear.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lumi.kernels.bundle import Linear as LinearOperator
from lumi.kernels.linear import joined_linear


class WeightCopy:
    """The rows (O, I) of a `JoinedWeights` that hold the weight of one module."""

    def __init__(self, module: nn.Module, rows: Tensor):
        self.module, self.rows = module, rows
        self.written: tuple[int, int] | None = None  # the master's address and version when it was copied

    @property
    def master(self) -> Tensor:
        """The module's weight as it is now."""
        master = self.module._parameters["weight"]  # every step asks for every weight
        assert master is not None
        return master

    def is_fresh(self) -> bool:
        """Whether nothing has written the master since it was copied."""
        master = self.master
        return self.written == (master.data_ptr(), master._version)

    def note(self) -> None:
        """Remember that the copy is the master's, as it is now."""
        self.written = (self.master.data_ptr(), self.master._version)


class JoinedWeights:
    """The weights of modules that share an input, one after another in one tensor of the compute dtype.

    Attributes:
        values: (sum of O_i, I).
        members: the rows of each module.
        copies: whether the masters are elsewhere; else they are these rows.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        """Copy the weights, or move them here. They are of one dtype, on one device."""
        masters = [module.get_parameter("weight") for module in modules]
        self.copies = masters[0].dtype != dtype
        with torch.inference_mode(False), torch.no_grad():  # training may come later
            self.values = torch.cat([master.to(dtype) for master in masters])
            parts = self.values.split([len(master) for master in masters])
        self.members = [WeightCopy(*member) for member in zip(modules, parts, strict=True)]
        for master, member in zip(masters, self.members, strict=True):
            if not self.copies:
                master.data = member.rows
            member.note()

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are the weights of `modules`, and of no others."""
        return len(modules) == len(self.members) and all(
            member.module is module for member, module in zip(self.members, modules, strict=True)
        )

    def apply(self, x: Tensor, linear: LinearOperator) -> list[Tensor]:
        """One y_i (..., O_i) for each linear, from x (..., I) in the compute dtype. `linear` multiplies where
        no gradient is wanted."""
        found = [member.module._parameters.get("bias") for member in self.members]
        biases: list[Tensor] = [bias for bias in found if bias is not None]
        bias = torch.cat(biases).to(x.dtype) if biases else None
        return joined_linear(x, self.values, [member.master for member in self.members], bias, linear)

    def is_intact(self) -> bool:
        """Whether masters that moved here are still here: `.to` and `.data = ` take them elsewhere."""
        return all(member.rows.data_ptr() == member.master.data_ptr() for member in self.members)


class ComputeWeights:
    """All weights of a model that are joined or copied. `output` is the copy of the output projection."""

    def __init__(self, groups: Sequence[JoinedWeights], output: JoinedWeights | None):
        self.output = output
        self._copies = [member for group in groups if group.copies for member in group.members]
        self._moved = [group for group in groups if not group.copies]

    def copies(self) -> dict[Tensor, WeightCopy]:
        """The copies by their masters, for the optimizer."""
        return {copy.master: copy for copy in self._copies}

    def refresh(self) -> bool:
        """Copy the masters that were written since. Returns False where they must be joined anew: some are on
        another device or of another dtype, or no longer where they moved."""
        stale = [copy for copy in self._copies if not copy.is_fresh()]
        if any((c.master.device, c.master.dtype) != (c.rows.device, torch.float32) for c in stale):
            return False
        _cast(stale)
        return all(group.is_intact() for group in self._moved)


@contextmanager
def written_together(copies: Sequence[WeightCopy]) -> Iterator[list[Tensor]]:
    """Around an operator that writes masters and copies, or neither of both. Yields the copies' rows."""
    _cast([copy for copy in copies if not copy.is_fresh()])  # in case that it writes neither
    yield [copy.rows for copy in copies]
    for copy in copies:
        copy.note()


@torch.no_grad()
def _cast(copies: Sequence[WeightCopy]) -> None:
    if copies:
        torch._foreach_copy_([copy.rows for copy in copies], [copy.master for copy in copies])
    for copy in copies:
        copy.note()
