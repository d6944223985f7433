import hashlib
import os

import numpy as np
import pytest

from lumi.config import UserError, read_json, write_json
from lumi.data import token_store
from lumi.data.batches import BatchConfig, Batches, prefetch
from lumi.data.token_cache import open_or_tokenize
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize


def test_a_missing_split_names_those_there_are(corpus, tokenizer, tmp_path):
    tokenize([corpus], tokenizer, tmp_path / "tokens", validation_fraction=0)
    store = TokenStore.open(tmp_path / "tokens")
    assert store.has_split("train")
    assert not store.has_split("validation")
    with pytest.raises(
        UserError, match=r"must hold the split 'validation', got train; .*--validation-fraction"
    ):
        store.split("validation")


def test_another_tokenizer_is_refused(finished, tokenizer, other_tokenizer):
    ours, theirs = tokenizer.fingerprint, other_tokenizer.fingerprint
    with pytest.raises(UserError, match=f"{theirs}, got a token store of {ours}; .*lumi tokenize "):
        TokenStore.open(finished, tokenizer_fingerprint=other_tokenizer.fingerprint)


def test_no_mask_means_every_token_is_trained(finished):
    split = TokenStore.open(finished).split("train")
    assert split.mask is None
    assert split.loss_mask(3, 9).tolist() == [True] * 6


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets", "validation.tokens", "validation.offsets"])
@pytest.mark.parametrize("verify", ["size", "hash"])
def test_truncated_and_missing_files(folder, name, verify):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    expected = rf"{name}: must be {len(data)} bytes"
    remedy = "copy the store again, or remove it and run"
    with pytest.raises(UserError, match=rf"{expected}, got {len(data) - 1}.*{remedy}"):
        TokenStore.open(folder, verify=verify)
    (folder / name).write_bytes(data + b"\0")
    changed = "the file is truncated or was changed"
    with pytest.raises(UserError, match=rf"{expected}, got {len(data) + 1}: {changed}"):
        TokenStore.open(folder, verify=verify)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing; copy the store again"):
        TokenStore.open(folder, verify=verify)


@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens"])
def test_one_flipped_bit(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[17] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{name}: SHA-256 must be [0-9a-f]{{64}}, got [0-9a-f]{{64}}: the file is corrupt"
    ):
        TokenStore.open(folder)


def rewrite(folder, name, change):
    """Change a file and record it in the manifest as though it had been written so."""
    values = np.fromfile(folder / name, dtype="<u8" if name.endswith("offsets") else "<u2")
    change(values)
    values.tofile(folder / name)
    manifest = read_json(folder / "manifest.json")
    manifest["splits"]["train"]["files"][name]["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    write_json(folder / "manifest.json", manifest)


def test_ids_outside_the_vocabulary_are_refused(folder):
    def change(values):
        values[-1] = 320

    rewrite(folder, "train.tokens", change)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 320"):
        TokenStore.open(folder)
    manifest = read_json(folder / "manifest.json")
    manifest["splits"]["train"]["max_token_id"] = 321
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 321"):
        TokenStore.open(folder, verify="size")


def test_ids_beyond_the_tokenizer_that_reads_them_are_refused(folder, tokenizer):
    """The fingerprint covers the model alone. With other files beside it a model may have fewer ids."""
    for verify in ("size", "hash"):
        highest = read_json(folder / "manifest.json")["splits"]["train"]["max_token_id"]
        assert (
            TokenStore.open(folder, vocab_size=highest + 1, verify=verify).split("validation").num_documents
            > 20
        )
        with pytest.raises(UserError, match=rf"train.tokens: ids must be below {highest}, got {highest}"):
            TokenStore.open(folder, vocab_size=highest, verify=verify)
    manifest = read_json(folder / "manifest.json") | {
        "vocab_size": 5000
    }  # one that claims more than the tokenizer has

    def change(values):
        values[3] = 4999

    write_json(folder / "manifest.json", manifest)
    rewrite(folder, "train.tokens", change)
    with pytest.raises(UserError, match=r"train.tokens: ids must be below 320, got 4999"):
        open_or_tokenize(folder, tokenizer)


def test_a_file_that_shrinks_in_the_middle_of_a_run(folder):
    """np.memmap would end the process here by SIGBUS, without a word."""
    splits = [TokenStore.open(folder).split("train")]
    batches = Batches(
        splits, None, BatchConfig(sequence_length=64, batch_tokens=256, micro_batch_size=1), seed=0
    )
    steps = prefetch(batches.__getitem__, range(1, 1000))
    assert next(steps)[1].tokens.shape == (4, 64)
    size = (folder / "train.tokens").stat().st_size
    os.truncate(folder / "train.tokens", size // 2)
    expected = rf"train.tokens: must be {size} bytes, got {size // 2}"
    with pytest.raises(UserError, match=rf"{expected}: the file was truncated while .* copy the store"):
        list(steps)


@pytest.mark.parametrize(("index", "value"), [(0, 1), (-1, 1 << 40), (5, 0)])
def test_offsets_that_do_not_rise_are_refused(folder, index, value):
    def change(values):
        values[index] = value

    rewrite(folder, "train.offsets", change)
    for verify in ("size", "hash"):
        with pytest.raises(UserError, match=r"train.offsets: must rise from 0 to"):
            TokenStore.open(folder, verify=verify)


def test_check_in_pieces(finished, monkeypatch):
    monkeypatch.setattr(token_store, "_CHECK_TOKENS", 7)
    assert TokenStore.open(finished).has_split("train")
