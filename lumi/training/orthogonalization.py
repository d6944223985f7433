"""Newton-Schulz steps that make matrices orthogonal (Jordan et al. 2024), and stacks of matrices for them.

Tall matrices lie in a stack as their transpose, so that it holds wide ones alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LEAST_NORM = 1e-7  # that a matrix is divided by
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic
_NUM_STEPS = 5
_STACK_ELEMENTS = 2**24  # of one stack at most: they keep a GPU busy in 256 MiB of temporary memory


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move every singular value close to one, by five Newton-Schulz steps.

    They end at about 0.7 - 1.2, and the singular vectors stay. A matrix of zeros stays zero.

    Args:
        matrices: (count, rows, columns), in the dtype to compute in.

    Returns:
        the same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    x = _as_wide(matrices)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(_NUM_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall(matrices) else x


def stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices to orthogonalise together: of one shape up to transposition, the tall ones last."""
    alike: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for parameter in sorted(parameters, key=is_tall):
        alike[tuple(sorted(parameter.shape))].append(parameter)
    for shape, members in alike.items():
        count = max(1, _STACK_ELEMENTS // math.prod(shape))
        yield from (members[first : first + count] for first in range(0, len(members), count))


def stacked(matrices: Sequence[Tensor], num_wide: int) -> Tensor:
    """(count, rows, columns): matrices of `stacks` as one tensor of wide ones.

    Args:
        num_wide: how many are not tall; these come first.
    """
    halves = [torch.stack(list(half)) for half in (matrices[:num_wide], matrices[num_wide:]) if half]
    return halves[0] if num_wide == len(matrices) else torch.cat([_as_wide(half) for half in halves])


def apart(stack: Tensor, num_wide: int) -> list[Tensor]:
    """The matrices that `stacked` joined, each in its own shape."""
    return [*stack[:num_wide].unbind(), *stack[num_wide:].mT.contiguous().unbind()]


def is_tall(matrix: Tensor) -> bool:
    """Whether it has more rows than columns."""
    return matrix.shape[-2] > matrix.shape[-1]


def _as_wide(matrices: Tensor) -> Tensor:
    """Transposed where there are more rows than columns, so that the products of rows with rows are small."""
    return matrices.mT if is_tall(matrices) else matrices
