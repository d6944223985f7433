"""Training and data as a card tells them."""

from types import SimpleNamespace

import pytest

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


def run(*data, from_random=True, validations=()):
    config = {"dpo": None, "lora": None, "num_steps": 8, "dtype": "float32", "seed": 0}
    config["batches"] = {"batch_tokens": 4, "sequence_length": 2}
    config["optimizer"] = {"kind": "adamw", "peak_lr": 0.1, "schedule": {"kind": "wsd"}}
    known = {"step": None, "metrics": [], "is_recorded": True, "validations": lambda: list(validations)}
    return SimpleNamespace(data=data, from_random=from_random, config=config, **known)


def test_sources_of_all_kinds():
    one = DataFolder(weight=0.75, store=STORE, corpora=[corpus(WEB, FILES), None])
    other = DataFolder(weight=None)
    lines = list(data_section([run(one, other)]))
    assert "### Part 1: share of the rows 75.0%" in lines
    assert "### Part 2: share of the rows not known" in lines
    assert "| web | of web | 10 | 8 | 4.00 |" in lines
    assert "| files | jsonl: b.jsonl, *.jsonl | 10 | 8 | 4.00 |" in lines
    assert "| not known | the corpus was not found |  |  |  |" in lines
    assert "Nothing is known of this data but its hash, which the run recorded." in lines
    assert hub_datasets([run(one, other)]) == ["wikimedia/wikipedia"]
    assert hub_datasets([]) == []


def test_what_all_corpora_were_decontaminated_against():
    first, second = corpus(WEB), corpus(FILES)
    first["evaluation_sets"] = [{"name": "piqa"}, {"name": "arc"}]
    second["evaluation_sets"] = [{"name": "arc"}]

    def told(*corpora):
        lines = data_section([run(DataFolder(weight=1, store=STORE, corpora=corpora))])
        return [line for line in lines if line.startswith("Decontaminated")]

    assert told(first) == ["Decontaminated against arc, piqa."]
    assert told(first, second) == ["Decontaminated against arc."]
    assert told(first, corpus(WEB)) == told(first, None) == told() == []


def test_kinds():
    chats = SimpleNamespace(template="chatml")
    assert training_kind(run()) == "pre-training"
    assert training_kind(run(DataFolder(weight=1, store=chats), from_random=False)) == "fine-tuning"
    assert training_kind(run(from_random=False)) == "training"
    preferring = run(from_random=False)
    preferring.config["dpo"] = {}
    assert training_kind(preferring) == "direct preference optimization"


@pytest.mark.parametrize(
    ("losses", "rows"),
    [
        ([3.0], ["| the only one | 0 | 3.0000 |"]),
        ([3.0, 2.0], ["| first | 0 | 3.0000 |", "| best, last | 1 | 2.0000 |"]),
        ([3.0, 4.0], ["| first, best | 0 | 3.0000 |", "| last | 1 | 4.0000 |"]),
        ([3.0, 2.0, 4.0], ["| first | 0 | 3.0000 |", "| best | 1 | 2.0000 |", "| last | 2 | 4.0000 |"]),
    ],
)
def test_each_validation_is_told_once(losses, rows):
    records = [{"step": step, "kind": "validation", "loss": loss} for step, loss in enumerate(losses)]
    lines = list(training_section(run(validations=records), []))
    assert lines[lines.index("| validation | step | loss (nats per token) |") + 2 :] == rows


def test_several_runs_have_a_heading_each():
    chats = DataFolder(weight=1, store=SimpleNamespace(template="chatml", pairs=False, splits={}))
    last = run(chats, from_random=False)
    first = run(DataFolder(weight=0.5), DataFolder(weight=0.5))
    lines = list(data_section([last, first]))
    found = [line for line in lines if line.startswith("#")]
    share = "share of the rows 50.0%"
    assert found[:2] == ["### The last run: fine-tuning", "### Before it: pre-training"]
    assert found[2:] == [f"#### Part 1: {share}", f"#### Part 2: {share}"]


def test_no_data():
    assert list(data_section([])) == ["The data is not known here."]
    unrecorded = run(from_random=False)
    unrecorded.is_recorded = False
    assert list(data_section([unrecorded])) == [
        "The data is not known here: the model was made before records were kept."
    ]
