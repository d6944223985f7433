"""The paired test against all sign flips, counted; files that do not compare are refused by name."""

import itertools
import math
import random
import statistics

import pytest

from lumi.cli import dispatch
from lumi.command_line import run
from lumi.config import UserError
from lumi.evaluation.comparison import compare, sign_flip_p_value
from lumi.evaluation.examples import EXAMPLES_FILE, example_rows, write_examples
from lumi.evaluation.multiple_choice import Outcome
from lumi.evaluation.tasks import Question

QUESTIONS = [Question((f"q{number}",) * 2, ("a", "b"), 0) for number in range(40)]


def write(folder, task="piqa", questions=QUESTIONS, shift=0.0, seed=0, normalised=True):
    """Outcomes that are noise about `shift`."""
    folder.mkdir()
    rng, found = random.Random(seed), []
    for _ in questions:
        bits = rng.gauss(3 + shift, 1)
        right = rng.random() < 0.5
        found.append(Outcome((-1.0, -2.0), bits, -bits, right, right if normalised else None))
    write_examples(folder, example_rows(task, questions, found))
    return folder, found


def test_differences_by_hand(tmp_path):
    a, found_a = write(tmp_path / "a")
    b, found_b = write(tmp_path / "b", shift=0.2, seed=1)
    differences, notes = compare(a, b)
    assert notes == []
    assert [found.metric for found in differences] == ["bits_per_byte", "margin", "acc", "acc_norm"]
    bits = differences[0]
    changes = [new.bits_per_byte - old.bits_per_byte for old, new in zip(found_a, found_b, strict=True)]
    assert bits.difference == pytest.approx(statistics.mean(changes))
    assert bits.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(40))
    assert bits.a == pytest.approx(statistics.mean(outcome.bits_per_byte for outcome in found_a))
    assert (differences[1].difference, differences[1].p_value) == (
        pytest.approx(-bits.difference),
        bits.p_value,
    )
    assert differences[2].difference == pytest.approx(differences[2].b - differences[2].a)


def test_the_p_value_is_the_share_of_flips():
    """All 4,096 flips, counted; 9,999 random ones have a standard error of at most 0.005."""
    rng = random.Random(2)
    for shift in (0, 0.3, 0.8, 2):
        changes = [rng.gauss(shift, 1) for _ in range(12)]
        flips = itertools.product((1, -1), repeat=12)
        sums = [abs(sum(s * d for s, d in zip(signs, changes, strict=True))) for signs in flips]
        exact = sum(each >= sums[0] - 1e-9 for each in sums) / len(sums)
        assert sign_flip_p_value(changes) == pytest.approx(exact, abs=0.02)
        assert sign_flip_p_value(changes) == sign_flip_p_value([*changes, 0.0, 0.0])
    assert sign_flip_p_value([0.0] * 5) == 1
    assert sign_flip_p_value([1.0] * 30) == 1 / 10_000


def test_it_finds_what_is_there_and_cries_no_wolf():
    """Equal models get p < 0.05 one time in twenty: of 200, at most 20 (a binomial tail of 0.003)."""
    rng = random.Random(3)
    luck = [sign_flip_p_value([rng.gauss(0, 1) for _ in range(30)]) for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in luck) <= 20
    # Normal approximation of the power at a shift of 5 standard errors: 0.999.
    assert sign_flip_p_value([rng.gauss(0.5, 1) for _ in range(100)]) < 0.01


def test_a_task_in_one_alone_is_named(tmp_path, capsys):
    a, b = write(tmp_path / "a")[0], write(tmp_path / "b", seed=1, normalised=False)[0]
    more = write(tmp_path / "more", task="boolq", normalised=False)[0]
    with (b / EXAMPLES_FILE).open("a") as file:
        file.write((more / EXAMPLES_FILE).read_text())
    assert run(dispatch, ["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"boolq is in {b} alone\n"
    assert [line.split()[0] for line in printed.out.splitlines()[4:]] == ["piqa"] * 3  # B has no acc_norm
    assert "bits per byte" in printed.out


def test_one_folder_twice_and_no_folder(tmp_path):
    a = write(tmp_path / "a")[0]
    with pytest.raises(
        UserError, match=r"^EVALUATION_B must be another folder than EVALUATION_A, got .*/a/\.\./a$"
    ):
        compare(a, a / ".." / "a")
    for path, got in ((tmp_path / "b", "no such folder"), (a / EXAMPLES_FILE, "a file")):
        with pytest.raises(
            UserError, match=f"^{path} must be a folder that `lumi evaluate` wrote, got {got}$"
        ):
            compare(a, path)
    with pytest.raises(UserError, match=r"must hold evaluation_examples\.jsonl, got no such file; evaluate"):
        compare(tmp_path, a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": QUESTIONS[:39]}, "must have the same questions in both, got 40 in A and 39 in B"),
        (
            {"questions": [*QUESTIONS[:7], QUESTIONS[7]._replace(answer=1), *QUESTIONS[8:]]},
            "task 'piqa' must have the same questions in both, got another example 8 in B than in A",
        ),
        ({"task": "boolq"}, "the evaluations must have a task of one name, got piqa and boolq"),
    ],
)
def test_what_does_not_compare(change, message, tmp_path):
    a, b = write(tmp_path / "a")[0], write(tmp_path / "b", **change)[0]
    with pytest.raises(UserError, match=message):
        compare(a, b)
