import json

import pytest

from lumi.config import UserError, read_json, write_json
from lumi.data.store_manifest import Counts, token_dtype
from lumi.data.token_store import TokenStore


def test_the_smallest_type_that_holds_every_id():
    assert (token_dtype(65536).str, token_dtype(65537).str) == ("<u2", "<u4")


def test_counts_add_up():
    total = sum([Counts(documents=1, tokens=20, bytes=300), Counts(documents=2, tokens=3, bytes=4)], Counts())
    assert total == Counts(documents=3, tokens=23, bytes=304)


def test_a_store_from_before_there_were_conversations(folder):
    manifest = read_json(folder / "manifest.json")
    del manifest["template"]
    for split in manifest["splits"].values():
        for key in ("trained_tokens", "dropped", "truncated"):
            del split[key]
    before = TokenStore.open(folder).manifest
    write_json(folder / "manifest.json", manifest)
    assert TokenStore.open(folder).manifest == before


def change_manifest(folder, **changes):
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | changes)


def test_damaged_manifests(folder, tmp_path, corpus):
    for place, what in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no manifest.json"),
        (corpus, "a manifest.json of something else"),
    ):
        with pytest.raises(
            UserError, match=f"must be a finished token store, got {what}; make one with `lumi tokenize"
        ):
            TokenStore.open(place)
    whole = (folder / "manifest.json").read_text()
    for changes, message in (
        ({"format": 2}, "format must be 1, got 2"),
        ({"dtype": "uint32"}, "dtype must be uint16 for 320 ids, got uint32"),
        ({"vocab_size": 70000}, "dtype must be uint32 for 70000 ids, got uint16"),
        ({"vocab_size": "320"}, "vocab_size must be an integer"),
        (
            {"splits": {"../train": json.loads(whole)["splits"]["train"]}},
            "splits must be train or validation with their files",
        ),
    ):
        change_manifest(folder, **changes)
        with pytest.raises(UserError, match=message):
            TokenStore.open(folder)
        (folder / "manifest.json").write_text(whole)
    manifest = json.loads(whole)
    manifest["splits"]["train"]["tokens"] += 1
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"manifest.json: size of train.tokens must be \d+ for its counts"):
        TokenStore.open(folder)
    (folder / "manifest.json").write_text(whole[:-20])
    with pytest.raises(UserError, match=r"manifest.json: not valid JSON"):
        TokenStore.open(folder)
