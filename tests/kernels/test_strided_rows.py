"""Any shape and strides as rows: a view where one stride walks them, a copy elsewhere."""

import pytest
import torch

from lumi.kernels.strided_rows import strided_rows

BASE = torch.arange(2 * 3 * 8, dtype=torch.float32).reshape(2, 3, 8)


@pytest.mark.parametrize(
    ("tensor", "is_view"),
    [
        (BASE, True),
        (BASE[..., :5], True),  # rows with a gap between them
        (BASE[:, 1], True),
        (BASE[..., ::2], False),  # no unit stride inside a row
        (BASE.transpose(0, 1), False),  # two strides between rows
        (BASE[..., :1], True),
        (BASE[:0], True),
    ],
    ids=str,
)
def test_rows(tensor, is_view):
    rows = strided_rows(tensor)
    assert torch.equal(rows, tensor.reshape(-1, tensor.shape[-1]))
    assert rows.stride(1) == 1 or rows.shape[1] == 1
    assert (rows.data_ptr() == tensor.data_ptr()) == is_view or tensor.numel() == 0
