"""Splits of token stores made by hand; document d holds 1000*d + 0, 1, 2 ... so that every token tells where it comes from."""

import numpy as np

from lumi.data.token_store import Split


def make_split(lengths, first=0):
    """Text: documents of the given lengths."""
    tokens = np.concatenate([1000 * d + first + np.arange(n) for d, n in enumerate(lengths)])
    return Split(
        tokens.astype(np.uint16),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64),
        None,
        len(tokens),
    )


def make_conversations(masks):
    """Conversations: one string each, "+" for a trained token, "." for another."""
    split = make_split([len(mask) for mask in masks])
    split.mask = np.packbits(np.array([token == "+" for token in "".join(masks)]))
    return split
