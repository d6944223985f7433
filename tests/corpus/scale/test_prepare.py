"""The central promise: any number of tasks gives the files of one process, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from task_runs import (
    chats_config,
    files_of,
    in_tasks,
    make_small,
    pairs_config,
    planned,
    real_texts,
    run_stages,
    texts_config,
    write_files,
)

from lumi.config import UserError, from_dict, to_dict, write_json
from lumi.corpus import PrepareConfig, prepare
from lumi.corpus.scale import reading, stages
from lumi.corpus.scale.prepare import Executor, parse_sbatch, prepare_in_tasks

CONFIGS = {"texts": texts_config, "conversations": chats_config, "pairs": pairs_config}


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_number_of_tasks_gives_the_files_of_one_process(kind, tmp_path, monkeypatch):
    make_small(monkeypatch)
    config = CONFIGS[kind](tmp_path)
    manifest = prepare(config, tmp_path / "one", num_workers=1)
    expected = files_of(tmp_path / "one")
    for num_tasks in (1, 2, 5):
        assert in_tasks(config, tmp_path / f"tasks{num_tasks}", num_tasks) == expected
    assert len(manifest["shards"]) > 2  # the rest: what the inputs must hold for the comparison to count
    dropped = {reason for source in manifest["sources"] for reason in source["dropped"]}
    assert {"malformed_json", "exact_duplicate"} <= dropped
    assert "near_duplicate" in dropped or kind == "pairs"
    if kind == "texts":
        assert {"normalized_duplicate", "low_score", "not_sampled"} <= dropped
        assert sum(manifest["sources"][1]["licenses"].values()) == manifest["sources"][1]["kept"]
        assert manifest["sources"][0]["replaced"]["email"] > 1
        assert manifest["columns"] == ["text", "source", "license", "url"]
        assert [source["budget_reached"] for source in manifest["sources"]] == [True, False, True, True]
        assert b"reasoning" not in expected["manifest.json"]
    if kind == "conversations":
        assert any(b"reasoning_content" in data for data in expected.values())


def test_tasks_find_the_text_of_evaluation_sets_as_one_process_does(tmp_path, monkeypatch):
    make_small(monkeypatch)
    texts = real_texts(60)
    (tmp_path / "exam.txt").write_text(texts[7][100:400])
    paths = write_files(tmp_path, "a", [{"text": text} for text in texts], 3)
    against = {"name": "exam", "source": {"kind": "text", "paths": [str(tmp_path / "exam.txt")]}}
    sources = [{"kind": "jsonl", "name": "a", "paths": paths}]
    config = from_dict(PrepareConfig, {"sources": sources, "decontamination": {"against": [against]}})
    manifest = prepare(config, tmp_path / "one", num_workers=1)
    assert manifest["sources"][0]["dropped"]["shares_text_with_exam"] >= 1
    assert in_tasks(config, tmp_path / "tasks", 2) == files_of(tmp_path / "one")


@pytest.mark.parametrize("off", ["near", "exact"])
def test_rows_of_keys_that_are_off(off, tmp_path, monkeypatch):
    make_small(monkeypatch)
    config = to_dict(texts_config(tmp_path)) | {"deduplication": {"near": off == "exact", "exact": False}}
    config = from_dict(PrepareConfig, config)
    prepare(config, tmp_path / "one", num_workers=1)
    assert in_tasks(config, tmp_path / "tasks", 3) == files_of(tmp_path / "one")


@pytest.mark.parametrize("stage", ["read", "share", "decide", "write", "publish"])
def test_a_stage_that_was_interrupted_goes_on(stage, tmp_path, monkeypatch):
    """Each stage fails at its second file of results; a new call takes another number of tasks."""
    make_small(monkeypatch)
    config = texts_config(tmp_path)
    prepare(config, tmp_path / "one", num_workers=1)
    work = planned(config, tmp_path / "tasks")
    whole = list(stages.STAGES)
    run_stages(work, 2, whole[: whole.index(stage)])
    real, calls = os.replace if stage in ("share", "write", "publish") else os.rename, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == 2 or stage == "decide":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, real.__name__, fail)
        with pytest.raises(KeyboardInterrupt):
            run_stages(work, 2, [stage])
    assert not (work.output / "manifest.json").exists()
    run_stages(work, 3)
    assert files_of(work.output) == files_of(tmp_path / "one")
    assert not work.folder.exists()


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(texts_config(tmp_path), tmp_path / "tasks")
    run_stages(work, 2, ["read", "share", "decide", "write"])

    def times():
        return {path: path.stat().st_mtime_ns for path in work.folder.rglob("*") if path.is_file()}

    before = times()
    run_stages(work, 5, ["read", "share", "decide", "write"])
    assert times() == before


def test_a_unit_goes_on_after_its_last_batch(tmp_path, monkeypatch):
    make_small(monkeypatch)
    work = planned(pairs_config(tmp_path), tmp_path / "tasks")
    real, calls = reading.process_batch, []

    def process_batch(rules, records):
        calls.append(len(records))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(rules, records)

    monkeypatch.setattr(reading, "process_batch", process_batch)
    with pytest.raises(KeyboardInterrupt):
        run_stages(work, 1, ["read"])
    assert not work.index(0).exists()
    run_stages(work, 1, ["read"])
    batches = sum(len(work.facts(number)["parts"]) for number in range(2))
    assert len(calls) == batches + 1  # the one that failed


def command(config, output, *options):
    arguments = ["prepare", "--config", str(config), "--output-dir", str(output), *options]
    return [sys.executable, "-m", "lumi.cli", *arguments]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_and_called_again_with_other_tasks(tmp_path):
    """kill -9, in the middle of stage 1: its processes end too, and a new call makes the same files."""
    config = texts_config(tmp_path)
    write_json(tmp_path / "config.json", to_dict(config))
    prepare(config, tmp_path / "one", num_workers=1)
    output = tmp_path / "tasks"
    start = command(tmp_path / "config.json", output, "--executor", "local", "--tasks")
    killed = subprocess.Popen([*start, "3", "--num-workers", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(output.glob(".cache/tasks-*/index/0*")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.02)
    workers = children(killed.pid)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2
    assert not any(map(is_alive, workers))
    done = subprocess.run([*start, "5", "--use-cache"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == files_of(tmp_path / "one")
    again = subprocess.run([*start, "5", "--use-cache"], capture_output=True, text=True)
    assert f"{output} is up to date" in again.stdout


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_in_processes_prints_what_one_process_prints(tmp_path, capfd):
    pytest.importorskip("datatrove")
    paths = write_files(tmp_path, "a", [{"text": text} for text in real_texts(9)], 2)
    source = {"kind": "jsonl", "name": "a", "paths": paths, "max_documents": 50}
    config = from_dict(PrepareConfig, {"sources": [source]})
    expected = prepare(config, tmp_path / "one", num_workers=1)
    printed = capfd.readouterr()
    manifest = prepare_in_tasks(config, tmp_path / "tasks", Executor(kind="local", num_tasks=2))
    assert manifest == expected
    again = capfd.readouterr()
    assert again.out == printed.out.replace("/one", "/tasks")
    lines = [line for line in again.err.splitlines() if line.startswith("lumi:")]
    assert lines == [line for line in printed.err.splitlines() if line.startswith("lumi:")] != []
    assert "datatrove" not in again.err
    logs = tmp_path / "tasks" / ".cache" / "logs"
    assert {path.name for path in logs.iterdir()} == set(stages.STAGES)
    assert len(list((logs / "read" / "logs").iterdir())) == 2
    assert "Processing done" in (logs / "write" / "logs" / "task_00001.log").read_text()


def test_an_error_of_a_task_is_the_error_of_the_run(tmp_path, capfd):
    pytest.importorskip("datatrove")
    paths = write_files(tmp_path, "a", [{"text": "x"}], 1)
    config = from_dict(PrepareConfig, {"sources": [{"kind": "jsonl", "name": "a", "paths": paths}]})
    for num_workers in (1, 2):
        executor = Executor(kind="local", num_tasks=2, num_workers=num_workers)
        with pytest.raises(UserError, match="sources must give at least one document that is kept, got none"):
            prepare_in_tasks(config, tmp_path / "tasks", executor)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tasks": 0}, "--tasks must be at least 1, got 0"),
        ({"num_workers": 0}, "--num-workers must be at least 1, got 0"),
        ({"kind": "slurm"}, "--sbatch must hold --partition"),
        ({"sbatch": "--time=1"}, "--sbatch must be left out with --executor local, got '--time=1'"),
    ],
)
def test_impossible_executors_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Executor(**{"kind": "local", "num_tasks": 1} | values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--sbatch must hold --partition=... and --time=..., got ''"),
        ("--partition=a", "--sbatch must hold --time=..., got '--partition=a'"),
        ("--partition=a --time", "--sbatch must hold --time=..."),
        ("partition=a", "--sbatch must hold options as --name=value, got partition=a"),
        ("-p a", "--sbatch must hold options as --name=value, got -p"),
        (
            "--partition='a",
            '--sbatch must hold options as --name=value, got "--partition=\'a": No closing quotation',
        ),
    ],
)
def test_options_of_sbatch_that_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        parse_sbatch(options)
    assert str(caught.value).startswith(message)


def test_a_value_in_quotes_is_one_value():
    found = parse_sbatch("--partition=a --time=1 --comment='two words' --exclusive")
    assert found == {"partition": "a", "time": "1", "comment": "two words", "exclusive": ""}


def test_without_the_extra_one_line_says_how_to_install_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"sources": [{"kind": "python_docs", "name": "a"}]}))
    code = "import sys; sys.modules['datatrove'] = None; from lumi.cli import main; sys.exit(main())"
    arguments = command(tmp_path / "config.json", tmp_path / "c", "--executor", "local", "--tasks", "2")[3:]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the package datatrove")
    assert done.stderr.endswith("; run: pip install 'lumi-train[scale]'\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
