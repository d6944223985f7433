import json

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import HubSource, JsonlSource, PrepareConfig, PythonDocsSource, TextSource
from lumi.corpus.conversations import MessagesFormat
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.reading import open_source
from lumi.corpus.scale.units import Unit, list_units


def test_a_unit_for_each_file_in_the_order_of_the_documents(tmp_path):
    for name in ("b[1].jsonl", "b[0].jsonl", "a*.jsonl", "ab.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    sources = (
        JsonlSource(name="b", paths=(str(tmp_path / "b*"), str(tmp_path / "a[*].jsonl"))),
        PythonDocsSource(name="d"),
        TextSource(name="t", paths=(str(tmp_path / "a*"),)),
    )
    units = list_units(sources)
    names = ["b[0].jsonl", "b[1].jsonl", "a*.jsonl", None, "a*.jsonl", "ab.jsonl"]
    paths = [name and str(tmp_path / name) for name in names]
    assert units == [Unit(index, path) for index, path in zip([0, 0, 0, 1, 2, 2], paths, strict=True)]
    (record,) = open_source(units[2].source(sources), 100).records  # not ab.jsonl, which its name matches
    assert record.document == "a*.jsonl"
    assert units[3].source(sources) is sources[1]


def test_trees_that_lie_in_several_files_are_one_unit(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    paths = (str(tmp_path / "*.jsonl"),)
    tree, chats = (
        JsonlSource(name="x", paths=paths, conversation=form)
        for form in (OasstMessagesFormat(), MessagesFormat())
    )
    assert list_units([tree]) == [Unit(0, None)]
    assert len(list_units([chats])) == 2


def test_a_dataset_of_the_hub_must_have_no_budget():
    assert list_units([HubSource(name="h", dataset="a/b")]) == [Unit(0, None)]
    for budget in ({"max_tokens": 5}, {"max_documents": 5}):
        config = from_dict(
            PrepareConfig, {"sources": [{"kind": "hub", "name": "h", "dataset": "a/b", **budget}]}
        )
        with pytest.raises(UserError, match=r"source 'h' must be without max_tokens and max_documents with"):
            list_units(config.sources)
