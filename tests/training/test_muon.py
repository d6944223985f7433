"""Muon over matrices in parts; `group_processes.py` is what runs in several processes."""

import sys
from pathlib import Path

import pytest
import torch
from runs import launch

from lumi.training.muon import orthogonalize


def test_it_is_torchs_muon_bit_for_bit(tmp_path):
    """Tall, wide and uneven matrices on 2 and 4 processes, under FSDP2, hybrid sharding and tensor
    parallelism by rows and columns."""
    launch(
        [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).parents[1] / "processes" / "group_processes.py"),
            "muon",
            str(tmp_path),
        ]
    )


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (1, 7)])
def test_orthogonalize_finds_the_nearest_orthogonal_matrix_roughly(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = orthogonalize(matrix)
    assert (result.dtype, result.shape) == (torch.bfloat16, matrix.shape)
    assert result.is_contiguous()
    inside = left.T @ result.double() @ right.T  # its singular values where it turns as the matrix does
    assert inside.diagonal().min() > 0.6  # five turns bring them to about 0.7 - 1.2
    assert inside.diagonal().max() < 1.3
    assert (inside - inside.diagonal().diag()).abs().max() < 0.05


def test_orthogonalize_of_nothing_is_nothing():
    assert not orthogonalize(torch.zeros(4, 6)).any()
