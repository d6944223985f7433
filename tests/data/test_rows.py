import numpy as np
import pytest
from splits import make_conversations, make_pairs, make_split

from lumi.config import UserError
from lumi.data.rows import ConversationRows, TextRows, cut_row, make_rows, pack, validation_rows


def test_an_epoch_reads_every_target_once():
    lengths = [5, 1, 9, 3, 2, 12, 1]
    split = make_split(lengths)
    text = TextRows(split, length=4, seed=3)
    assert text.rows_per_epoch == 8
    epochs = [[text.row(epoch * 8 + row) for row in range(8)] for epoch in range(2)]
    for rows in epochs:
        targets = np.concatenate([row.tokens[1:] for row in rows]).tolist()
        everything = split.tokens.tolist()
        assert len(targets) == 32
        assert all(targets.count(token) <= everything.count(token) for token in targets)
        # Every document's start is a target once, except that of the epoch's first one.
        assert sum(row.starts[1:].sum() for row in rows) == len(lengths) - 1
        assert {document for row in rows for document in row.documents} == set(range(len(lengths)))
    assert [row.tokens.tolist() for row in epochs[0]] != [row.tokens.tolist() for row in epochs[1]]
    again = TextRows(split, length=4, seed=3)
    assert again.row(13).tokens.tolist() == epochs[1][5].tokens.tolist()


def test_the_rows_of_a_long_document_are_scattered():
    text = TextRows(make_split([400, 400]), length=4, seed=0)
    documents = [text.row(i).documents[0] for i in range(100)]
    assert 25 < sum(documents) < 75


def test_cut_row_by_hand():
    split = make_split([3, 1, 4])  # 0 1 2 | 1000 | 2000 2001 2002 2003
    order = np.array([2, 0, 1])
    row = cut_row(split, order, np.array([4, 7, 8]), 2, 6)
    assert row.tokens.tolist() == [2002, 2003, 0, 1, 2, 1000]
    assert row.starts.tolist() == [False, False, True, False, False, True]
    assert row.documents == [2, 0, 1]
    assert row.trained.all()
    padded = cut_row(split, order, np.array([4, 7, 8]), 6, 2, 5)
    assert padded.tokens.tolist() == [2, 1000, 0, 0, 0]
    assert padded.starts.tolist() == [False, True, True, False, False]
    assert padded.trained.tolist() == [True, True, False, False, False]


def test_pack_by_hand():
    # rows of 10: 6 | 6+4 | 6+4, 7 | 6+4, 7+3 | and so on: each goes where it leaves least room
    lengths = np.array([6, 4, 7, 3, 5, 5, 10, 1])
    assert pack(lengths, range(8), 10) == [[0, 1], [2, 3], [4, 5], [6], [7]]
    assert pack(lengths, [2, 0, 1, 3], 10) == [[2, 3], [0, 1]]


def test_packing_keeps_every_document_whole_and_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 300, size=3000)
    rows = pack(lengths, range(3000), 513)
    assert sorted(document for row in rows for document in row) == list(range(3000))
    assert all(lengths[row].sum() <= 513 for row in rows)
    assert lengths.sum() / (513 * len(rows)) > 0.98


def test_a_packed_row_by_hand():
    rows = ConversationRows(make_conversations(["..++", ".+"]), length=7, seed=0)
    row = rows.row(0)
    first, second = ([0, 1, 2, 3], [1000, 1001]) if row.documents == [0, 1] else ([1000, 1001], [0, 1, 2, 3])
    assert row.tokens.tolist() == [*first, *second, 0, 0]
    starts = [0, len(first), 6]
    assert np.flatnonzero(row.starts).tolist() == starts  # the padding is a document of its own
    assert {int(token) for token in row.tokens[row.trained]} == {2, 3, 1001}
    assert not row.trained[6:].any()
    assert (rows.rows_per_epoch, rows.num_tokens, rows.num_cut, rows.num_dropped) == (1, 6, 0, 0)


def test_a_conversation_longer_than_a_row_ends_behind_its_last_answer_that_fits():
    masks = ["..++..++..++", "......++", "..++++", ".++..", "...."]
    rows = ConversationRows(make_conversations(masks), length=5, seed=0)
    # capacity 6: the first keeps one answer; the second has none that fits; the third fills a row; the last
    # trains nothing
    assert rows.lengths.tolist() == [4, 0, 6, 5, 0]
    assert (rows.num_cut, rows.num_dropped, rows.num_tokens) == (1, 2, 15)
    assert rows.num_trained == 8
    trained = sorted(
        int(t)
        for place in range(rows.rows_per_epoch)
        for t in rows.packed(place).tokens[rows.packed(place).trained]
    )
    assert trained == [2, 3, 2002, 2003, 2004, 2005, 3001, 3002]


