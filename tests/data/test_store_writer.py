import hashlib

import numpy as np
import pytest

from lumi.config import UserError
from lumi.data.store_manifest import Counts, FileRecord
from lumi.data.store_writer import StoreWriter
from lumi.data.token_store import TokenStore


def test_uint32_past_65536_ids(tmp_path):
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=70000)
    writer.append(
        "train", np.array([1, 69999, 2]), np.array([3]), {"a": Counts(documents=1, tokens=3, bytes=4)}
    )
    assert writer.finish({}).dtype == "uint32"
    expected = b"".join(value.to_bytes(4, "little") for value in (1, 69999, 2))
    assert (tmp_path / "train.tokens").read_bytes() == expected
    assert TokenStore.open(tmp_path).split("train").tokens[:].tolist() == [1, 69999, 2]


def test_loss_masks_are_bits_across_batches(tmp_path):
    rng = np.random.default_rng(0)
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=100)
    masks = []
    for lengths in ([3], [7, 1], [8], [2, 2, 2], [13]):
        total = sum(lengths)
        masks.append(rng.random(total) < 0.5)
        counts = {"a": Counts(documents=len(lengths), tokens=total)}
        writer.append("train", np.zeros(total, np.int64), np.array(lengths), counts, masks[-1])
    manifest = writer.finish({"kind": "conversations"}, "plain")
    assert manifest.splits["train"].trained_tokens == int(np.concatenate(masks).sum())
    expected = np.concatenate(masks)
    split = TokenStore.open(tmp_path).split("train")
    assert (tmp_path / "train.mask").read_bytes() == np.packbits(expected).tobytes()
    assert split.mask is not None
    assert len(split.mask) == 5  # 38 bits
    for start in range(38):
        for stop in range(start, 39):
            assert split.loss_mask(start, stop).tolist() == expected[start:stop].tolist()
    (tmp_path / "train.mask").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"train.mask: must be 5 bytes, got 4"):
        TokenStore.open(tmp_path)


def test_each_block_of_the_tokens_has_its_hash(tmp_path):
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=50_000)
    tokens = np.random.default_rng(0).integers(0, 50_000, 600_000)  # 1.2 MB
    counts = {"a": Counts(documents=1, tokens=len(tokens))}
    writer.append("train", tokens, np.array([len(tokens)]), counts)
    split = writer.finish({}).splits["train"]
    data = tokens.astype("<u2").tobytes()
    hashes = b"".join(hashlib.sha256(block).digest() for block in (data[: 1 << 20], data[1 << 20 :]))
    assert (tmp_path / "train.blocks").read_bytes() == hashes
    assert split.blocks == FileRecord(size=64, sha256=hashlib.sha256(hashes).hexdigest())
    assert split.files.keys() == {"train.tokens", "train.offsets"}


def test_the_writer_refuses_what_does_not_add_up(tmp_path):
    writer = StoreWriter(tmp_path, tokenizer_fingerprint="f", vocab_size=100)
    tokens, lengths = np.arange(5), np.array([2, 3])
    counts, one_document, four_tokens = (
        {"a": Counts(documents=documents, tokens=tokens, bytes=9)}
        for documents, tokens in ((2, 5), (1, 5), (2, 4))
    )
    for wrong in (100, -1):
        with pytest.raises(UserError, match=f"token ids must be between 0 and 99, got .*{wrong}"):
            writer.append("train", np.array([wrong, 1, 2, 3, 4]), lengths, counts)
    for bad_lengths, bad_counts in (
        ([2, 2], counts),
        ([0, 5], counts),
        (lengths, one_document),
        (lengths, four_tokens),
    ):
        with pytest.raises(ValueError, match="lengths must be at least 1 and add up"):
            writer.append("train", tokens, np.array(bad_lengths), bad_counts)
    with pytest.raises(ValueError, match="mask must have one value for each of 5 tokens, got 4"):
        writer.append("train", tokens, lengths, counts, np.ones(4, bool))
    writer.append("train", tokens, lengths, counts)
    with pytest.raises(ValueError, match="mask must be given for every document of a split or for none"):
        writer.append("train", tokens, lengths, counts, np.ones(5, bool))
    writer.close()
