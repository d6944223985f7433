import pytest

from lumi.config import UserError
from lumi.data import encoding
from lumi.data.encoding import Documents, EncodingSettings, encode_all, make_tasks, split_of


def test_equal_texts_share_a_side_and_the_share_is_as_asked():
    sides = [split_of(f"text {i}".encode(), 0.1)[0] for i in range(4000)]
    assert 330 < sides.count("validation") < 470  # 400 expected, standard deviation 19
    assert sides == [split_of(f"text {i}".encode(), 0.1)[0] for i in range(4000)]
    assert all(split_of(f"text {i}".encode(), 0.0)[0] == "train" for i in range(100))
    more = [split_of(f"text {i}".encode(), 0.2)[0] for i in range(4000)]
    assert all(m == "validation" for s, m in zip(sides, more, strict=True) if s == "validation")


def test_tasks_keep_documents_and_order(monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 10)
    batches = [
        Documents(["aaaa", "b" * 30], ["x", "y"]),
        Documents([], []),
        Documents(["cccc", "cccc", "dddd"], ["x", "x", "z"]),
    ]
    tasks = list(make_tasks(batches))
    assert [task.documents for task in tasks] == [["aaaa", "b" * 30], ["cccc", "cccc", "dddd"]]
    assert [source for task in tasks for source in task.sources] == ["x", "y", "x", "x", "z"]
    assert list(make_tasks([])) == []


def test_a_lone_surrogate_is_refused_in_a_worker_too(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 10)
    batches = [Documents(["some text, long enough"] * 20 + ["a\ud800"], ["x"] * 21)]
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
        list(encode_all(batches, EncodingSettings(tokenizer=tokenizer, validation_fraction=0), num_workers=2))
