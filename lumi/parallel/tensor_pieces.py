"""The piece of a tensor that each process holds: where it lies, who writes it, how it is read back.

A plain tensor is whole, and the same, on every process. The placements of a DTensor cut it into boxes;
processes along a replicated side of its mesh hold the same box. Saved pieces are boxes too, so a tensor that
was saved under one mesh can be read under another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Key = TypeVar("Key", str, tuple[str, str])


class Box(NamedTuple):
    """A part of a tensor: from `offset`, of `shape`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        """Where it ends in each dimension, exclusive."""
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))


class Piece(NamedTuple):
    """What this process holds of a tensor of shape `shape`: the plain tensor `local`, from `offset` on."""

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def part_of(self, whole: Tensor) -> Tensor:
        """The same part of a plain tensor of shape `shape`."""
        sides = zip(self.offset, self.local.shape, strict=True)
        return whole[tuple(slice(start, start + length) for start, length in sides)]


def piece(tensor: Tensor) -> Piece:
    """This process's part of a tensor, plain or DTensor; shares its memory.

    Raises:
        ValueError: the tensor is a sum not yet reduced, its part is no box, or its mesh lacks this process.
    """
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), (0,) * len(whole), whole)
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"a tensor to save must be on a mesh that holds this process, got {mesh}")
    offset, shape = [0] * len(whole), list(whole)
    for side in _cuts(tensor):
        dim = tensor.placements[side].dim  # type: ignore[attr-defined]
        chunk = math.ceil(shape[dim] / mesh.size(side))  # as torch.chunk: the last may be smaller, or empty
        start = min(chunk * coordinate[side], shape[dim])
        offset[dim], shape[dim] = offset[dim] + start, min(chunk, shape[dim] - start)
    empty = not local.numel() and not math.prod(shape)  # FSDP2 gives empty parts other shapes
    if tuple(local.shape) != tuple(shape) and not empty:
        raise ValueError(
            f"the local part of a tensor {whole}, {tensor.placements}, "
            f"must have shape {tuple(shape)}, got {tuple(local.shape)}"
        )
    return Piece(local, tuple(offset), whole)


