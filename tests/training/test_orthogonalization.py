"""Newton-Schulz steps against the singular value decomposition in float64."""

import pytest
import torch

from lumi.training.orthogonalization import orthogonalize


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_finds_the_nearest_orthogonal_matrices_roughly(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = torch.stack([matrix, -3 * matrix])
    result = orthogonalize(matrices.to(dtype))
    assert (result.dtype, result.shape) == (dtype, matrices.shape)
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inside = left.mT @ result.double() @ right.mT  # its singular values, if the singular vectors stay
    singular = inside.diagonal(dim1=1, dim2=2)
    assert singular.min() > 0.6  # five steps bring them to about 0.7 - 1.2
    assert singular.max() < 1.3
    assert (inside - torch.diag_embed(singular)).abs().max() < 0.05


def test_orthogonalize_of_nothing_is_nothing():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()
