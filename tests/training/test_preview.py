import numpy as np
import pytest
from splits import make_conversations

from lumi.chat.messages import Message
from lumi.chat.rendering import render
from lumi.chat.templates import TEMPLATES
from lumi.data.rows import ConversationRows
from lumi.data.store_manifest import SplitManifest
from lumi.data.token_store import Split
from lumi.training.preview import describe_conversations, marked_example


@pytest.fixture
def split(tokenizer):
    """One conversation of two turns whose user writes what looks like a marker."""
    messages = [
        Message("user", "Say </s> é."),
        Message("assistant", "é"),
        Message("user", "Why?"),
        Message("assistant", "So."),
    ]
    rendered = render(tokenizer, TEMPLATES["chatml"], messages)
    ids = np.array(rendered.ids, dtype=np.uint16)
    return Split(ids, np.array([0, len(ids)], dtype=np.uint64), np.packbits(rendered.mask), 5)


def test_what_is_trained_stands_between_marks(split, tokenizer):
    assert marked_example(split, 0, len(split.tokens), tokenizer) == (
        "<s><|im_start|>user\nSay </s> é.<|im_end|>\n<|im_start|>assistant\n[[é<|im_end|>]]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]"
    )


def test_the_example_ends_where_its_row_does(split, tokenizer):
    stored = SplitManifest(
        documents=1,
        tokens=len(split.tokens),
        bytes=5,
        trained_tokens=8,
        max_token_id=300,
        files={},
        sources={},
    )
    text = describe_conversations(
        "store", ConversationRows(split, len(split.tokens) - 5, seed=0), stored, tokenizer
    )
    assert "1 end at an earlier answer" in text
    assert text.endswith("[[é<|im_end|>]]")


def test_a_long_example_is_cut(split, tokenizer):
    size = len(split.tokens)
    assert (
        marked_example(split, 0, size, tokenizer, max_tokens=2)
        == f"<s><|im_start|> ... ({size - 2} more tokens)"
    )


def test_the_counts_by_hand(tokenizer):
    split = make_conversations(["..++", "..++..++", ".....+", "..+"])
    split.tokens = np.full_like(split.tokens, 300)  # ids that the tokenizer has
    stored = SplitManifest(
        documents=4,
        tokens=21,
        bytes=9,
        trained_tokens=8,
        dropped={"no_answer": 3},
        max_token_id=300,
        files={},
        sources={},
    )
    text = describe_conversations("store", ConversationRows(split, 4, seed=0), stored, tokenizer)
    # rows of 5 tokens: the second keeps its first answer, the third has none that fits; no two fit into one
    # row
    assert "store: 3 conversations in 3 rows (26.7% padding)" in text
    assert "trained: 5 of 11 tokens (45.5%)" in text
    assert (
        "longer than a row: 1 end at an earlier answer, 1 left out; 3 no_answer left out by tokenize" in text
    )
