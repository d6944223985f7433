"""Each tracker's own files, read back by its own reader, against `metrics.jsonl`."""

import json
import os
import subprocess
import sys

import pytest

from lumi.config import UserError
from lumi.training.metrics import read_metrics
from lumi.training.trackers import check_installed, scalars_of, tracked_run

LOG = """if True:
    import sys
    from pathlib import Path
    from lumi.training.run_folder import RunFolder
    from lumi.training.run_log import RunLog

    resumed, last = int(sys.argv[2]), int(sys.argv[3])
    log = RunLog(RunFolder(Path(sys.argv[1])), is_main=True)
    config = {"num_steps": last, "model": {"num_layers": 2}}
    log.begin(resumed, ["tensorboard", "wandb", "trackio"], config)
    for step in range(resumed + 1, last + 1):
        values = {"loss": 10 / step, "skipped": step == 3, "mix": [0.25, 0.75], "started_after": resumed}
        log.write(step, "train", **values, gradient_norm=float("nan") if step == 3 else 0.5)
        if step % 4 == 0:
            log.write(step, "validation", loss=11 / step)
            log.write(step, "checkpoint", stall_seconds=0.125)
    log.draw()
    log.finish_tracking()
"""
TRACKIO = """if True:
    import json, sys
    from trackio.sqlite_storage import SQLiteStorage
    [run] = SQLiteStorage.get_runs("lumi")
    print(json.dumps([run, SQLiteStorage.get_logs("lumi", run), SQLiteStorage.get_run_config("lumi", run)]))
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder of a run that logged 12 steps, and, as after a kill, went on from step 4 to 14."""
    pytest.importorskip("wandb", reason="needs the extra trackers")
    pytest.importorskip("trackio", reason="needs the extra trackers")
    folder = tmp_path_factory.mktemp("trackers")
    for name in ("run", "home", "here"):
        (folder / name).mkdir()
    log(folder, 0, 12)
    log(folder, 4, 14)
    assert list((folder / "here").iterdir()) == []
    return folder


def environment(folder):
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    ours |= {"HOME": str(folder / "home"), "TRACKIO_DIR": str(folder / "trackio"), "OMP_NUM_THREADS": "1"}
    return ours | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}


def log(folder, resumed, last):
    command = [sys.executable, "-c", LOG, str(folder / "run"), str(resumed), str(last)]
    options = {"env": environment(folder), "cwd": folder / "here", "timeout": 300}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    assert "warning: tracker" not in done.stdout + done.stderr, done.stderr
    assert "skipped metric" not in done.stderr


def expected(folder):
    """{name: {step: value}} of `metrics.jsonl`."""
    found = {}
    for record in read_metrics(folder / "run" / "metrics.jsonl"):
        for name, value in scalars_of(record).items():
            found.setdefault(name, {})[record["step"]] = value
    assert list(found["train/loss"]) == list(range(1, 15))
    return found


def test_tensorboard_has_every_record_once(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "run" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted = expected(logged)
    assert {tag for tag in scalars if not tag.startswith("final/")} == set(wanted)
    for tag, values in wanted.items():
        assert [step for step, _ in scalars[tag]] == list(values)
        assert [value for _, value in scalars[tag]] == pytest.approx(list(values.values()), rel=1e-6)
    assert scalars["train/started_after"][3:5] == [(4, 0), (5, 4)]  # of the steps done again, the later ones
    assert scalars["final/best_validation_loss"][-1] == (14, pytest.approx(11 / 12, rel=1e-6))
    config = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert json.loads(config) == {"num_steps": 14, "model": {"num_layers": 2}}
    [image] = events.Images("loss")[-1:]
    assert (image.step, image.width, image.height) == (14, 960, 540)


def wandb_records(folder):
    """The records of each session.

    A file of W&B is a log of LevelDB, whose first block begins with 7 bytes of W&B's own. In a block of
    32 kB stand pieces of records: a checksum of 4 bytes, the length in 2, the kind in 1 (1: a whole record;
    2, 3, 4: its beginning, middle, end), and the piece.
    """
    from wandb.proto import wandb_internal_pb2

    for file in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        data, at, pieces, records = file.read_bytes(), 7, b"", []
        assert data[:4] == b":W&B"
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # too little for a piece: the rest of the block is empty
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            pieces += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                records.append(wandb_internal_pb2.Record.FromString(pieces))
                pieces = b""
        yield records


def test_wandb_goes_on_with_the_same_run(logged):
    first, second = wandb_records(logged)
    ids = {record.run.run_id for record in first + second if record.HasField("run")}
    assert ids == {json.loads((logged / "run" / "tracking.json").read_text())["id"]}
    wanted, found = expected(logged), {}
    for record in [*first, *second]:
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            for name in row.keys() & wanted.keys():
                found.setdefault(name, {})[int(row["step"])] = json.loads(row[name])
    assert found == wanted
    metrics = {record.metric.glob_name: record.metric for record in first if record.HasField("metric")}
    assert metrics["*"].step_metric == "step"
    summary = {
        (item.key or item.nested_key[0]): item.value_json
        for record in second
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert json.loads(summary["final/validation_loss"]) == pytest.approx(11 / 12)
    config = {
        u.key: json.loads(u.value_json) for r in second if r.HasField("config") for u in r.config.update
    }
    assert config["num_steps"] == 14
    assert any("media/images/loss" in str(path) for path in (logged / "run" / "wandb").rglob("*.png"))


def test_trackio_goes_on_with_the_same_run(logged):
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO], env=environment(logged), capture_output=True, text=True, check=True
    )
    run, rows, config = json.loads(done.stdout.splitlines()[-1])
    assert run.startswith("run-")
    assert config["num_steps"] == 14
    wanted, found = expected(logged), {}
    for row in rows:
        for name in row.keys() & wanted.keys():
            assert row["step"] not in found.setdefault(name, {}), "a record stands there twice"
            found[name][row["step"]] = row[name]
    # It cannot forget steps: those done again stand there as they were the first time.
    wanted["train/started_after"] = dict.fromkeys(range(1, 13), 0) | {13: 4, 14: 4}
    assert found == wanted
    finals = [row for row in rows if "final/validation_loss" in row]
    assert [row["step"] for row in finals] == [12, 14]
    assert finals[-1]["loss"]["_type"] == "trackio.image"


def test_scalars():
    record = {"step": 3, "kind": "train", "loss": None, "skipped": True, "mix": [0.5, 0.25], "tokens": 7}
    assert scalars_of(record) == {
        "train/skipped": 1,
        "train/mix/0": 0.5,
        "train/mix/1": 0.25,
        "train/tokens": 7,
    }


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    check_installed([])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # as W&B leaves it in the folder where it runs
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r'trackers must be installed, got "wandb", .*lumi-train\[trackers\]'):
        check_installed(["wandb"])


def test_a_run_keeps_its_id(tmp_path):
    first, again = tracked_run(tmp_path, {}, 0), tracked_run(tmp_path, {}, 4)
    assert first.id == again.id
    assert (first.resume_step, again.resume_step) == (0, 4)
    (tmp_path / "other").mkdir()
    assert tracked_run(tmp_path / "other", {}, 0).id != first.id
