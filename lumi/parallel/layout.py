"""How the processes of a run share the work: the sides of their mesh."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lumi.config import UserError


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


def describe_layout(layout: Layout) -> str:
    """The sides of the mesh in words."""
    return " x ".join(f"{name} {side}" for name, side in zip(Layout._fields, layout, strict=True))
