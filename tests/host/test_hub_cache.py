"""Names of models on the hub and their folders in the cache; `tests/formats/test_hub.py` downloads them."""

import huggingface_hub.constants
import pytest

from lumi.host.hub_cache import HubModel, folder_of, name_of, origin_of, parse_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_name_leads_to_its_folder_and_back_whether_or_not_it_is_there(cache):
    folder = cache / "models--me--a-model.v1" / "snapshots" / COMMIT
    assert folder_of(f"me/a-model.v1@{COMMIT}") == folder
    assert origin_of(folder) == HubModel("me/a-model.v1", COMMIT)
    assert name_of(folder) == f"me/a-model.v1@{COMMIT}"


@pytest.mark.parametrize("name", ["me/model", "me/model@main", "../data/corpus", f"../x@{COMMIT}", "tokens"])
def test_what_names_no_commit_is_a_path(cache, name):
    assert folder_of(name) is None


def test_other_folders_came_from_nowhere(cache, tmp_path):
    for folder in (tmp_path, cache / "models--me--x", cache / "models--me--x" / "blobs" / COMMIT):
        assert origin_of(folder) is None
        assert name_of(folder) == str(folder)


def test_names():
    assert parse_name("me/model@v1") == HubModel("me/model", "v1")
    for text in ("model", "a/b/c", "me/a--b", "me/..", "/me/x", "me/x@", "./me"):
        assert parse_name(text) is None
