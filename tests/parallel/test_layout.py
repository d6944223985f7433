import pytest

from lumi.config import UserError
from lumi.parallel.layout import Layout, ParallelConfig


@pytest.mark.parametrize(
    ("sides", "processes", "layout"),
    [
        ({}, 8, (8, 1, 1)),
        ({"shard": 4}, 8, (2, 4, 1)),
        ({"replicate": 1, "shard": -1}, 8, (1, 8, 1)),
        ({"replicate": 2, "shard": -1, "tensor": 2}, 16, (2, 4, 2)),
        ({"replicate": 3, "shard": 2, "tensor": -1}, 12, (3, 2, 2)),
        ({"replicate": 2, "shard": 3, "tensor": 2}, 12, (2, 3, 2)),
        ({"shard": 1}, 1, (1, 1, 1)),
    ],
)
def test_layouts(sides, processes, layout):
    assert ParallelConfig(**sides).layout(processes) == layout == Layout(*layout)
    assert Layout(*layout).data == layout[0] * layout[1]


@pytest.mark.parametrize(
    ("sides", "processes", "message"),
    [
        ({"shard": 3}, 8, r"replicate -1 x shard 3 x tensor 1 = 3 must divide the 8 processes"),
        (
            {"replicate": 2, "shard": 2, "tensor": 1},
            8,
            r"replicate 2 x shard 2 x tensor 1 = 4 must be the 8 processes",
        ),
        ({"shard": 16}, 8, r"= 16 must divide the 8 processes"),
    ],
)
def test_layouts_that_do_not_come_out_even(sides, processes, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**sides).layout(processes)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"shard": 0}, "shard must be at least 1, or -1 for the rest, got 0"),
        ({"tensor": -2}, "tensor must be at least 1, or -1 for the rest, got -2"),
        ({"shard": -1}, "must leave the rest to one side at most, got replicate, shard, tensor = -1, -1, 1"),
    ],
)
def test_sides_that_mean_nothing(sides, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**sides)


def test_a_layout_in_words():
    assert Layout(2, 4, 1).describe() == "replicate 2 x shard 4 x tensor 1"
