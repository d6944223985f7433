import json

import pytest

from lumi.config import UserError
from lumi.corpus import CorpusBatch, is_corpus, read_corpus
from lumi.corpus.folder import CorpusWriter


def write(folder, texts, shard_bytes=1 << 20):
    folder.mkdir(exist_ok=True)
    with CorpusWriter(folder, shard_bytes) as writer:
        for index, text in enumerate(texts):
            writer.add(text, f"s{index % 2}", len(text.encode()))
        return writer.commit({"documents": len(texts)}, "# card\n")


TEXTS = [f"document {index}\n\tmit Ümlaut 😀\n" for index in range(25)]


def test_documents_come_back_in_order_with_their_sources(tmp_path):
    write(tmp_path / "c", TEXTS, shard_bytes=200)
    reader = read_corpus(tmp_path / "c")
    assert len(reader) == 25
    assert reader.num_shards == len(reader.manifest["shards"]) > 2
    assert list(reader) == [(text, f"s{index % 2}") for index, text in enumerate(TEXTS)]
    batches = list(reader.iter_batches(batch_documents=4))
    assert all(isinstance(batch, CorpusBatch) and 1 <= len(batch.texts) == len(batch.sources) <= 4 for batch in batches)
    assert [text for batch in batches for text in batch.texts] == TEXTS
    shards = [[text for batch in reader.iter_shard(index) for text in batch.texts] for index in range(reader.num_shards)]
    assert [text for shard in shards for text in shard] == TEXTS
    assert [len(shard) for shard in shards] == [shard["documents"] for shard in reader.manifest["shards"]]
    reader.verify()
    with pytest.raises(ValueError, match="batch_documents must be at least 1, got 0"):
        next(reader.iter_batches(batch_documents=0))


def test_a_truncated_shard_is_refused_when_opened(tmp_path):
    write(tmp_path, TEXTS)
    (shard,) = tmp_path.glob("shard-*.parquet")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{shard.name} must have {size} bytes, got {size - 7} bytes.*lumi prepare .*--use-cache"):
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
    for name, got in [("none", "nothing"), ("file", "a file"), ("other", "a folder without the manifest.json of a corpus")]:
        with pytest.raises(UserError, match=rf"{name} must be a corpus folder, got {got}; make one: lumi prepare --config .* --output-dir"):
            read_corpus(tmp_path / name)
        assert not is_corpus(tmp_path / name)
    write(tmp_path / "good", TEXTS)
    assert is_corpus(tmp_path / "good")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format must be 1, got 99"),
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


def test_an_earlier_corpus_stays_whole_until_the_new_one_is(tmp_path):
    old = write(tmp_path, TEXTS)
    with CorpusWriter(tmp_path, 100) as writer:  # never committed, as if something had gone wrong
        for _ in range(50):
            writer.add("new text", "s", 8)
        assert len(writer.shards) > 2
    assert [text for text, _ in read_corpus(tmp_path)] == TEXTS
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["DATA_CARD.md", "manifest.json", old["shards"][0]["file"]])
    new = write(tmp_path, ["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["DATA_CARD.md", "manifest.json", new["shards"][0]["file"]])
