from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lumi.batches import IGNORE, BatchConfig, Batches, Row, Stream, collate, interleave, read_row, validation_batches
from lumi.config import UserError


@dataclass
class FakeSplit:
    tokens: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None = None


def make_split(lengths, first=0):
    """Documents of the given lengths; document d holds 1000*d + 0, 1, 2 ... so that every token tells where it comes from."""
    tokens = np.concatenate([1000 * d + first + np.arange(n) for d, n in enumerate(lengths)]) if lengths else np.zeros(0)
    return FakeSplit(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64))


CONFIG = BatchConfig(sequence_length=4, batch_tokens=16, micro_batch_size=2)


def test_collate_by_hand():
    rows = [
        Row(np.array([1, 5, 6, 2, 1]), np.array([True, False, False, False, True]), [0, 1]),
        Row(np.array([7, 2, 1, 8, 9]), np.array([False, False, True, False, False]), [1, 2]),
    ]
    batch = collate(rows)
    assert batch.tokens.tolist() == [[1, 5, 6, 2], [7, 2, 1, 8]]
    assert batch.targets.tolist() == [[5, 6, 2, IGNORE], [2, IGNORE, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.num_targets == 6


def test_an_epoch_reads_every_target_once():
    lengths = [5, 1, 9, 3, 2, 12, 1]
    split = make_split(lengths)
    stream = Stream(split, length=4, seed=3)
    assert stream.rows_per_epoch == 8
    epochs = [[stream.row(epoch * 8 + row) for row in range(8)] for epoch in range(2)]
    for rows in epochs:
        targets = np.concatenate([row.tokens[1:] for row in rows]).tolist()
        everything = split.tokens.tolist()
        assert len(targets) == 32
        assert all(targets.count(token) <= everything.count(token) for token in targets)
        assert sum(row.starts[1:].sum() for row in rows) == len(lengths) - 1  # all but the first, which is no target
        assert {document for row in rows for document in row.documents} == set(range(len(lengths)))
    assert [row.tokens.tolist() for row in epochs[0]] != [row.tokens.tolist() for row in epochs[1]]
    again = Stream(split, length=4, seed=3)
    assert again.row(13).tokens.tolist() == epochs[1][5].tokens.tolist()


def test_the_rows_of_a_long_document_are_scattered():
    stream = Stream(make_split([400, 400]), length=4, seed=0)
    documents = [stream.row(i).documents[0] for i in range(100)]
    assert 25 < sum(documents) < 75


def test_read_row_by_hand():
    split = make_split([3, 1, 4])  # 0 1 2 | 1000 | 2000 2001 2002 2003
    order = np.array([2, 0, 1])
    row = read_row(split, order, np.array([4, 7, 8]), 2, 6)
    assert row.tokens.tolist() == [2002, 2003, 0, 1, 2, 1000]
    assert row.starts.tolist() == [False, False, True, False, False, True]
    assert row.documents == [2, 0, 1]


def test_batches_are_pure_functions_of_the_step():
    split = make_split([7, 3, 11, 6, 9])
    one, two = (Batches([split], None, CONFIG, seed=1) for _ in range(2))
    late = two[9]
    for step in (1, 2, 9):
        whole, parts = one[step], [one.rows(step, r, r + 1) for r in range(4)]
        assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
        assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))
    assert torch.equal(one[9].tokens, late.tokens)
    assert not torch.equal(one[9].tokens, Batches([split], None, CONFIG, seed=2)[9].tokens)


def test_targets_are_the_next_token_of_the_same_document():
    batches = Batches([make_split([7, 3, 11, 6, 9])], None, CONFIG, seed=1)
    for step in range(1, 12):
        batch = batches[step]
        trained = batch.targets != IGNORE
        assert torch.equal(batch.targets[trained], batch.tokens[trained] + 1)  # t+1, and never across documents
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == 16


def test_interleave_is_exact_and_stateless():
    units = np.array([700_000, 250_000, 50_000])
    whole = interleave(units, 0, 4000)
    rows = {store: [row for s, row in whole if s == store] for store in range(3)}
    assert all(rows[store] == list(range(len(rows[store]))) for store in range(3))
    assert [len(rows[store]) for store in range(3)] == [2800, 1000, 200]
    for count in (1, 17, 999):
        shares = [sum(s == store for s, _ in whole[:count]) for store in range(3)]
        assert all(abs(share - count * unit / 1e6) <= 1.5 for share, unit in zip(shares, units, strict=True))
    for start in (0, 1, 5, 997, 3990):
        assert interleave(units, start, start + 7) == whole[start : start + 7]


def test_mix():
    splits = [make_split([40]), make_split([40], first=500)]
    batches = Batches(splits, [3, 1], CONFIG, seed=0)
    assert batches.weights == [0.75, 0.25]
    assert batches.mix(1) == [0.75, 0.25]
    tokens = torch.cat([batches[step].tokens for step in range(1, 9)])
    assert (tokens[:, 0] >= 500).float().mean() == 0.25
    assert batches.mix(8) == [0.75, 0.25]
    assert {store for store, _ in batches.documents(1, 0, 4)} == {0, 1}
    assert Batches(splits, None, CONFIG, seed=0).weights == [0.5, 0.5]


def test_validation_reads_each_token_once_whatever_the_processes():
    split = make_split([6, 5, 3])

    def targets(world, max_tokens=None):
        batches = [b for rank in range(world) for b in validation_batches(split, CONFIG, rank, world, max_tokens)]
        return sorted(t for b in batches for t in b.targets.flatten().tolist() if t != IGNORE)

    expected = sorted([1, 2, 3, 4, 5, 1001, 1002, 1003, 1004, 2001, 2002])
    assert targets(1) == targets(2) == targets(3) == expected
    assert targets(2, max_tokens=8) == sorted([1, 2, 3, 4, 5, 1001])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BatchConfig(sequence_length=1), "sequence_length must be at least 2, got 1"),
        (lambda: BatchConfig(micro_batch_size=0), "micro_batch_size must be at least 1, got 0"),
        (lambda: BatchConfig(sequence_length=4, batch_tokens=18, micro_batch_size=2), "must be a multiple of .* = 8, got 18"),
        (lambda: CONFIG.micro_steps(3), "4 x 2 x 3, got 16"),
        (lambda: Batches([make_split([40])], [1, 2], CONFIG, 0), "one weight per data folder, got 2 for 1"),
        (lambda: Batches([make_split([40])], [0], CONFIG, 0), "must be positive numbers"),
        (lambda: Stream(FakeSplit(np.zeros(9), np.array([0, 9]), mask=np.zeros(2)), 4, 0), "a loss mask, which is not read yet"),
        (lambda: Stream(make_split([3, 1]), length=4, seed=0), "more than sequence_length = 4 training tokens, got 4"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_micro_steps():
    assert CONFIG.micro_steps(1) == 2
    assert CONFIG.micro_steps(2) == 1
    with pytest.raises(UserError):
        CONFIG.micro_steps(4)
