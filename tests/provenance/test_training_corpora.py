"""Chains of records alone: the weights of these models do not matter."""

import shutil

import pytest
from corpora import write_corpus

from lumi.corpus import read_corpus
from lumi.formats.pretrained import Pretrained
from lumi.host.provenance import Parent, write_provenance
from lumi.provenance.chain import verify
from lumi.provenance.training_corpora import training_corpora


@pytest.fixture
def place(tmp_path):
    """Two corpora, a base that was trained on the first, and an adapter of it trained on the second."""
    first, second = (read_corpus(write_corpus(tmp_path / name, [f"text {name}"])) for name in ("one", "two"))
    for name, parents in (
        ("base", [first.as_parent, Parent("tokenizer", tmp_path / "gone", "0" * 64)]),
        ("adapter", [second.as_parent, Parent("model", tmp_path / "base", "1" * 64)]),
    ):
        (tmp_path / name).mkdir()
        write_provenance(tmp_path / name, "model" if name == "base" else name, parents, {})
    return tmp_path


def corpora(place, adapter=None):
    """Whether each corpus is known, by its name."""
    found = training_corpora(Pretrained(None, None, place / "base", adapter and place / adapter))
    for folder, manifest in found.items():
        assert manifest is None or manifest == read_corpus(folder).manifest
    return {folder.name: manifest is not None for folder, manifest in found.items()}


def test_corpora_of_model_and_adapter(place):
    assert corpora(place) == {"one": True}
    assert corpora(place, "adapter") == {"one": True, "two": True}


def test_a_corpus_that_is_another_one_or_gone_is_not_known(place):
    shutil.rmtree(place / "one")
    assert corpora(place, "adapter") == {"one": False, "two": True}
    write_corpus(place / "one", ["another text"])
    assert corpora(place) == {"one": False}
    write_corpus(place / "one", ["text one"])
    assert corpora(place) == {"one": True}


@pytest.mark.parametrize(
    "record", [None, "{", '{"format": 1, "kind": "model", "parents": null, "files": {}}']
)
def test_nothing_is_known_of_a_model_without_a_whole_record(place, record):
    (place / "base" / "provenance.json").unlink()
    if record is not None:
        (place / "base" / "provenance.json").write_text(record)
    assert corpora(place) == {"base": False}
    assert corpora(place, "adapter") == {"base": False, "two": True}


def test_verify_says_what_a_corpus_was_decontaminated_against(place, change_json):
    sets = [{"name": name, "content": []} for name in ("arc", "piqa")]
    change_json(place / "one" / "manifest.json", lambda manifest: manifest.update(evaluation_sets=sets))
    assert (verify(place / "one").verdict, verify(place / "two").verdict) == ("ok", "ok")
    assert verify(place / "one").detail == "decontaminated against arc, piqa"
    assert verify(place / "two").detail == ""
    for name in ("new", "evaluation"):
        (place / name).mkdir()
    (place / "evaluation" / "evaluation_results.json").write_text("{}")
    write_provenance(place / "evaluation", "evaluation", [read_corpus(place / "one").as_parent], {})
    (place / "one").rename(place / "new" / "one")
    [moved] = verify(place / "evaluation", [place / "new"]).parents
    assert (moved.verdict, moved.detail) == ("ok", "it has moved; decontaminated against arc, piqa")
