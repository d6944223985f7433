"""How a chain is printed."""

import json
from pathlib import Path

import huggingface_hub.constants

from lumi.provenance.chain import Link
from lumi.provenance.tree import line, summary, to_json, tree

CORPUS = Link("corpus", Path("corpus"), "c" * 64, "ok")
AGAIN = Link("corpus", Path("corpus"), "c" * 64, "ok", repeated=True)
TOKENIZER = Link("tokenizer", Path("/elsewhere/tokenizer"), "", "not recorded", parents=[CORPUS])
STORE = Link("token store", Path("tokens"), "5" * 64, "changed", "train.tokens, recorded 1, found 2")
STORE.parents = [TOKENIZER, AGAIN]
MODEL = Link("model", Path("final"), "0" * 64, "ok", parents=[STORE, CORPUS])


def test_a_line_for_each_with_its_place_in_the_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tree(MODEL).splitlines() == [
        "model  final  000000000000  ok",
        "├── token store  tokens  555555555555  changed: train.tokens, recorded 1, found 2",
        "│   ├── tokenizer  /elsewhere/tokenizer  -  not recorded",
        "│   │   └── corpus  corpus  cccccccccccc  ok",
        "│   └── corpus  corpus  cccccccccccc  ok (above)",
        "└── corpus  corpus  cccccccccccc  ok",
        "",
        "5 artefacts: 3 ok, 1 changed, 1 not recorded",
    ]


def test_what_came_from_the_hub_has_its_name_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    link = Link("model", tmp_path / "cache/models--me--base/snapshots/0123", "0" * 64, "missing")
    assert line(link) == "model  me/base@0123  000000000000  missing"
    assert json.loads(to_json(link))["path"] == "me/base@0123"


def test_one_artefact_is_singular():
    assert summary(CORPUS) == "1 artefact: 1 ok"


def test_json_has_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = json.loads(to_json(MODEL))
    store = data["parents"][0]
    assert (store["kind"], store["verdict"], store["identity"]) == ("token store", "changed", "5" * 64)
    assert store["path"] == str(tmp_path / "tokens")
    assert [each["repeated"] for each in store["parents"]] == [False, True]
