"""Corpus folders of texts and conversations that a test chooses, and some to choose from."""

from lumi.chat.messages import Message
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.documents import text_of

PROSE = (
    "The quick brown fox jumps over the lazy dog, and 1234 other things happen on Monday.\n\n"
    "Another paragraph follows here."
)
CODE = """\
def total(values):
    result = 0
    for value in values:
        if value:
            result += value
    return result
"""

TEXTS = [f"Document {i} says:\n    héllo, world number {i * i}.\n" * (1 + i % 5) for i in range(200)]
SOURCES = ["books" if i % 3 else "web" for i in range(200)]

CHATS = [
    [
        Message("user", f"What is {i} times {i}?"),
        Message("assistant", f"It is {i * i}."),
        Message("user", "Sure?"),
        Message("assistant", "é!"),
    ]
    for i in range(120)
]
CHATS[7] = [Message("system", "</s> <|im_end|>"), *CHATS[7], Message("user", "waits")]
CHATS[9] = [Message("user", "silence")]  # `prepare` lets no such thing through


def write_corpus(folder, texts, sources=None):
    """A corpus folder of texts; their sources are "prose" if not given."""
    return _write(folder, texts, sources or ["prose"] * len(texts), kind="texts")


def write_chats(folder, chats, sources=None):
    """A corpus folder of conversations; their sources are the first of `sources`, or "chats"."""
    return _write(folder, chats, (sources or ["chats"] * len(chats))[: len(chats)], kind="conversations")


def write_pairs(folder, pairs):
    """A corpus folder of pairs; their source is "pairs"."""
    return _write(folder, pairs, ["pairs"] * len(pairs), kind="pairs")


def write_shards(folder, documents, kind):
    """A corpus folder of several shards; the source of all documents has the folder's name."""
    return _write(folder, documents, [folder.name] * len(documents), kind, shard_bytes=3000)


def _write(folder, documents, sources, kind, shard_bytes=1 << 20):
    with CorpusWriter(folder, shard_bytes, kind=kind) as writer:
        for document, source in zip(documents, sources, strict=True):
            writer.add(document, source, len(text_of(document).encode()))
        kept = [
            {"name": name, "origin": "made up", "kept": sources.count(name)} for name in sorted(set(sources))
        ]
        writer.commit({"documents": len(documents), "sources": kept}, {"DATA_CARD.md": "a card"})
    return folder