def _cuts(tensor: DTensor) -> list[int]:
    """The sides of the mesh that cut the tensor, in the order of the cuts.

    They cut from left to right, with one exception: FSDP2 cuts what tensor parallelism, further right, has
    already cut. `_StridedShard` says so.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    plain: list[int] = []
    strided: list[int] = []
    for side, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):  # a kind of Shard in some versions of torch
            others = range(side + 1, mesh.ndim)
            right = [other for other in others if getattr(placements[other], "dim", None) == placement.dim]
            if math.prod(mesh.size(other) for other in right) != placement.split_factor:
                raise ValueError(f"the parts of a tensor to save must be boxes, got {placements} on {mesh}")
            strided.append(side)
        elif isinstance(placement, Shard):
            plain.append(side)
        elif not placement.is_replicate():
            raise ValueError(f"a tensor to save must be sharded or replicated, got {placements}")
    return plain + strided[::-1]


def num_copies(tensor: DTensor) -> int:
    """How many processes hold the same part of a tensor."""
    sides = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(side) for side, p in sides if p.is_replicate())


def gathered(tensor: DTensor) -> Tensor:
    """The whole of a DTensor, on every process.

    FSDP2 cuts what tensor parallelism has cut before, so the sides of the mesh are gathered one by one.
    """
    placements = list(tensor.placements)
    for side in range(len(placements)):
        placements[side] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def own_pieces(tensors: Mapping[Key, Tensor], rank: int, size: int) -> dict[Key, Piece]:
    """The pieces that this process writes.

    All processes must call it with the same names; each computes the same division by itself. Every piece of
    every tensor is written once, the largest first, by the holder that has the least to write so far:
    replicas share the work. Pieces without elements are left out.

    Args:
        tensors: by name. A DTensor's mesh must hold all processes.
        rank, size: of the default process group.
    """
    own: dict[Key, Piece] = {}
    written = np.zeros(size)
    layouts: dict[Any, np.ndarray] = {}
    holders = {name: _holders(tensor, size, layouts) for name, tensor in tensors.items()}
    num_bytes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    bytes_each = {name: num_bytes[name] / len(holders[name]) for name in tensors}
    for name in sorted(tensors, key=lambda name: (-bytes_each[name], name)):
        least = written[holders[name]].argmin(axis=1)  # the first of equals
        writers = holders[name][np.arange(len(least)), least]
        written[writers] += bytes_each[name]
        if rank in writers and (part := piece(tensors[name])).local.numel():
            own[name] = part
    return own


def _holders(tensor: Tensor, size: int, layouts: dict[Any, np.ndarray]) -> np.ndarray:
    """(pieces, replicas): the ranks that hold each piece of a tensor."""
    if not isinstance(tensor, DTensor):
        return np.arange(size)[None]
    mesh = tensor.device_mesh
    cut = tuple(_cuts(tensor))
    if (mesh, cut) not in layouts:
        if mesh.size() != size:
            raise ValueError(f"a tensor to save must be on a mesh of all {size} processes, got {mesh}")
        ranks = mesh.mesh.numpy()
        replicated = [side for side in range(mesh.ndim) if side not in cut]
        pieces = math.prod(ranks.shape[side] for side in cut)
        layouts[mesh, cut] = ranks.transpose(*cut, *replicated).reshape(pieces, -1)
    return layouts[mesh, cut]


def check_cover(shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raises ValueError unless the boxes make up a tensor of `shape`, without holes and overlaps."""
    for box in boxes:
        if not _is_inside(box, shape):
            got = f"offset {box.offset}, shape {box.shape}"
            raise ValueError(f"a piece must lie inside shape {shape} and not be empty, got {got}")
    if (covered := sum(math.prod(box.shape) for box in boxes)) != (elements := math.prod(shape)):
        raise ValueError(
            f"the pieces must hold the {elements} elements of shape {shape} once each, got {covered}"
        )
    # Nearly everything is cut in the first dimension: sorted by it, a box overlaps only those that reach it.
    reached: list[Box] = []
    for box in sorted(boxes) if shape else ():
        reached = [other for other in reached if other.end[0] > box.offset[0]]
        if overlapping := [other for other in reached if _overlap(box, other) is not None]:
            raise ValueError(f"the pieces of a tensor must not overlap, got {overlapping[0]} and {box}")
        reached.append(box)


def _is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    if not len(box.offset) == len(box.shape) == len(shape):
        return False
    sides = zip(box.offset, box.end, shape, strict=True)
    return all(0 <= start < end <= length for start, end, length in sides)


def fill(
    target: Tensor, boxes: Sequence[Box], read_slice: Callable[[int, tuple[slice, ...]], Tensor]
) -> None:
    """Write the part of `target` that this process holds, in place, from saved pieces that cover the whole.

    Args:
        boxes: where the saved pieces lie in the whole tensor.
        read_slice: reads a part of piece number i; it is called only for what is needed.
    """
    local, offset, _ = piece(target)
    ours = Box(offset, tuple(local.shape))
    for index, box in enumerate(boxes):
        if (common := _overlap(ours, box)) is not None:
            local[_inside(common, ours)].copy_(read_slice(index, _inside(common, box)))


def _overlap(a: Box, b: Box) -> Box | None:
    start = tuple(map(max, a.offset, b.offset))
    shape = tuple(end - first for first, end in zip(start, map(min, a.end, b.end), strict=True))
    return Box(start, shape) if all(length > 0 for length in shape) else None


def _inside(part: Box, box: Box) -> tuple[slice, ...]:
    """The slices that cut `part` out of `box`."""
    sides = zip(part.offset, part.end, box.offset, strict=True)
    return tuple(slice(start - origin, end - origin) for start, end, origin in sides)
