import json

import pyarrow.parquet as pq
import pytest

from lumi.chat.messages import Message
from lumi.config import UserError
from lumi.corpus import ConversationBatch, CorpusBatch, is_corpus, read_corpus
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.documents import Attribution, text_of


def write(folder, documents, shard_bytes=1 << 20, **options):
    folder.mkdir(exist_ok=True)
    with CorpusWriter(folder, shard_bytes, **options) as writer:
        for index, document in enumerate(documents):
            writer.add(document, f"s{index % 2}", len(text_of(document).encode()))
        return writer.commit({"documents": len(documents)}, {"DATA_CARD.md": "# card\n"})


TEXTS = [f"document {index}\n\tmit Ümlaut 😀\n" for index in range(25)]


def test_licences_and_addresses_stand_beside_the_documents(tmp_path):
    labels = [Attribution("mit", "https://a"), Attribution("", ""), Attribution(None, None)]
    with CorpusWriter(tmp_path, 1 << 20, columns=["license", "url"]) as writer:
        for text, label in zip("abc", labels, strict=True):
            writer.add(text, "s", 1, label)
        manifest = writer.commit({"documents": 3}, {})
    assert manifest["columns"] == ["text", "source", "license", "url"]
    rows = pq.read_table(tmp_path / manifest["shards"][0]["file"]).to_pylist()
    assert [(row["license"], row["url"]) for row in rows] == [
        ("mit", "https://a"),
        (None, None),
        (None, None),
    ]
    reader = read_corpus(tmp_path)
    assert (reader.holds, list(reader)) == ("texts", [(text, "s") for text in "abc"])


def test_documents_come_back_in_order_with_their_sources(tmp_path):
    write(tmp_path / "c", TEXTS, shard_bytes=200)
    reader = read_corpus(tmp_path / "c")
    assert len(reader) == 25
    assert reader.num_shards == len(reader.manifest["shards"]) > 2
    assert list(reader) == [(text, f"s{index % 2}") for index, text in enumerate(TEXTS)]
    batches = list(reader.iter_batches(batch_documents=4))
    assert all(
        isinstance(batch, CorpusBatch) and 1 <= len(batch.texts) == len(batch.sources) <= 4
        for batch in batches
    )
    assert [text for batch in batches for text in batch.texts] == TEXTS
    shards = [
        [text for batch in reader.iter_shard(index) for text in batch.texts]
        for index in range(reader.num_shards)
    ]
    assert [text for shard in shards for text in shard] == TEXTS
    assert [len(shard) for shard in shards] == [shard["documents"] for shard in reader.manifest["shards"]]
    reader.verify()
    with pytest.raises(ValueError, match="batch_documents must be at least 1, got 0"):
        next(reader.iter_batches(batch_documents=0))


CONVERSATIONS = [
    (
        Message("system", "be\n\tkind"),
        Message("user", f"question {index} 😀"),
        Message("assistant", f"Ümlaut {index}\u2028"),
    )[index % 2 :]
    for index in range(25)
]


def test_conversations_come_back_in_order_with_their_sources(tmp_path):
    write(tmp_path / "c", CONVERSATIONS, shard_bytes=200, kind="conversations")
    reader = read_corpus(tmp_path / "c")
    assert reader.holds == "conversations"
    assert reader.manifest["columns"] == ["messages", "source"]
    assert reader.num_shards > 2
    batches = list(reader.iter_conversations(batch_documents=4))
    assert all(
        isinstance(batch, ConversationBatch) and 1 <= len(batch.conversations) <= 4 for batch in batches
    )
    pairs = [pair for batch in batches for pair in zip(batch.conversations, batch.sources, strict=True)]
    assert pairs == [(messages, f"s{index % 2}") for index, messages in enumerate(CONVERSATIONS)]
    assert all(isinstance(message, Message) for messages, _ in pairs for message in messages)
    assert list(reader.iter_texts())[:2] == [
        "be\n\tkind\nquestion 0 😀\nÜmlaut 0\u2028",
        "question 1 😀\nÜmlaut 1\u2028",
    ]


def test_texts_and_conversations_are_not_taken_for_each_other(tmp_path):
    write(tmp_path / "texts", TEXTS)
    write(tmp_path / "chat", CONVERSATIONS, kind="conversations")
    texts, chat = read_corpus(tmp_path / "texts"), read_corpus(tmp_path / "chat")
    assert texts.holds == "texts"
    assert list(texts.iter_texts()) == TEXTS
    with pytest.raises(
        UserError, match=r"texts must be a corpus of conversations here, got one of texts; .*chat.json"
    ):
        next(texts.iter_conversations())
    for read in (
        lambda: next(chat.iter_batches()),
        lambda: next(chat.iter_shard(0)),
        lambda: next(iter(chat)),
    ):
        with pytest.raises(
            UserError, match=r"chat must be a corpus of texts here, got one of conversations; `lumi tokenize`"
        ):
            read()


def test_a_truncated_shard_is_refused_when_opened(tmp_path):
    write(tmp_path, TEXTS)
    (shard,) = tmp_path.glob("shard-*.parquet")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(
        UserError,
        match=rf"{shard.name} must have {size} bytes, got {size - 7} bytes.*lumi prepare .*--use-cache",
    ):
        read_corpus(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"must have {size} bytes, got no file"):
        read_corpus(tmp_path)


def test_a_flipped_bit_is_refused_before_anything_is_read(tmp_path):
    write(tmp_path, TEXTS, shard_bytes=300)
    shard = sorted(tmp_path.glob("shard-*.parquet"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    reader = read_corpus(tmp_path)
    expected = reader.manifest["shards"][1]["sha256"]
    assert list(reader.iter_shard(0))
    with pytest.raises(UserError, match=rf"{shard.name} must have SHA-256 {expected}, got SHA-256 "):
        next(reader.iter_shard(1))
    with pytest.raises(UserError, match="must have SHA-256"):
        reader.verify()


def test_what_is_not_a_corpus_is_refused_with_the_command_that_makes_one(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"kind": "something"}')
    for name, got in [
        ("none", "nothing"),
        ("file", "a file"),
        ("other", "a folder without the manifest.json of a corpus"),
    ]:
        with pytest.raises(
            UserError,
            match=rf"{name} must be a corpus folder, got {got}; make one: lumi prepare .* --output-dir",
        ):
            read_corpus(tmp_path / name)
        assert not is_corpus(tmp_path / name)
    write(tmp_path / "good", TEXTS)
    assert is_corpus(tmp_path / "good")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format must be 1, got 99"),
        (
            {"columns": ["prompt"]},
            r"columns must be text, source or .*, got \['prompt'\]",
        ),
        ({"shards": None}, "must hold documents and shards"),
        ({"shards": [{"file": "x"}]}, "shards must hold bytes, documents, file, sha256"),
        ({"shards": [{"file": "../x", "bytes": 1, "sha256": "", "documents": 1}]}, "shards must hold"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, change, message):
    manifest = write(tmp_path, TEXTS)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        read_corpus(tmp_path)
