import numpy as np
import pytest
from written_runs import train_record

from lumi.reporting.charts import BOTTOM, INSET, LEFT, RIGHT, TOP, charts_of, reduced
from lumi.reporting.recorded_run import RecordedRun


def run_of(records, name="a"):
    return RecordedRun(name=name, path=None, records=records, config={}, status="finished", notes=())


def charts(*runs):
    return {chart.title: chart for chart in charts_of(runs)}


def places(chart, line):
    return [tuple(map(float, place.split(","))) for place in chart.traces[line].split()]


def test_a_point_lies_where_its_value_says():
    """A straight line from (0, 2) to (10, 4): its ends are near the corners, its middle the centre."""
    chart = charts(run_of([train_record(step, 2 + step / 5) for step in range(11)]))["Loss"]
    found = places(chart, 0)
    assert found[0] == (LEFT + INSET, BOTTOM - INSET)
    assert found[-1] == (RIGHT - INSET, TOP + INSET)
    assert found[5] == ((LEFT + RIGHT) / 2, (BOTTOM + TOP) / 2)
    for tick in chart.y_ticks:
        share = (float(tick.label) - 2) / 2
        assert tick.at == pytest.approx(BOTTOM - INSET - share * (BOTTOM - TOP - 2 * INSET))
    assert len(chart.y_ticks) >= 3
    assert {tick.label for tick in chart.x_ticks} == {"0", "2", "4", "6", "8", "10"}
    assert chart.description == "a, training: 2 at step 0, 4 at step 10, between 2 and 4."


def test_all_charts_of_a_page_show_the_same_steps():
    """From 0 to the last of any run: the only validation, at step 5 of 10, is in the middle."""
    validation = {"step": 5, "kind": "validation", "loss": 3.0, "bits_per_byte": 1.5}
    short = run_of([train_record(1, 4.0), train_record(2, 3.5), validation], "short")
    made = charts(short, run_of([train_record(step, 3.0) for step in range(1, 11)], "long"))
    assert places(made["Bits per byte"], 0)[0][0] == (LEFT + RIGHT) / 2
    ticks = {tuple(tick.label for tick in chart.x_ticks) for chart in made.values()}
    assert ticks == {("0", "2", "4", "6", "8", "10")}


def test_a_wide_range_is_logarithmic():
    chart = charts(run_of([train_record(step, 1.0, gradient_norm=10.0**step) for step in range(5)]))
    chart = chart["Gradient norm"]
    assert chart.is_log
    assert np.diff([y for _, y in places(chart, 0)]) == pytest.approx(
        -(BOTTOM - TOP - 2 * INSET) / 4, abs=0.11
    )
    assert {"1", "100", "10000"} <= {tick.label for tick in chart.y_ticks}


def test_small_ticks_are_in_one_manner():
    records = [train_record(step, 1.0, lr=step * 3e-5) for step in range(11)]
    ticks = charts(run_of(records))["Learning rate"].y_ticks
    assert [tick.label for tick in ticks] == ["0", "6.0e-5", "1.2e-4", "1.8e-4", "2.4e-4", "3.0e-4"]


def test_each_kind_of_run_has_its_charts():
    validation = {"step": 2, "kind": "validation", "loss": 3.0, "bits_per_byte": 1.5}
    texts = run_of([train_record(1, 4.0, mfu=0.5), validation], "texts")
    measures = {"reward_margin": 0.1, "accuracy": 0.75, "divergence": 0.01}
    pairs = run_of([{"step": 1, "kind": "train", "loss": 0.7, "pairs": 4, "lr": 0.1, **measures}], "pairs")
    made = charts(texts, pairs)
    assert {line.label for line in made["Loss"].lines} == {"texts, training", "texts, validation"}
    assert {line.label for line in made["Loss of pairs"].lines} == {"pairs, training"}
    assert made["Model FLOPs utilization"].lines[0].points.tolist() == [[1, 50]]
    assert made["Accuracy"].lines[0].figures == ("75", "75", "75", "75")
    assert made["Bits per byte"].lines[0].style == "dots"
    assert "Skipped steps" not in made
    assert len(made["Learning rate"].lines) == 2
    assert charts(run_of([])) == {}


def test_skipped_steps_and_values_that_are_no_numbers():
    losses = [5.0, None, float("nan"), "4", True, 3.0]
    records = [train_record(step, loss) for step, loss in enumerate(losses)]
    for record in records[3:]:
        record["skipped_steps"] = 2
    records.insert(4, {"step": 3, "kind": "validation", "loss": 4.0})
    made = charts(run_of(records))
    assert made["Loss"].lines[0].points.tolist() == [[0, 5], [5, 3]]
    assert made["Loss"].lines[1].points.tolist() == [[3, 4]]
    assert made["Skipped steps"].lines[0].points.tolist() == [[0, 0], [1, 0], [2, 0], [3, 2], [4, 2], [5, 2]]


def test_a_long_line_keeps_its_extremes():
    """100,000 values between 0 and 1, one spike up and one down: 100 columns show both, and the ends."""
    rng = np.random.default_rng(0)
    points = np.column_stack([np.arange(100_000.0), rng.random(100_000)])
    points[41_234, 1], points[41_250, 1] = 9.0, -9.0
    kept = reduced(points, buckets=100)
    assert len(kept) <= 400
    assert (kept[:, 1].max(), kept[:, 1].min()) == (9.0, -9.0)
    assert kept[[0, -1]].tolist() == points[[0, -1]].tolist()
    assert (np.diff(kept[:, 0]) > 0).all()
    for column in range(100):  # honest: the same range in each column
        here, there = (p[p[:, 0] // 1000 == column, 1] for p in (kept, points))
        assert (here.min(), here.max()) == (there.min(), there.max())


@pytest.mark.parametrize("losses", [[2.5], [2.5, 2.5, 2.5], [0.0, 0.0], [1e-12, 1e250], [-1e12, 1e12]])
def test_odd_ranges(losses):
    chart = charts(run_of([train_record(step, loss) for step, loss in enumerate(losses)]))["Loss"]
    for x, y in places(chart, 0):
        assert LEFT <= x <= RIGHT
        assert TOP <= y <= BOTTOM
    assert len(chart.y_ticks) >= 2
