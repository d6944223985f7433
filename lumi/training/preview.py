"""What fine-tuning is about to train, shown before it begins."""

from collections.abc import Sequence

import numpy as np

from lumi.data.rows import ConversationRows
from lumi.data.store_manifest import SplitManifest
from lumi.data.token_store import Split
from lumi.tokenizer.tokenizer import Tokenizer

OPEN, CLOSE = "[[", "]]"


def marked_example(
    split: Split, document: int, length: int, tokenizer: Tokenizer, max_tokens: int = 400
) -> str:
    """The first `length` tokens of a conversation: control tokens spelt out, trained ones in [[ and ]]."""
    begin = int(split.offsets[document])
    end = begin + length
    ids, trained = split.tokens[begin:end][:max_tokens].tolist(), split.loss_mask(begin, end)[:max_tokens]
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()
    pieces = [_spell(ids[a:b], tokenizer) for a, b in zip([0, *edges], [*edges, len(ids)], strict=True)]
    text = "".join(piece if index % 2 == 0 else f"{OPEN}{piece}{CLOSE}" for index, piece in enumerate(pieces))
    return text + (f" ... ({end - begin - max_tokens} more tokens)" if end - begin > max_tokens else "")


def _spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    names = {token: piece for piece, token in tokenizer.control_ids.items()}
    text, plain = "", list[int]()
    for token in ids:
        if token in names:
            text, plain = text + tokenizer.decode(plain, continues=True) + names[token], []
        else:
            plain.append(token)
    return text + tokenizer.decode(plain, continues=True)


def describe_conversations(
    name: str, rows: ConversationRows, stored: SplitManifest, tokenizer: Tokenizer
) -> str:
    """What a run trains of a store: the share of its tokens, what is left out, and a marked example."""
    padding = 1 - rows.num_tokens / (rows.rows_per_epoch * rows.capacity)
    dropped = "".join(
        f"; {count:,} {reason} left out by tokenize" for reason, count in stored.dropped.items()
    )
    first, pairs = int(np.flatnonzero(rows.lengths)[0]), rows.split.pairs
    num_kept, num_dropped = len(rows.lengths) - rows.num_dropped, rows.num_dropped
    longer = f"{rows.num_cut:,} end at an earlier answer, {num_dropped:,} left out"
    if pairs:
        num_kept, longer = num_kept // 2, f"{num_dropped // 2:,} left out"
    examples = (
        marked_example(rows.split, document, int(rows.lengths[document]), tokenizer)
        for document in ((first, first + 1) if pairs else (first,))
    )
    return (
        f"{name}: {num_kept:,} {'pairs' if pairs else 'conversations'} in {rows.rows_per_epoch:,} rows "
        f"({padding:.1%} padding)\n"
        f"  trained: {rows.num_trained:,} of {rows.num_tokens:,} tokens "
        f"({rows.num_trained / rows.num_tokens:.1%})\n"
        f"  longer than a row: {longer}{dropped}\n"
        f"  an example{', chosen and rejected' if pairs else ''}, "
        f"what is trained between {OPEN} and {CLOSE}:\n" + "\n".join(examples)
    )
