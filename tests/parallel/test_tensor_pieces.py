"""Pieces of tensors: `saver_processes.py` cuts them among eight processes; the rest is counted here."""

import json
import os
import random

import numpy as np
import pytest
import torch
from case_server import run_case
from saver_processes import whole

from lumi.parallel.tensor_pieces import Box, check_cover, fill, own_pieces, piece


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_eight_processes_hold_boxes_and_write_each_once(tmp_path):
    """Under every layout each process holds the truth of its box, and the eight write every element once."""
    run_case("saver_processes", "pieces", tmp_path, log=tmp_path / "log")
    layouts = {path.name.rpartition("-")[0] for path in tmp_path.glob("*.json")}
    assert len(layouts) == 4
    for layout in layouts:
        written = [json.loads((tmp_path / f"{layout}-{rank}.json").read_text()) for rank in range(8)]
        for group, tensors in whole().items():
            for name, tensor in tensors.items():
                key = f"{group}/{name}"
                boxes = [Box(*map(tuple, pieces[key])) for pieces in written if key in pieces]
                assert (count(tensor.shape, boxes) == 1).all(), (layout, name)


def test_copies_share_the_work():
    """Eight processes hold everything: they write each tensor once, and share the bytes evenly."""
    sizes = [1000, 900, 800, 30, 20, 10, 0] + [100] * 60
    tensors = {f"w{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    own = [own_pieces(tensors, rank, 8) for rank in range(8)]
    written = sorted(name for names in own for name in names)
    assert written == sorted(name for name, tensor in tensors.items() if tensor.numel())
    loads = [sum(part.local.numel() for part in names.values()) for names in own]
    assert sum(loads) == 8760
    assert max(loads) - min(loads) <= 100  # 1095 each would be even
    turned = dict(reversed(tensors.items()))
    assert [own_pieces(turned, rank, 8).keys() for rank in range(8)] == [names.keys() for names in own]


def test_a_plain_tensor_is_one_piece_that_shares_its_memory():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    local, offset, shape = piece(parameter)
    local.add_(1)
    assert (offset, shape) == ((0, 0), (2, 3))
    assert (parameter == 1).all()
    assert piece(torch.tensor(1.0))[1:] == ((), ())


def count(shape, boxes):
    counted = np.zeros(shape)
    for box in boxes:
        counted[slices_of(box)] += 1
    return counted


def slices_of(box):
    return tuple(slice(start, end) for start, end in zip(box.offset, box.end, strict=True))


def random_boxes(shape, choose):
    """A tensor cut in two, and in two, ...: boxes that cover it, in no grid."""
    boxes = [Box((0,) * len(shape), tuple(shape))]
    for _ in range(choose.randrange(6)):
        box = boxes.pop(choose.randrange(len(boxes)))
        dim = choose.randrange(len(shape))
        at = choose.randrange(box.shape[dim] + 1)
        offset, first, second = list(box.offset), list(box.shape), list(box.shape)
        first[dim], second[dim] = at, box.shape[dim] - at
        offset[dim] += at
        halves = Box(box.offset, tuple(first)), Box(tuple(offset), tuple(second))
        boxes += [half for half in halves if 0 not in half.shape]
    choose.shuffle(boxes)
    return boxes


def test_cover_is_what_counting_says():
    choose, refused = random.Random(0), 0
    for _ in range(500):
        shape = [choose.randint(1, 5) for _ in range(choose.randint(1, 3))]
        boxes = random_boxes(shape, choose)
        check_cover(tuple(shape), boxes)
        moved = choose.randrange(len(boxes))
        sizes = zip(shape, boxes[moved].shape, strict=True)
        other = [choose.randrange(length - size + 1) for length, size in sizes]
        boxes[moved] = Box(tuple(other), boxes[moved].shape)
        if (count(shape, boxes) == 1).all():
            check_cover(tuple(shape), boxes)
        else:
            refused += 1
            with pytest.raises(ValueError, match="must not overlap"):
                check_cover(tuple(shape), boxes)
    assert refused > 100


def test_cover_of_what_has_no_dimension_or_no_element():
    check_cover((), [Box((), ())])
    check_cover((0, 4), [])
    for shape, boxes in (((), []), ((), [Box((), ())] * 2)):
        with pytest.raises(ValueError, match="must hold the 1 elements of shape"):
            check_cover(shape, boxes)
    for box in (Box((0, 0), (0, 4)), Box((0,), (1,)), Box((0, 1), (0, 4)), Box((0, 0), (1,))):
        with pytest.raises(ValueError, match=r"must lie inside shape \(0, 4\)"):
            check_cover((0, 4), [box])
    with pytest.raises(ValueError, match="must lie inside shape"):
        check_cover((3,), [Box((-1,), (3,))])


def test_a_tensor_is_put_together_from_pieces_of_any_shape():
    choose = random.Random(1)
    for _ in range(100):
        shape = [choose.randint(1, 5) for _ in range(choose.randint(1, 3))]
        truth, target = torch.randn(shape), torch.full(shape, torch.nan)
        boxes = random_boxes(shape, choose)
        saved = [truth[slices_of(box)].clone() for box in boxes]
        fill(target, boxes, lambda index, slices, saved=saved: saved[index][slices])
        assert torch.equal(target, truth)
    number = torch.tensor(0)
    fill(number, [Box((), ())], lambda index, slices: torch.tensor(5)[slices])
    assert number == 5
    fill(torch.zeros(0, 4), [], lambda index, slices: pytest.fail("nothing is to be read"))