def test_an_answer_that_is_cut_in_the_middle_is_not_trained():
    rows = ConversationRows(make_conversations([".+.++++"]), length=4, seed=0)
    assert rows.lengths.tolist() == [2]


def test_epochs_of_conversations_are_the_same_rows_in_another_order():
    rows = ConversationRows(make_conversations(["..+"] * 40), length=5, seed=4)
    assert rows.rows_per_epoch == 20
    epochs = [[rows.row(epoch * 20 + index).documents for index in range(20)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    again = ConversationRows(make_conversations(["..+"] * 40), length=5, seed=4)
    assert again.row(27).documents == epochs[1][7]


def test_validation_rows_are_bounded():
    count, read = validation_rows(make_split([6, 5, 3]), 4, None)
    assert [read(index).tokens.tolist() for index in range(count)] == [
        [0, 1, 2, 3, 4],
        [4, 5, 1000, 1001, 1002],
        [1002, 1003, 1004, 2000, 2001],
        [2001, 2002, 0, 0, 0],
    ]
    assert validation_rows(make_split([6, 5, 3]), 4, 9)[0] == 2
    assert validation_rows(make_conversations(["..+"] * 40), 5, None)[0] == 20
    # With 7, a quarter of each row is padding.
    assert validation_rows(make_conversations(["..+"] * 40), 7, None)[0] == 20
    assert validation_rows(make_conversations(["..+"] * 40), 5, 12)[0] == 3


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "got"),
    [
        ([6, 5, 3], 1, "none in the first 1 of 14 tokens"),
        ([1, 6], 2, "none in the first 2 of 7 tokens"),  # each document's first token is no target
        ([1, 1, 1], None, "none in 3 tokens"),
    ],
)
def test_a_validation_without_targets_is_refused(lengths, max_tokens, got):
    with pytest.raises(UserError, match=f"must hold at least one token to predict, got {got}; raise valid"):
        validation_rows(make_split(lengths), 4, max_tokens)
    count, read = validation_rows(make_split([1, 6]), 4, 3)
    assert [read(index).num_targets for index in range(count)] == [1]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (make_split([3, 1]), "more than sequence_length = 4 training tokens, got 4"),
        (
            make_conversations(["....+", "..."]),
            "an answer that ends within sequence_length = 3 tokens, got none",
        ),
    ],
)
def test_refuses(split, message):
    with pytest.raises(ValueError, match=message):
        make_rows(split, 4 if split.mask is None else 3, 0)


def test_a_pair_lies_side_by_side_or_is_left_out_whole():
    masks = [".++", "..+", ".+++++++", "..++", ".+", ".++++", "..+", ".++++++++"]
    rows = ConversationRows(make_pairs(masks), length=9, seed=1)
    assert rows.lengths.tolist() == [3, 3, 0, 0, 2, 5, 0, 0]  # 8 + 4 and 3 + 9 are more than 10
    assert (rows.num_cut, rows.num_dropped) == (0, 4)
    assert (rows.num_tokens, rows.num_trained) == (13, 3 + 5)
    assert sorted(rows.rows) == [[0, 1], [4, 5]]
    row = rows.packed(rows.rows.index([4, 5]))
    assert row.tokens.tolist() == [4000, 4001, 5000, 5001, 5002, 5003, 5004, 0, 0, 0]
    assert np.flatnonzero(row.starts).tolist() == [0, 2, 7]
    assert np.flatnonzero(row.trained).tolist() == [1, 3, 4, 5, 6]
    assert row.documents == [4, 5]


def test_pairs_share_rows():
    masks = [".+", "..+"] * 20
    rows = ConversationRows(make_pairs(masks), length=14, seed=0)
    assert all(len(row) == 6 for row in rows.rows[:6])
    places = [place for row in rows.rows for place in row]
    assert sorted(places) == list(range(40))
    assert all(rejected == chosen + 1 for chosen, rejected in zip(places[::2], places[1::2], strict=True))


def test_no_pair_fits():
    with pytest.raises(UserError, match="must hold a pair whose two conversations fit within"):
        make_rows(make_pairs([".++", "..+"]), 4, 0)
