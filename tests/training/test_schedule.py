import math

import pytest

from lumi.training.schedule import CosineSchedule, WarmupStableDecay, lr_at


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


def test_a_decay_longer_than_the_steps_after_warmup_takes_all_of_them():
    schedule = WarmupStableDecay(warmup_steps=2, decay_fraction=1.0, final_lr_ratio=0.5)
    assert rates(schedule, 4, 1.0, range(1, 5)) == pytest.approx([0.5, 1, 0.75, 0.5])


@pytest.mark.parametrize("schedule", [CosineSchedule(warmup_steps=9), WarmupStableDecay(warmup_steps=9)])
def test_a_run_shorter_than_its_warmup_only_warms_up(schedule):
    assert rates(schedule, 4, 1.0, (1, 2, 3, 4)) == [0.25, 0.5, 0.75, 1.0]


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
