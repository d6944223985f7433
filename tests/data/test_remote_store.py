"""A token store behind a URL against the same one on disk."""

import json

import fsspec
import numpy as np
import pytest
from s3_server import bucket

import lumi.host.remote
from lumi.config import UserError
from lumi.data.batches import BatchConfig, Batches
from lumi.data.block_cache import DEFAULT_BYTES
from lumi.data.remote_store import open_remote_store
from lumi.data.store_manifest import BLOCK_BYTES, Counts, read_store_manifest
from lumi.data.store_writer import StoreWriter
from lumi.data.token_store import TokenStore
from lumi.host.provenance import from_plain, read_provenance, to_plain
from lumi.provenance.chain import verify

NUM_TOKENS = 1_300_000  # 2.6 MB: three blocks


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A store of random tokens, a few thousand of them held out."""
    folder, rng = tmp_path_factory.mktemp("local"), np.random.default_rng(0)
    writer = StoreWriter(folder, tokenizer_fingerprint="f", vocab_size=50_000)
    for split, num_tokens in (("train", NUM_TOKENS), ("validation", 5000)):
        lengths = (
            rng.multinomial(num_tokens - num_tokens // 500, [500 / num_tokens] * (num_tokens // 500)) + 1
        )
        counts = {"a": Counts(documents=len(lengths), tokens=int(lengths.sum()))}
        writer.append(split, rng.integers(0, 50_000, int(lengths.sum())), lengths, counts)
    writer.finish({})
    return folder


@pytest.fixture
def url(local, tmp_path, monkeypatch):
    """The same store in memory, of this test alone; failures are not waited for."""
    monkeypatch.setattr(lumi.host.remote.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}"
    upload(local, url)
    return url


def upload(folder, url):
    files, _ = fsspec.url_to_fs(url)
    for path in folder.iterdir():
        files.pipe_file(f"{url}/{path.name}", path.read_bytes())


def opened(url, cache_bytes=DEFAULT_BYTES, **more):
    return open_remote_store(url, cache_bytes=cache_bytes, **more)


def blocks(tmp_path):
    return [path for path in (tmp_path / "cache/lumi/remote/blocks").rglob("*") if path.is_file()]


def assert_same(remote, local):
    mine = TokenStore.open(local)
    assert remote.manifest == mine.manifest
    for name, split in mine.splits.items():
        theirs, size = remote.split(name), len(split.tokens)
        assert (theirs.offsets == split.offsets).all()
        assert (theirs.tokens[:] == split.tokens[:]).all()
        edge = BLOCK_BYTES // 2
        for start, stop in ((0, 1), (edge - 3, edge + 5), (edge, edge), (size - 2, size), (7, 1_200_000)):
            assert theirs.tokens[start:stop].tolist() == split.tokens[start:stop].tolist()


def test_the_store_is_the_one_on_disk(url, local, tmp_path, capsys):
    assert_same(opened(url), local)
    assert capsys.readouterr().err == ""
    sizes = sorted(path.stat().st_size for path in blocks(tmp_path))
    assert sizes[-2:] == [BLOCK_BYTES] * 2
    assert len(sizes) == 4


def test_the_rows_are_those_of_the_store_on_disk_in_their_order(url, local):
    config = BatchConfig(sequence_length=64, batch_tokens=64 * 16, micro_batch_size=4)
    mine, theirs = (
        Batches([store.split("train")], None, config, seed=3)
        for store in (TokenStore.open(local), opened(url))
    )
    for step in (1, 2, 1500):  # of the second epoch
        assert (mine[step].tokens == theirs[step].tokens).all()
        assert (mine[step].targets == theirs[step].targets).all()


def test_only_blocks_that_are_needed_come_and_only_once(url, tmp_path, monkeypatch):
    store = opened(url)
    assert blocks(tmp_path) == []
    first = store.split("train").tokens[:10].tolist()
    assert len(blocks(tmp_path)) == 1
    fsspec.filesystem("memory").rm(f"{url}/train.tokens")
    again = opened(url).split("train").tokens
    assert again[:10].tolist() == first
    with pytest.raises(UserError, match=rf"^{url}/train.tokens: is missing"):
        again[BLOCK_BYTES : BLOCK_BYTES + 1]


@pytest.mark.parametrize("limit", [1, BLOCK_BYTES, 2 * BLOCK_BYTES])
def test_a_cache_that_is_smaller_than_the_store(url, local, tmp_path, capsys, limit):
    assert_same(opened(url, limit), local)
    assert f"{url}: its 0.0026 GB of tokens are more than the cache's" in capsys.readouterr().err
    assert sum(path.stat().st_size for path in blocks(tmp_path)) <= limit


def test_blocks_that_are_damaged_or_gone_come_again(url, local, tmp_path):
    assert_same(opened(url), local)
    store = opened(url)
    for path, data in zip(sorted(blocks(tmp_path)), (b"", b"short", bytes(BLOCK_BYTES), None), strict=True):
        path.write_bytes(data) if data is not None else path.unlink()
    assert_same(store, local)
    for path in blocks(tmp_path):  # in use
        path.unlink()
    assert_same(store, local)
    home = store.folder
    for name in ("train.offsets", "train.blocks"):
        (home / name).write_bytes(bytes(len((home / name).read_bytes())))
    assert_same(opened(url), local)


def test_bytes_that_are_others_than_were_written_are_refused(url, tmp_path):
    files, _ = fsspec.url_to_fs(url)
    data = bytearray(files.cat_file(f"{url}/train.tokens"))
    data[BLOCK_BYTES + 5] ^= 1
    files.pipe_file(f"{url}/train.tokens", bytes(data))
    tokens = opened(url).split("train").tokens
    assert len(tokens[: BLOCK_BYTES // 2]) == BLOCK_BYTES // 2
    expected = (
        rf"^{url}/train.tokens: cannot be fetched, after 6 tries: .*bytes 1048576 to 2097152: must have"
    )
    with pytest.raises(UserError, match=expected):
        tokens[BLOCK_BYTES // 2 : BLOCK_BYTES // 2 + 1]
    assert len(blocks(tmp_path)) == 1
    files.pipe_file(f"{url}/train.offsets", bytes(8))
    with pytest.raises(
        UserError, match=rf"^{url}/train.offsets: cannot be fetched, .* must be \d+ bytes, got 8"
    ):
        opened(url, cache_dir=tmp_path / "another")


def test_what_is_no_store_of_this_tokenizer(url, local):
    with pytest.raises(UserError, match=r"^memory://nowhere/manifest.json: is missing; check the URL"):
        opened("memory://nowhere")
    with pytest.raises(
        UserError, match=rf"^{url}: .* must be made with the tokenizer of fingerprint other, got"
    ):
        opened(url, tokenizer_fingerprint="other")
    files, _ = fsspec.url_to_fs(url)
    manifest = json.loads((local / "manifest.json").read_text())
    for split in manifest["splits"].values():
        del split["blocks"]
    files.pipe_file(f"{url}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(
        UserError, match=rf"^{url}: must hold train.blocks, .*, got a token store of an earlier"
    ):
        opened(url)
    files.pipe_file(f"{url}/manifest.json", b'{"kind": "else"}')
    with pytest.raises(UserError, match=rf"^{url}: .* must be a finished token store"):
        opened(url)


def test_a_store_that_was_replaced_is_fetched_anew(url, local, tmp_path):
    opened(url).split("train").tokens[:]
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=50_000)
    writer.append("train", np.arange(100), np.array([100]), {"a": Counts(documents=1, tokens=100)})
    writer.finish({})
    for name in ("manifest.json", "train.tokens", "train.offsets", "train.blocks"):
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", (tmp_path / name).read_bytes())
    assert opened(url).split("train").tokens[:].tolist() == list(range(100))


def test_offsets_of_another_store_of_the_same_size_are_not_taken(url, local):
    home = opened(url).folder
    offsets = np.fromfile(home / "train.offsets", "<u8")
    offsets[1] += 1
    offsets.tofile(home / "train.offsets")
    assert_same(opened(url, quiet=True), local)


def test_what_it_records_is_the_url(url, local, tmp_path):
    parent = opened(url).as_parent
    assert parent.identity == read_store_manifest(local).fingerprint
    (plain,) = to_plain([parent], tmp_path)
    assert plain["path"] == url
    assert from_plain([plain], tmp_path / "elsewhere") == (parent,)
    assert read_provenance(parent.path).kind == "token store"
    link = verify(parent.path)
    assert (link.kind, link.verdict, link.identity) == ("token store", "not recorded", parent.identity)


def test_on_s3(local, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with bucket(monkeypatch) as url:
        upload(local, f"{url}/tokens")
        assert_same(opened(f"{url}/tokens"), local)
        assert len(blocks(tmp_path)) == 4
        with pytest.raises(UserError, match=rf"^{url}/nothing/manifest.json: is missing"):
            opened(f"{url}/nothing")
