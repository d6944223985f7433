import json

import pytest

from lumi.config import UserError
from lumi.evaluation.examples import EXAMPLES_FILE, example_rows, read_examples, write_examples
from lumi.evaluation.multiple_choice import Outcome
from lumi.evaluation.tasks import Question

QUESTION = Question(("é?",) * 2, ("a", "b"), 0)
OUTCOME = Outcome((-1.0, -2.0), 1.5, 0.5, True, None)


def test_what_is_written_is_read(tmp_path):
    rows = [*example_rows("x", [QUESTION] * 2, [OUTCOME] * 2), *example_rows("y", [QUESTION], [OUTCOME])]
    write_examples(tmp_path, rows)
    tasks = read_examples(tmp_path)
    assert {task: len(found) for task, found in tasks.items()} == {"x": 2, "y": 1}
    assert tasks["x"][1] == json.loads(json.dumps(rows[1]))
    assert tasks["x"][1]["example"] == 2
    write_examples(tmp_path, [])
    assert not (tmp_path / EXAMPLES_FILE).exists()


@pytest.mark.parametrize(
    "change",
    [{"contexts": ("é!", "é?")}, {"choices": ("a", "c")}, {"answer": 1}],
    ids=lambda change: next(iter(change)),
)
def test_another_question_has_another_hash(change):
    [one], [other] = (
        example_rows("x", [question], [OUTCOME]) for question in (QUESTION, QUESTION._replace(**change))
    )
    assert one["question"] != other["question"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold evaluation_examples.jsonl, got no such file; evaluate the model on tasks"),
        (b"{", "evaluation_examples.jsonl: must be as lumi evaluate wrote it, got Expecting property name"),
        (b"3\n", "must be as lumi evaluate wrote it"),
        (b'{"task": "x"}\n', "must be as lumi evaluate wrote it, got a row has no bits_per_byte"),
        (b"\xff\n", "must be as lumi evaluate wrote it"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    if content is not None:
        (tmp_path / EXAMPLES_FILE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path)
