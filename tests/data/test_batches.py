from dataclasses import replace

import numpy as np
import pytest
import torch
from splits import make_conversations, make_pairs, make_split

from lumi.config import UserError
from lumi.data.batches import IGNORE, BatchConfig, Batches, PairIndex, collate, interleave, validation_batches
from lumi.data.rows import TokenRow
from lumi.kernels.attention_plan import IntervalPlan

CONFIG = BatchConfig(sequence_length=4, batch_tokens=16, micro_batch_size=2)


def test_collate_by_hand():
    rows = [
        TokenRow(
            np.array([1, 5, 6, 2, 1]), np.array([1, 0, 0, 0, 1], dtype=bool), np.ones(5, dtype=bool), [0, 1]
        ),
        TokenRow(
            np.array([7, 2, 1, 8, 9]),
            np.array([0, 0, 1, 0, 0], dtype=bool),
            np.array([1, 1, 1, 0, 1], dtype=bool),
            [1, 2],
        ),
    ]
    batch = collate(rows)
    assert batch.tokens.tolist() == [[1, 5, 6, 2], [7, 2, 1, 8]]
    assert batch.targets.tolist() == [[5, 6, 2, IGNORE], [2, IGNORE, IGNORE, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.num_targets == 5


def test_a_batch_moves_with_all_that_it_holds():
    """Tensors in parts of it and in its plans too; the rest stays. "meta" stands for a device."""
    plan = IntervalPlan(
        batch=2,
        length=4,
        **{name: torch.zeros(8, dtype=torch.int32) for name in ("first_key", "last_query")},
        **{name: torch.zeros(1, dtype=torch.int32) for name in ("query_order", "key_order")},
    )
    pairs = PairIndex(torch.tensor([0, 1]), torch.tensor([0, 1]))
    batch = Batches([make_split([7, 3])], None, CONFIG, seed=1).rows(1, 0, 2)
    assert batch.documents is batch.cu_seqlens
    batch = replace(batch, pairs=pairs, plans={None: plan, 3: plan})
    assert batch.documents is batch.plans
    moved = batch.to(torch.device("meta"))
    assert moved.plans.keys() == {None, 3}
    assert (moved.plans[3].batch, moved.plans[3].length) == (2, 4)
    found = [moved.tokens, moved.cu_seqlens, moved.pairs.segments, moved.plans[3].key_order]
    assert all(tensor.device.type == "meta" for tensor in found)
    assert batch.plans[3].key_order.device.type == "cpu"


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
        # t+1, and never across documents.
        assert torch.equal(batch.targets[trained], batch.tokens[trained] + 1)
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
        batches = [
            b for rank in range(world) for b in validation_batches(split, CONFIG, rank, world, max_tokens)
        ]
        return sorted(t for b in batches for t in b.targets.flatten().tolist() if t != IGNORE)

    expected = sorted([1, 2, 3, 4, 5, 1001, 1002, 1003, 1004, 2001, 2002])
    assert targets(1) == targets(2) == targets(3) == expected
    assert targets(2, max_tokens=8) == sorted([1, 2, 3, 4, 5, 1001])


def test_validation_of_conversations_reads_each_answer_once_whatever_the_processes():
    split = make_conversations(["..++", ".+", "..+..+", "...++"])

    def targets(world, max_tokens=None):
        config = BatchConfig(sequence_length=6, batch_tokens=12, micro_batch_size=1)
        batches = [
            b for rank in range(world) for b in validation_batches(split, config, rank, world, max_tokens)
        ]
        return sorted(t for b in batches for t in b.targets.flatten().tolist() if t != IGNORE)

    assert targets(1) == targets(2) == targets(3) == [2, 3, 1001, 2002, 2005, 3003, 3004]
    assert 0 < len(targets(1, max_tokens=6)) < 7


def test_the_targets_of_conversations_are_their_answers_alone():
    split = make_conversations(["..++", ".+", "..+..+", "...++", ".++"])
    batches = Batches([split], None, CONFIG, seed=1)
    answers = {
        int(token)
        for token, trained in zip(split.tokens, split.loss_mask(0, len(split.tokens)), strict=True)
        if trained
    }
    seen = set()
    for step in range(1, 12):
        batch = batches[step]
        trained = batch.targets != IGNORE
        assert torch.equal(batch.targets[trained], batch.tokens[trained] + 1)
        seen |= set(batch.targets[trained].tolist())
    assert seen == answers - {2005}  # "..+..+" ends behind its first answer in rows of 5 tokens


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BatchConfig(sequence_length=1), "sequence_length must be at least 2, got 1"),
        (lambda: BatchConfig(micro_batch_size=0), "micro_batch_size must be at least 1, got 0"),
        (
            lambda: BatchConfig(sequence_length=4, batch_tokens=18, micro_batch_size=2),
            "must be a multiple of .* = 8, got 18",
        ),
        (lambda: CONFIG.micro_steps(3), "4 x 2 x 3, got 16"),
        (lambda: Batches([make_split([40])], [1, 2], CONFIG, 0), "one weight per data folder, got 2 for 1"),
        (lambda: Batches([make_split([40])], [0], CONFIG, 0), "must be positive numbers"),
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


def test_pairs_are_found_in_their_batch():
    """Each conversation's span holds its tokens, and its number is that among all stores."""
    masks = [[".++", "..+", ".+", ".++++"], [".+++", ".+", "..+", ".+"] * 2]
    splits = [make_pairs(each) for each in masks]
    config = BatchConfig(sequence_length=11, batch_tokens=66, micro_batch_size=2)
    batches = Batches(splits, None, config, 0)
    for step in range(1, 4):
        batch = batches[step]
        assert batch.num_targets == len(batch.pairs.documents) // 2 > 3
        named = [
            document + (len(masks[0]) if store else 0)
            for store, documents in batches.documents(step, 0, 6)
            for document in documents
        ]
        assert batch.pairs.documents.tolist() == named
        tokens, targets, spans = batch.tokens.flatten(), batch.targets.flatten(), batch.cu_seqlens.tolist()
        seen = torch.zeros(len(tokens), dtype=torch.bool)
        for document, segment in zip(named, batch.pairs.segments.tolist(), strict=True):
            local = document - len(masks[0]) * (document >= len(masks[0]))
            mask = masks[document >= len(masks[0])][local]
            span = slice(spans[segment], spans[segment] + len(mask) - 1)
            assert tokens[span].tolist() == [1000 * local + place for place in range(len(mask) - 1)]
            trained = [
                1000 * local + place if mask[place] == "+" else IGNORE for place in range(1, len(mask))
            ]
            assert targets[span].tolist() == trained
            seen[span] = True
        assert (targets[~seen] == IGNORE).all()
    moved = batch.to(torch.device("meta"))
    assert {moved.targets.device.type, moved.pairs.segments.device.type} == {"meta"}


def test_every_process_gets_validation_batches_of_pairs():
    split = make_pairs([".+++", "..++"] * 3)
    config = BatchConfig(sequence_length=8, batch_tokens=16, micro_batch_size=1)
    shares = [list(validation_batches(split, config, rank, 2, None)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    found = [sorted(d for batch in share for d in batch.pairs.documents.tolist()) for share in shares]
    assert sorted(found[0] + found[1]) == list(range(6))
    last = shares[1][1]
    assert (last.num_targets, last.pairs.segments.tolist()) == (0, [])
    assert (last.targets == IGNORE).all()
