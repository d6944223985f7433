import hashlib
import json

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus.evaluation_sets import (
    DecontaminationConfig,
    content_of,
    is_against,
    names_against,
    read_evaluation_sets,
)
from lumi.corpus.sources import HubDataset, JsonlFiles

RECORDS = [
    {
        "id": "Mercury_417466",
        "question": "Which of these rivers opens its stones at noon?",
        "choices": {"text": ["the cold one that sleeps under the old bridge", "both"], "label": ["A", "B"]},
        "answer": 1,
    },
    {"question": "WHICH of these rivers opens its stones, at noon?", "choices": None},
]


def config(path, **values):
    against = {"name": "exam", "source": {"kind": "jsonl", "paths": [str(path)]}, **values}
    return from_dict(DecontaminationConfig, {"against": [against]})


@pytest.fixture
def exam(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def test_every_string_with_enough_words_is_a_text(exam):
    [found] = read_evaluation_sets(config(exam))
    question = "which of these rivers opens its stones at noon"  # nine words, twice
    assert found.texts == [question, "the cold one that sleeps under the old bridge"]
    assert (found.name, found.origin, found.records) == ("exam", f"jsonl: {exam}", 2)
    assert found.content == [hashlib.sha256(exam.read_bytes()).hexdigest()]
    entry = found.to_json()
    assert entry["sha256"] == hashlib.sha256("\n".join(found.texts).encode()).hexdigest()
    assert (entry["records"], entry["texts"]) == (2, 2)
    assert read_evaluation_sets(config(exam, fields=["question"]))[0].texts == [question]
    assert read_evaluation_sets(None) == []


def test_fewer_words_count_where_the_config_says_so(exam):
    least = from_dict(
        DecontaminationConfig,
        {"against": [], "min_words": 1}
        | {"against": [{"name": "exam", "source": {"kind": "jsonl", "paths": [str(exam)]}}]},
    )
    texts = read_evaluation_sets(least)[0].texts
    assert {"mercury 417466", "both", "a", "b"} < set(texts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fields": ["passage"]},
            "fields must be among those of each record (id, question, choices, answer)",
        ),
        (
            {"fields": ["id", "question"]},
            "fields must be among those of each record (question, choices), got id",
        ),
        ({"fields": ["answer", "id"]}, "fields must be among"),
        ({"source": {"kind": "jsonl", "paths": ["nowhere"]}}, "paths must match at least one file"),
    ],
)
def test_a_set_that_cannot_be_read_is_an_error(exam, values, message):
    with pytest.raises(UserError) as caught:
        read_evaluation_sets(config(exam, **values))
    assert str(caught.value).startswith(f"decontamination against 'exam': {message}")


def test_a_set_in_which_nothing_can_be_found_is_an_error(exam):
    exam.write_text('{"question": "Which one of these seven words counts?"}')
    with pytest.raises(UserError, match="'exam': source must hold a text of 8 words, got none; lower "):
        read_evaluation_sets(config(exam))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"against": []}, "against must hold at least one evaluation set, got none"),
        ({"min_words": 14}, "min_words must be between 1 and ngram = 13, got 14"),
        ({"min_words": 0}, "min_words must be between 1 and ngram = 13, got 0"),
        ({"ngram": 7}, "min_words must be between 1 and ngram = 7, got 8"),
    ],
)
def test_impossible_configs(values, message):
    source = {"kind": "text", "paths": ["x"]}
    with pytest.raises(UserError, match=message):
        from_dict(DecontaminationConfig, {"against": [{"name": "a", "source": source}]} | values)


def test_names_are_needed_and_differ():
    sets = [{"name": name, "source": {"kind": "text", "paths": ["x"]}} for name in ("a", "b", "a", "")]
    with pytest.raises(UserError, match="against must have different names, got a more than once"):
        from_dict(DecontaminationConfig, {"against": sets[:3]})
    with pytest.raises(UserError, match='name must be a name for reports, got ""'):
        from_dict(DecontaminationConfig, {"against": sets[3:]})
    with pytest.raises(UserError, match="fields must hold at least one name"):
        from_dict(DecontaminationConfig, {"against": [sets[0] | {"fields": []}]})


def test_data_is_the_same_wherever_it_lies_and_another_when_it_changes(exam, tmp_path):
    manifest = {"evaluation_sets": [each.to_json() for each in read_evaluation_sets(config(exam))]}
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(exam.read_bytes())
    source = JsonlFiles(paths=(str(moved),))
    assert is_against(manifest, content_of(source))
    moved.write_text(moved.read_text() + "\n{}")
    assert not is_against(manifest, content_of(source))
    both = JsonlFiles(paths=(str(exam), str(moved)))
    assert not is_against(manifest, content_of(both))
    hub = HubDataset(dataset="a/b", split="test")
    assert content_of(hub) == ["hub: a/b / test"]
    assert names_against(manifest) == ["exam"]
    assert names_against({}) == []  # of an earlier version
    assert not is_against({}, content_of(source))
