"""Drawing examples; test_harness.py compares whole contexts with the harness's."""

import random

import pytest

from lumi.config import UserError
from lumi.corpus import JsonlFiles
from lumi.evaluation.few_shot import FewShotConfig, draw

SOURCE = JsonlFiles(paths=("x",))
POOL = [{"id": number} for number in range(30)]


def places(number, sampler="random", pool=POOL, records=POOL[:4], leave_out_itself=False):
    return draw(
        FewShotConfig(num_fewshot=number, source=SOURCE, sampler=sampler), pool, records, leave_out_itself
    )


def test_one_generator_draws_for_all_questions_in_order():
    rng = random.Random(1234)
    assert places(3) == [rng.sample(range(30), 3) for _ in range(4)]
    assert places(3, records=POOL[:2]) == places(3)[:2]  # a limit changes nothing before it


def test_the_question_is_never_its_own_example():
    drawn = places(20, records=POOL, leave_out_itself=True)
    assert any(number in chosen for number, chosen in enumerate(places(20, records=POOL)))
    assert not any(number in chosen for number, chosen in enumerate(drawn))
    assert {len(set(chosen)) for chosen in drawn} == {20}
    assert places(2, "first_n", leave_out_itself=True) == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert places(2, "first_n") == [[0, 1]] * 4


def test_copies_of_the_question_are_left_out_too():
    pool = [{"id": 0}] * 20 + [{"id": 1}, {"id": 2}]
    for chosen in places(2, pool=pool, records=[{"id": 0}] * 5, leave_out_itself=True):
        assert sorted(chosen) == [20, 21]
    with pytest.raises(UserError, match="must hold at least 3 records that differ from each question, got 2"):
        places(3, pool=pool, records=[{"id": 0}], leave_out_itself=True)


@pytest.mark.parametrize(("leave_out_itself", "needed"), [(False, 31), (True, 32)])
def test_too_few_records(leave_out_itself, needed):
    with pytest.raises(UserError, match=f"few_shot.source must hold at least {needed} records, got 30"):
        places(31, leave_out_itself=leave_out_itself)
