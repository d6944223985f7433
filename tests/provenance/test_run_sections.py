"""Training and data as a card tells them."""

from types import SimpleNamespace

from lumi.provenance.run_facts import DataFolder
from lumi.provenance.run_sections import data_section, hub_datasets, training_kind, training_section


def corpus(*sources):
    amounts = {"read": 10, "kept": 8, "shortened": 0, "dropped": {}, "bytes": 4_000_000}
    amounts |= {"estimated_tokens": 1, "budget_reached": False, "unused_fields": [], "malformed_examples": []}
    entries = [{"name": name, "origin": f"of {name}", **amounts} for name, _ in sources]
    return {"sources": entries, "config": {"sources": [config for _, config in sources]}}


STORE = SimpleNamespace(template=None, pairs=False, splits={})
WEB = ("web", {"kind": "hub", "dataset": "wikimedia/wikipedia"})
FILES = ("files", {"kind": "jsonl", "paths": ["/home/me/b.jsonl", "a/*.jsonl"]})
NOTHING_KNOWN = [("fingerprint", "`0`")]


def run(*data, from_random=True):
    return SimpleNamespace(data=data, from_random=from_random, config={"dpo": None})


def test_sources_of_all_kinds():
    one = DataFolder(weight=0.75, store=STORE, corpora=[corpus(WEB, FILES), None])
    other = DataFolder(weight=None)
    lines = list(data_section(run(one, other)))
    assert "### Part 1: share of the rows 75.0%" in lines
    assert "### Part 2: share of the rows not known" in lines
    assert "| web | of web | 10 | 8 | 4.00 |" in lines
    assert "| files | jsonl: b.jsonl, *.jsonl | 10 | 8 | 4.00 |" in lines
    assert "| not known | the corpus was not found |  |  |  |" in lines
    assert "Nothing is known of this data but its hash, which the run recorded." in lines
    assert hub_datasets(run(one, other)) == ["wikimedia/wikipedia"]
    assert hub_datasets(None) == []


def test_kinds():
    chats = SimpleNamespace(template="chatml")
    assert training_kind(run()) == "pre-training"
    assert training_kind(run(DataFolder(weight=1, store=chats), from_random=False)) == "fine-tuning"
    assert training_kind(run(from_random=False)) == "training"
    preferring = run(from_random=False)
    preferring.config["dpo"] = {}
    assert training_kind(preferring) == "direct preference optimization"


def test_no_run():
    lines = list(training_section(None, NOTHING_KNOWN, is_adapter=False, picture=False))
    assert lines[0] == "How it was trained is not known here."
    assert "| fingerprint | `0` |" in lines
    assert list(data_section(None)) == ["The data is not known here."]
