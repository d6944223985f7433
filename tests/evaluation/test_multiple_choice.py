import json
import math
import statistics

import pytest

from lumi.config import UserError
from lumi.corpus import JsonlFiles
from lumi.evaluation.few_shot import FewShotConfig
from lumi.evaluation.likelihood import Scored, ScoringRequest, score
from lumi.evaluation.multiple_choice import mean, outcomes, read_questions, result_of, score_questions
from lumi.evaluation.tasks import TASKS, Question, TaskConfig


def scored(rows, greedy=False):
    return [[Scored(nats, greedy) for nats in row] for row in rows]


def measured(kind, questions, rows, greedy=False):
    task = TASKS[kind]
    return result_of(task, questions, outcomes(questions, scored(rows, greedy), task.normalised))


def stderr(values):
    return pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_accuracy_by_hand():
    """Right answers: plain the 1st and the 3rd, per character the 1st, 2nd and 3rd of four."""
    questions = [
        Question(("q",) * 2, ("ab", "cd"), 1),
        Question(("q",) * 2, ("a", "long choice"), 1),
        Question(("q",) * 3, ("aa", "bb", "cc"), 0),
        Question(("q",) * 4, ("a", "b", "c", "d"), 1),
    ]
    found = [[-2, -1], [-1, -2], [-3, -3, -4], [-1, -2, -3, -4]]
    result = measured("arc", questions, found)
    assert (result.acc.value, result.acc_norm.value, result.examples) == (0.5, 0.75, 4)
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result.majority == 0.75  # answer 1 in three of four
    assert result.acc.stderr == stderr([1, 0, 1, 0])
    assert result.acc_norm.stderr == stderr([1, 1, 1, 0])
    plain = measured("winogrande", questions, found)
    assert (plain.acc.value, plain.acc_norm, plain.perplexity) == (0.5, None, None)
    with pytest.raises(UserError, match="a task must have at least one question, got none"):
        measured("arc", [], [])


def test_bits_per_byte_and_margin_by_hand():
    """In bits: the right choices -2 over 2 bytes and -6 over 3; the wrong ones 1 and 3 over one byte each,
    and 8 over the four bytes of "éé"."""
    questions = [Question(("q",) * 3, ("a", "cd", "b"), 1), Question(("q",) * 2, ("abc", "éé"), 0)]
    rows = [[-1 * math.log(2), -2 * math.log(2), -3 * math.log(2)], [-6 * math.log(2), -8 * math.log(2)]]
    result = measured("arc", questions, rows)
    assert result.bits_per_byte.value == pytest.approx((1 + 2) / 2)
    assert result.bits_per_byte.stderr == stderr([1, 2])
    assert result.margin.value == pytest.approx(((1 + 3) / 2 - 1 + (2 - 2)) / 2)
    assert result.margin.stderr == stderr([1, 0])


def test_a_completion_is_right_where_it_is_greedy():
    questions, rows = [Question(("q",), (word,), 0) for word in ("word", "ab")], [[-4.0], [-1.0]]
    found = outcomes(questions, [[Scored(-4.0, True)], [Scored(-1.0, False)]], normalised=False)
    assert [outcome.right for outcome in found] == [True, False]
    result = result_of(TASKS["lambada"], questions, found)
    assert (result.acc.value, result.chance, result.margin, result.majority) == (0.5, 0, None, None)
    assert result.bits_per_byte.value == pytest.approx((4 / 4 + 1 / 2) / 2 / math.log(2))
    assert result.perplexity.value == pytest.approx(math.exp(2.5))  # as the harness: of words, not of tokens
    assert result.perplexity.stderr == pytest.approx(math.exp(2.5) * 1.5)  # stdev / sqrt(2) of 4 and 1 is 1.5
    assert measured("lambada", questions, [[-4000.0], [-1.0]]).perplexity is None
    assert measured("lambada", questions[:1], rows[:1]).to_plain()["perplexity_stderr"] is None


def test_a_place_that_never_changes_is_no_baseline():
    sentences = [Question(("", ""), ("good", "bad"), 0)] * 3
    assert measured("blimp", sentences, [[-1.0, -2.0]] * 3).majority is None


def test_characters_and_not_bytes_normalise():
    """As in the harness: "éé" has two characters (-1.25 each), in UTF-8 four bytes; "abc" has -1 for both."""
    result = measured("arc", [Question(("q",) * 2, ("éé", "abc"), 1)], [[-2.5, -3]])
    assert result.acc_norm.value == 1


def test_standard_error():
    values = [0.3, 4, 1.5, -2]
    assert mean(values) == (pytest.approx(0.95), stderr(values))
    boolq_majority = mean([1] * 2033 + [0] * 1237)
    assert f"{boolq_majority.stderr:.4f}" == "0.0085"  # the harness's four digits
    assert mean([1.0]) == (1.0, None)


def test_examples_stand_before_the_question(tmp_path):
    """Each solved by its right choice. The question itself is in the file and is left out."""
    records = [{"goal": f"g{i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": i % 2} for i in range(3)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonlFiles(paths=(str(tmp_path / "piqa.jsonl"),))
    few_shot = FewShotConfig(num_fewshot=2, source=source, sampler="first_n")
    asked = read_questions(TaskConfig(kind="piqa", name="p", source=source, few_shot=few_shot))
    solved = [f"Question: g{i}\nAnswer: {'ab'[i % 2]}{i}\n\n" for i in range(3)]
    chosen = [(1, 2), (0, 2), (0, 1)]
    assert [question.contexts[0] for question in asked] == [
        "".join(solved[number] for number in places) + f"Question: g{i}\nAnswer:"
        for i, places in enumerate(chosen)
    ]
    few_shot = FewShotConfig(num_fewshot=3, source=source)
    with pytest.raises(UserError, match=r"task 'p': few_shot.source must hold at least 4 records, got 3"):
        read_questions(TaskConfig(kind="piqa", name="p", source=source, few_shot=few_shot))


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
    expected = [only.nats for [only] in score(opinionated_model, requests, batch_tokens=1)]
    expected = [expected[:2], expected[2:], expected[:2]]
    assert got.num_cut == 0
    for row, wanted in zip(got.scored, expected, strict=True):
        assert [choice.nats for choice in row] == pytest.approx(wanted, abs=1e-4)


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
