"""Splits of token stores made by hand. Document d holds 1000*d + 0, 1, 2 ..., so a token tells its place."""

import numpy as np

from lumi.data.token_store import Split


def make_split(lengths, first=0):
    """Text: documents of the given lengths."""
    tokens = np.concatenate([1000 * d + first + np.arange(n) for d, n in enumerate(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    return Split(tokens.astype(np.uint16), offsets, mask=None, num_bytes=len(tokens))


def make_conversations(masks):
    """Conversations: one string each, "+" for a trained token, "." for another."""
    split = make_split([len(mask) for mask in masks])
    split.mask = np.packbits(np.array([token == "+" for token in "".join(masks)]))
    return split


def make_pairs(masks):
    """Pairs: as `make_conversations`, the chosen one and the rejected one of each pair in turn."""
    split = make_conversations(masks)
    split.pairs = True
    return split
