import json
import math
import random
import statistics

import pytest

from lumi.training.loss_spikes import LossSpikes


def training_curve(num_steps, noise, seed):
    """A loss that starts at ln(32768), falls with the root of the step, and is as noisy as its batches."""
    rng = random.Random(seed)
    return [
        min(math.log(32768), 2.5 + 8 / math.sqrt(step)) + rng.gauss(0, noise)
        for step in range(1, num_steps + 1)
    ]


def spikes_of(spikes, losses):
    """The places, counted from 0, of the losses that are spikes."""
    found = []
    for place, loss in enumerate(losses):
        if spikes.is_spike(loss):
            found.append(place)
        spikes.record(loss)
    return found


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_a_training_curve_has_no_spike(noise):
    assert spikes_of(LossSpikes(6.0), training_curve(20_000, noise, seed=1)) == []


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_spikes_are_seen_from_the_fast_fall_on(noise):
    losses = training_curve(5_000, noise, seed=2)
    places = [200, 500, 501, 1_000, 3_000, 4_999]
    for place in places:
        losses[place] += 1.5
    assert spikes_of(LossSpikes(6.0), losses) == places


def test_the_limit_is_median_and_standard_deviation_of_the_window():
    rng = random.Random(3)
    losses = [rng.uniform(2, 3) for _ in range(40)]
    spikes = LossSpikes(1.5, window=8)
    for count, loss in enumerate(losses[:8]):
        assert spikes.limit == math.inf, count
        spikes.record(loss)
    for place in range(8, 40):
        seen = spikes.state()
        expected = statistics.median(seen) + 1.5 * statistics.stdev(seen)
        assert spikes.limit == pytest.approx(expected, rel=1e-12)
        assert spikes.is_spike(expected + 1e-9)
        assert not spikes.is_spike(expected - 1e-9)
        spikes.record(losses[place])
        assert spikes.state()[:-1] == seen[1:]
        assert spikes.state()[-1] == pytest.approx(min(losses[place], expected), rel=1e-12)


def test_one_spike_hardly_dulls_the_next():
    losses = [2 + 0.05 * (-1) ** place for place in range(128)]  # deviation 0.05
    spikes = LossSpikes(6.0)
    assert spikes_of(spikes, [*losses, 9.0]) == [128]
    assert spikes.limit == pytest.approx(
        2 + 6 * math.sqrt(0.05**2 + 0.3**2 / 128), rel=0.01
    )  # one value at 6 deviations among 128


def test_what_lasts_is_no_spike_for_ever():
    losses = training_curve(4_000, 0.05, seed=4)
    shifted = [loss + 1.5 * (place >= 2_000) for place, loss in enumerate(losses)]
    skipped = spikes_of(LossSpikes(6.0), shifted)
    assert skipped == list(
        range(2_000, 2_000 + len(skipped))
    )  # in a row, so that max_skipped_steps stops a run
    assert 5 <= len(skipped) <= 30  # and without it, training goes on
    rng = random.Random(5)
    mixed = [loss + 1.5 * (place >= 2_000 and rng.random() < 0.1) for place, loss in enumerate(losses)]
    assert 1 <= len(spikes_of(LossSpikes(6.0), mixed)) <= 30  # of 200 steps of harder data


def test_a_fall_and_equal_losses_are_no_spikes():
    assert spikes_of(LossSpikes(3.0), [10 - 0.01 * step for step in range(900)]) == []
    equal = [2.0] * 300
    equal[200] = math.nextafter(2.0, 3.0)
    assert spikes_of(LossSpikes(6.0), equal) == []
    equal[200] = 2.1
    assert spikes_of(LossSpikes(6.0), equal) == [200]


def test_any_cut_goes_on_exactly():
    losses = training_curve(400, 0.05, seed=6)
    for place in range(150, 400, 20):
        losses[place] += random.Random(place).uniform(0, 2)
    straight = LossSpikes(4.0)
    limits = []
    for loss in losses:
        limits.append(straight.limit)
        straight.record(loss)
    for cut in (0, 1, 127, 128, 129, 151, 399):
        first, second = LossSpikes(4.0), LossSpikes(4.0)
        spikes_of(first, losses[:cut])
        second.load(json.loads(json.dumps(first.state())))
        for place in range(cut, 400):
            assert second.limit == limits[place]
            second.record(losses[place])
        assert second.state() == straight.state()


def test_none_sees_nothing_and_keeps_nothing():
    spikes = LossSpikes(None)
    assert spikes_of(spikes, [2.0] * 200 + [1e9]) == []
    assert spikes.state() == []


def test_losses_that_are_not_finite_are_for_others():
    spikes = LossSpikes(6.0, window=2)
    for loss in (2.0, 2.1):
        spikes.record(loss)
    assert not spikes.is_spike(math.nan)
    for loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match="loss must be finite, got"):
            spikes.record(loss)
    assert spikes.state() == [2.0, 2.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "max_sigmas must be above 0, or null for no limit, got 0.0"),
        ((math.nan,), "max_sigmas must be above 0, or null for no limit, got nan"),
        ((6.0, 1), "window must be at least 2 steps, got 1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossSpikes(*arguments)
