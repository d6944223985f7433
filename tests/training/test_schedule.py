import math

import pytest

from lumi.config import UserError
from lumi.training.schedule import CosineSchedule, WarmupStableDecay, check_fits, lr_at


def rates(schedule, num_steps, peak_lr, steps):
    return [lr_at(step, num_steps, peak_lr, schedule) for step in steps]


def test_cosine_by_hand():
    schedule = CosineSchedule(warmup_steps=4, final_lr_ratio=0.1)
    shapes = [0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0]  # at a quarter, half and all of the way down
    expected = [0.5, 1.0, 2.0, *(2 * (0.1 + 0.9 * shape) for shape in shapes)]
    assert rates(schedule, 12, 2.0, (1, 2, 4, 6, 8, 12)) == pytest.approx(expected)


def test_warmup_stable_decay_by_hand():
    schedule = WarmupStableDecay(warmup_steps=2, decay_fraction=0.4, final_lr_ratio=0.0)
    expected = [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert rates(schedule, 10, 1.0, range(1, 11)) == pytest.approx(expected)


def test_a_decay_may_take_all_steps_after_the_warmup():
    schedule = WarmupStableDecay(warmup_steps=2, decay_fraction=0.5, final_lr_ratio=0.5)
    check_fits(schedule, 4)
    assert rates(schedule, 4, 1.0, range(1, 5)) == pytest.approx([0.5, 1, 0.75, 0.5])


def test_a_decay_of_less_than_a_step_takes_the_last_one():
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=0.1, final_lr_ratio=0.5)
    assert rates(schedule, 2, 1.0, (1, 2)) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("schedule", "num_steps", "message"),
    [
        (CosineSchedule(warmup_steps=100), 8, "warmup_steps must be less than num_steps = 8, got 100"),
        (CosineSchedule(warmup_steps=8), 8, "warmup_steps must be less than num_steps = 8, got 8"),
        (WarmupStableDecay(warmup_steps=100), 8, "warmup_steps must be less than num_steps = 8, got 100"),
        (
            WarmupStableDecay(warmup_steps=7, decay_fraction=0.25),
            8,
            r"decay_fraction must be at most 0\.12, what 7 steps .* leave of num_steps = 8, got 0\.25",
        ),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(schedule, num_steps, message):
    with pytest.raises(UserError, match=message):
        check_fits(schedule, num_steps)


@pytest.mark.parametrize("schedule", [CosineSchedule(warmup_steps=7), WarmupStableDecay(warmup_steps=6)])
def test_a_schedule_as_long_as_the_run_is_not(schedule):
    check_fits(schedule, 8)
    assert rates(schedule, 8, 1.0, [8])[0] == pytest.approx(schedule.final_lr_ratio)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CosineSchedule(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (lambda: CosineSchedule(final_lr_ratio=1.5), r"final_lr_ratio must be in \[0, 1\], got 1.5"),
        (lambda: WarmupStableDecay(decay_fraction=0.0), r"decay_fraction must be in \(0, 1\], got 0.0"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_long_decay_falls_in_a_line_to_zero(fraction):
    schedule, begin = (
        WarmupStableDecay(warmup_steps=100, decay_fraction=fraction),
        round(1000 * (1 - fraction)),
    )
    check_fits(schedule, 1000)
    for step in range(1, 1001):
        expected = min(step / 100, 1.0, 1 - (step - begin) / (1000 - begin))
        assert lr_at(step, 1000, 0.02, schedule) == pytest.approx(0.02 * expected, abs=1e-12)
