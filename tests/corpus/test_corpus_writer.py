import pyarrow.parquet as pq
from datasets import load_dataset

from lumi.chat.messages import Message
from lumi.chat.pairs import Pair
from lumi.corpus import corpus_writer, read_corpus
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.documents import text_of


def write(folder, documents, shard_bytes=1 << 20, **options):
    folder.mkdir(exist_ok=True)
    with CorpusWriter(folder, shard_bytes, **options) as writer:
        for index, document in enumerate(documents):
            writer.add(document, f"s{index % 2}", len(text_of(document).encode()))
        return writer.commit({"documents": len(documents)}, {"DATA_CARD.md": "# card\n"})


CONVERSATIONS = [
    (Message("user", f"question {index} 😀"), Message("assistant", f"Ümlaut {index}\u2028"))
    for index in range(25)
]


def test_the_hub_reads_the_shards_of_conversations(tmp_path):
    write(tmp_path / "c", CONVERSATIONS, kind="conversations")
    (shard,) = (tmp_path / "c").glob("shard-*.parquet")
    rows = load_dataset("parquet", data_files=str(shard), split="train", streaming=True)
    assert [row["messages"] for row in rows] == [
        [{"role": message.role, "content": message.content} for message in messages]
        for messages in CONVERSATIONS
    ]


def test_the_hub_reads_the_shards_of_a_corpus_in_which_reasoning_comes_late(tmp_path):
    thought = (Message("user", "q"), Message("assistant", "a", "thought 😀"))
    conversations = [*CONVERSATIONS, thought, *CONVERSATIONS]
    manifest = write(tmp_path / "c", conversations, shard_bytes=200, kind="conversations")
    reader = read_corpus(tmp_path / "c")
    reader.verify()
    assert [chat for batch in reader.iter_conversations() for chat in batch.conversations] == conversations
    files = [str(tmp_path / "c" / shard["file"]) for shard in manifest["shards"]]
    assert [f"shard-{number:05d}" for number in range(len(files))] == [
        shard["file"][:11] for shard in manifest["shards"]
    ]
    assert sum(shard["documents"] for shard in manifest["shards"]) == 51
    rows = list(load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert rows[25]["messages"][1] == {"role": "assistant", "content": "a", "reasoning_content": "thought 😀"}
    assert [rows[index]["messages"][0]["reasoning_content"] for index in (0, 25, 50)] == [None] * 3


def test_pairs_in_which_reasoning_comes_late(tmp_path):
    (ask, answer), other = CONVERSATIONS[0], Message("assistant", "b")
    plain = Pair((ask,), (answer,), (other,))
    thought = plain._replace(rejected=(other._replace(reasoning="thought 😀"),))
    pairs = [*[plain] * 5, thought, *[plain] * 5]
    manifest = write(tmp_path / "c", pairs, shard_bytes=100, kind="pairs")
    reader = read_corpus(tmp_path / "c")
    reader.verify()
    assert [pair for documents, _ in reader.iter_documents() for pair in documents] == pairs
    files = [str(tmp_path / "c" / shard["file"]) for shard in manifest["shards"]]
    rows = list(load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert rows[5]["rejected"] == [{"role": "assistant", "content": "b", "reasoning_content": "thought 😀"}]
    assert [rows[index]["prompt"][0]["reasoning_content"] for index in (0, 5, 10)] == [None] * 3
    assert manifest["columns"] == ["prompt", "chosen", "rejected", "source"]


def test_shards_without_reasoning_have_no_column_of_it(tmp_path):
    (shard,) = write(tmp_path, CONVERSATIONS, kind="conversations")["shards"]
    schema = pq.read_schema(tmp_path / shard["file"])
    assert [field.name for field in schema.field("messages").type.value_type] == ["role", "content"]


def test_an_earlier_corpus_stays_whole_until_the_new_one_is(tmp_path):
    texts = [f"document {index}\n" for index in range(25)]
    old = write(tmp_path, texts)
    with CorpusWriter(tmp_path, 100) as writer:  # never committed, as if something had gone wrong
        for _ in range(50):
            writer.add("new text", "s", 8)
        assert len(writer.shards) > 2
    assert [text for text, _ in read_corpus(tmp_path)] == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["DATA_CARD.md", "manifest.json", old["shards"][0]["file"]]
    )
    new = write(tmp_path, ["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["DATA_CARD.md", "manifest.json", new["shards"][0]["file"]]
    )


def test_the_layout_says_what_ends_behind_a_document(monkeypatch):
    monkeypatch.setattr(corpus_writer, "ROW_GROUP_BYTES", 10)
    layout = corpus_writer.ShardLayout(25)
    assert [layout.add(size) for size in (9, 1, 10, 4, 1, 30)] == ["", "group", "group", "", "shard", "shard"]
    layout.add(10)
    layout.begin_shard()
    assert [layout.add(10) for _ in range(3)] == ["group", "group", "shard"]


def test_shards_that_are_written_one_by_one_are_those_of_one_writer(tmp_path):
    thought = (Message("user", "q"), Message("assistant", "a", "thought"))
    chats = [*CONVERSATIONS, thought, *CONVERSATIONS]
    manifest = write(tmp_path / "c", chats, shard_bytes=200, kind="conversations")
    begin = 0
    for number, shard in enumerate(manifest["shards"]):
        writer = CorpusWriter(
            tmp_path / str(number), 200, "conversations", first_shard=number, with_reasoning=begin >= 25
        )
        with writer:
            for index in range(begin, begin + shard["documents"]):
                writer.add(chats[index], f"s{index % 2}", len(text_of(chats[index]).encode()))
            assert writer.finish(with_reasoning=True) == [shard]
        begin += shard["documents"]
    assert begin == len(chats)
    assert len(manifest["shards"]) > 5
