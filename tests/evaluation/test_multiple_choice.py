import json
import math
import statistics

import pytest

from lumi.config import UserError
from lumi.corpus import JsonlFiles
from lumi.evaluation.likelihood import ScoringRequest, score
from lumi.evaluation.multiple_choice import accuracy, read_questions, score_questions, standard_error
from lumi.evaluation.tasks import Question, TaskConfig


def test_accuracy_by_hand():
    """Right answers: plain the 1st and the 3rd, per character the 1st, 2nd and 3rd of four."""
    questions = [
        Question(("q",) * 2, ("ab", "cd"), 1),
        Question(("q",) * 2, ("a", "long choice"), 1),
        Question(("q",) * 3, ("aa", "bb", "cc"), 0),
        Question(("q",) * 4, ("a", "b", "c", "d"), 1),
    ]
    found = [[-2, -1], [-1, -2], [-3, -3, -4], [-1, -2, -3, -4]]
    result = accuracy(questions, found, normalised=True)
    assert (result.acc, result.acc_norm, result.examples) == (0.5, 0.75, 4)
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result.majority == 0.75  # answer 1 in three of four
    assert result.acc_stderr == pytest.approx(statistics.stdev([1, 0, 1, 0]) / math.sqrt(4))
    assert result.acc_norm_stderr == pytest.approx(statistics.stdev([1, 1, 1, 0]) / math.sqrt(4))
    plain = accuracy(questions, found, normalised=False)
    assert (plain.acc, plain.acc_norm, plain.acc_norm_stderr) == (0.5, None, None)
    with pytest.raises(UserError, match="a task must have at least one question, got none"):
        accuracy([], [], normalised=True)


def test_characters_and_not_bytes_normalise():
    """As in the harness: "éé" has two characters (-1.25 each), in UTF-8 four bytes; "abc" has -1 for both."""
    result = accuracy([Question(("q",) * 2, ("éé", "abc"), 1)], [[-2.5, -3]], normalised=True)
    assert result.acc_norm == 1


def test_standard_error():
    assert standard_error(0.25, 4) == pytest.approx(statistics.stdev([0, 1, 0, 0]) / math.sqrt(4))
    boolq_majority = standard_error(0.6217, 3270)
    assert f"{boolq_majority:.4f}" == "0.0085"  # the harness's four digits
    assert standard_error(1.0, 1) is None


def test_contexts_of_their_own_and_shared_ones(opinionated_model, tokenizer):
    encode = tokenizer.encode
    shared = Question(("The river",) * 2, ("opens", "finds a stone"), 0)
    own = Question(("Ann saw that Ann", "Ann saw that the teacher"), ("was late.",) * 2, 1)
    got = score_questions([shared, own, shared], opinionated_model, tokenizer, batch_tokens=100)
    pairs = [
        ("The river", " opens"),
        ("The river", " finds a stone"),
        *((context, " was late.") for context in own.contexts),
    ]
    requests = [
        ScoringRequest([tokenizer.bos_id, *encode(a)], [encode(a + b)[len(encode(a)) :]]) for a, b in pairs
    ]
    expected = [only for [only] in score(opinionated_model, requests, batch_tokens=1)]
    expected = [expected[:2], expected[2:], expected[:2]]
    assert got.num_cut == 0
    for row, wanted in zip(got.nats, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_questions_that_do_not_fit_are_counted(opinionated_model, tokenizer):
    """The context and all but the last token of the longest choice must fit into the model's positions."""
    positions = opinionated_model.config.max_positions
    words = next(n for n in range(positions) if len(tokenizer.encode("a" + " river" * n)) >= positions - 20)
    context = "a" + " river" * words
    room = positions - 1 - len(tokenizer.encode(context))
    longest = next(
        "a" + " a" * n for n in range(room + 2) if len(tokenizer.encode(" a" + " a" * n)) == room + 1
    )
    fits = Question((context,) * 2, ("a", longest), 0)
    cut = Question((context,) * 2, ("a", longest + " a"), 0)
    apart = Question((context, "a " + context), (longest, longest), 0)
    questions = [fits, cut, apart]
    assert score_questions(questions, opinionated_model, tokenizer, batch_tokens=100).num_cut == 2


def test_limits_and_the_place_of_a_bad_record(tmp_path):
    records = [{"goal": str(i), "sol1": "a", "sol2": "b", "label": i % 2} for i in range(5)] + [{"goal": "x"}]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonlFiles(paths=(str(tmp_path / "piqa.jsonl"),))
    config = TaskConfig(kind="piqa", name="p", source=source, limit=4)
    assert [question.answer for question in read_questions(config)] == [0, 1, 0, 1]
    assert len(read_questions(config, 3)) == 3
    assert len(read_questions(config, 5)) == 4
    with pytest.raises(
        UserError,
        match=r"task 'p': jsonl: .*piqa.jsonl, record 6: 'sol1' must be a string, got no such field",
    ):
        read_questions(TaskConfig(kind="piqa", name="p", source=source))
