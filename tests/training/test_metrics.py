import json
import resource

import numpy as np
import pytest

from lumi.config import UserError
from lumi.training.metrics import Meter, MetricsLog, draw_loss, final_figures, human, read_metrics, smoothed


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(step, "train", loss=float(step))
    log.write(4, "validation", loss=0.5)
    log.close()
    log = MetricsLog(path, resume_step=3)
    log.write(4, "train", loss=40.0)
    log.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_a_line_cut_by_a_kill_is_left_out_but_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert [record["step"] for record in read_metrics(path)] == [1]
    path.write_text('{"step": 1, "ki\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not valid JSON"):
        read_metrics(path)


def test_resuming_drops_lines_that_are_no_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": %d, "kind": "train"}\n'
    path.write_bytes(good % 1 + b'{"step": 2, "ki' + good % 3 + b"\0\xff\0\n[]\n{}\n" + good % 4 + b'{"st')
    log = MetricsLog(path, resume_step=4)
    log.write(5, "train")
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 4, 5]


def test_a_line_for_which_there_is_no_room_leaves_no_half(tmp_path):
    """A file that may not grow takes half of it, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, "train")
    size, before = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"metrics\.jsonl: cannot be written: No space left on device; make room"
        ):
            log.write(2, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size
    log.write(3, "train")
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_picture(tmp_path):
    records = [{"step": s, "kind": "train", "loss": None if s == 3 else 5 / s} for s in range(1, 9)]
    records.append({"step": 8, "kind": "validation", "loss": 0.7})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_loss(tmp_path / "m.jsonl", tmp_path / "loss.png", "a run", "token")
    data = (tmp_path / "loss.png").read_bytes()
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (960, 540)


def test_human():
    assert [human(v) for v in (0, 12.345, 1234, 999_700, 9_438_336, 2e12)] == [
        "0",
        "12.3",
        "1.23k",
        "1M",
        "9.44M",
        "2T",
    ]
    assert human(1.5e9, "FLOP/s") == "1.5 GFLOP/s"
    assert human(3, "B") == "3 B"


def test_what_is_not_finite_becomes_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(1, "train", loss=float("nan"), norm=float("inf"), lr=0.5, tokens=3)
    log.close()
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "kind": "train", "loss": None, "norm": None, "lr": 0.5, "tokens": 3}
    ]


def test_meter(monkeypatch):
    times = iter([0.0, 0.5, 1.25, 2.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    meter = Meter()
    meter.add(100)
    with meter.waiting():
        meter.add(300)
    assert meter.read() == (2.0, 0.75, 200.0)
    meter.add(50)
    assert meter.read() == (1.0, 0.0, 50.0)


@pytest.mark.parametrize("decay_steps", [3, 10, 40, 150, 600])
def test_the_smoothed_curve_lies_within_the_noise(decay_steps):
    """The truth is 2 + 6 exp(-t / decay); the noise is 0.1 up and down in turn, so it cancels out."""
    steps = np.arange(900)
    truth = 2 + 6 * np.exp(-steps / decay_steps)
    curve = smoothed(truth + 0.1 * (-1.0) ** steps)
    assert np.abs(curve - truth).max() <= 0.1 + 1e-9
    later = slice(200, None)
    assert np.abs(curve - truth)[later].max() < 0.03  # and it takes most of the noise away


def test_the_smoothed_curve_of_a_straight_line_is_the_line():
    line = 7.5 - 0.01 * np.arange(500)
    assert smoothed(line) == pytest.approx(line, abs=1e-9)
    assert [smoothed(values).tolist() for values in ([], [3.0], [3.0, 1.0])] == [[], [3.0], [3.0, 1.0]]


def test_a_step_is_smoothed_from_both_sides():
    """10 until step 500, then 0. The middle of the curve is where the data falls, and not later."""
    curve = smoothed([10.0] * 500 + [0.0] * 500)
    assert 4 < (curve[499] + curve[500]) / 2 < 6
    assert curve[479] == pytest.approx(10)
    assert curve[520] == pytest.approx(0, abs=1e-9)


def test_a_fall_near_the_end_is_not_carried_on():
    """The level falls 15 values before the end and stays there: so does the curve."""
    curve = smoothed([40.0] * 185 + [13.0] * 15)
    assert curve[-5:] == pytest.approx([13.0] * 5)
    assert curve.min() > 10


def test_final_figures():
    records = [
        {"step": 1, "kind": "train", "loss": 5.0, "tokens": 8, "tokens_per_second": 1.0, "skipped": False},
        {"step": 2, "kind": "train", "loss": 4.0, "tokens": 16, "tokens_per_second": 9.0, "skipped": False},
        {"step": 2, "kind": "validation", "loss": 4.5, "bits_per_byte": 2.0},
        {
            "step": 3,
            "kind": "train",
            "loss": None,
            "tokens": 24,
            "tokens_per_second": 8.0,
            "skipped_steps": 1,
        },
        {"step": 3, "kind": "validation", "loss": 4.75, "bits_per_byte": 2.25},
        {"step": 3, "kind": "checkpoint", "stall_seconds": 0.5},
    ]
    assert final_figures(records) == {
        **{"loss": 4.0, "tokens": 24, "skipped_steps": 1, "tokens_per_second": 8.0},
        **{"validation_loss": 4.75, "validation_bits_per_byte": 2.25},
        **{"best_validation_loss": 4.5, "best_validation_step": 2},
    }
    assert final_figures([]) == {}
