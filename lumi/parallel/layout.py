"""How the processes of a run share the work: the sides of their mesh."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lumi.config import UserError


class Layout(NamedTuple):
    """How many processes there are along each side of the mesh; their product is all processes."""

    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Groups of processes that read different rows."""
        return self.replicate * self.shard

    def describe(self) -> str:
        """Such as "replicate 2 x shard 4 x tensor 1"."""
        return " x ".join(f"{name} {side}" for name, side in self._asdict().items())


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the work. At most one side may be -1: it takes the remaining processes.

    `replicate`: whole copies of the model (or of its shards), which read different rows.
    `shard`: processes that hold the weights, gradients and optimizer states of one copy in parts, and read
    different rows too (FSDP, Zhao et al. 2023, arXiv:2304.11277).
    `tensor`: processes that share the products of every layer and read the same rows (Shoeybi et al. 2019,
    arXiv:1909.08053, with sequence-parallel norms, Korthikanti et al. 2022, arXiv:2205.05198).
    Ranks count along `tensor` first, then `shard`, then `replicate`.

    `reduce_dtype`: the dtype in which processes sum gradients, if the run computes in bfloat16; otherwise it
    is float32. With FSDP2 the micro-steps of a step also add up in it: float32 is more exact over many of
    them, and twice the bytes.
    """

    replicate: int = -1
    shard: int = 1
    tensor: int = 1
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        sides = self._sides()
        for name, side in sides._asdict().items():
            if side < 1 and side != -1:
                raise UserError(name, "must be at least 1, or -1 for the rest", got=side)
        if sides.count(-1) > 1:
            got = f"{', '.join(Layout._fields)} = {', '.join(map(str, sides))}"
            raise UserError("", "must leave the rest to one side at most", got=got)

    def layout(self, num_processes: int) -> Layout:
        """The sides of the mesh for a number of processes. Raises UserError where they do not fit it."""
        sides = self._sides()
        given = math.prod(side for side in sides if side != -1)
        if num_processes % given or (-1 not in sides and given != num_processes):
            verb = "divide" if -1 in sides else "be"
            raise UserError(
                f"parallel: {sides.describe()} = {given}",
                f"must {verb} the {num_processes} processes of this run",
                remedy="mend the config, or torchrun --nproc-per-node",
            )
        return Layout(*(num_processes // given if side == -1 else side for side in sides))

    def _sides(self) -> Layout:
        return Layout(self.replicate, self.shard, self.tensor)
