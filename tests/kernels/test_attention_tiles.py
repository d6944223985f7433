"""The table of tiles: every architecture and head dim finds its row."""

import pytest
import torch

from lumi.kernels.attention_tiles import architecture, rows_of, table, tile

KERNELS = ("fwd", "dkdv", "dq")


@pytest.mark.parametrize(
    ("arch", "key"),
    [
        (75, "80"),  # older than all
        (80, "80"),
        (86, "80"),
        (89, "80"),
        (90, "90"),
        (100, "100"),
        (103, "100"),
        (120, "80"),  # the shared memory of sm_89, not of sm_90
    ],
)
def test_an_architecture_takes_its_rows_or_those_before_it(arch, key):
    assert rows_of(arch) == key


def test_the_interpreter_takes_the_tiles_of_sm_90():
    assert architecture(torch.device("cpu")) == 90


def test_the_table_is_whole():
    for by_width in table().values():
        assert by_width.keys() == {"64", "128"}
        for rows in by_width.values():
            assert rows.keys() == set(KERNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "block_k"), [(8, 16), (40, 64), (64, 64), (96, 128), (128, 128)])
def test_a_tile_holds_a_whole_head(K, block_k, dtype):
    for kernel in KERNELS:
        found = tile(kernel, K, dtype, 90)
        assert found["BLOCK_K"] == block_k
        assert found["num_warps"] in (4, 8)
        if dtype != torch.float32:
            assert found.items() >= table()["90"]["64" if block_k <= 64 else "128"][kernel].items()
    delta = tile("delta", K, dtype, 90)
    assert delta["BLOCK_M"] * delta["BLOCK_K"] == 8 * 32 * delta["num_warps"]  # 8 elements a thread


def test_a_row_of_the_table_is_what_a_kernel_is_launched_with():
    """Block sizes, descriptors and options of the compiler; dQ at head dim 64 may take 128 registers, so that
    two blocks of 8 warps share a multiprocessor."""
    names = {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "DESCRIPTORS"}
    for by_width in table().values():
        for rows in by_width.values():
            assert all(names <= row.keys() <= names | {"maxnreg"} for row in rows.values())
    assert tile("dq", 64, torch.bfloat16, 90)["maxnreg"] * 2 * 8 * 32 <= 65_536
