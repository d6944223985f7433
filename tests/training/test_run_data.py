"""The data of a run."""

import os
import shutil
import signal
import subprocess

import fsspec
import pytest
from runs import ENVIRONMENT, final_weights, launch, losses, wait_for_step

import lumi.host.remote
from lumi.config import UserError
from lumi.training.metrics import read_metrics


def test_several_stores_are_mixed_by_weight(start, store_dir, tmp_path):
    other = tmp_path / "other store"
    other.symlink_to(store_dir)
    folder = start(data_dirs=(store_dir, other), weights=[3.0, 1.0])
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert all(
        sum(record["mix"]) == pytest.approx(1) and abs(record["mix"][0] - 0.75) < 1 / record["step"]
        for record in records
    )
    assert records[-1]["mix"] == [0.75, 0.25]


def test_a_corpus_folder_is_tokenized_once(start, corpus_dir, capfd, tmp_path):
    folder = shutil.copytree(corpus_dir, tmp_path / "corpus", ignore=shutil.ignore_patterns(".tokens"))
    start("first", data_dirs=(folder,), num_steps=2)
    assert "tokenizing" in capfd.readouterr().err
    start("second", data_dirs=(folder,), num_steps=2)
    assert "tokenizing" not in capfd.readouterr().err


def test_weights_must_be_as_many_as_folders(start):
    with pytest.raises(UserError, match="one weight per data folder, got 2 for 1"):
        start(weights=[1.0, 2.0])


def test_a_validation_without_targets_is_refused_before_the_run(start, store_dir, tmp_path):
    message = f"{store_dir}, validation split: a validation must hold at least one token to predict"
    with pytest.raises(UserError, match=message):
        start(validation_tokens=1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    start("least", validation_tokens=2, num_steps=1, preflight=True)
    (result,) = [
        record for record in read_metrics(tmp_path / "least" / "metrics.jsonl") if "bits_per_byte" in record
    ]
    assert (result["tokens"], result["loss"] > 1) == (1, True)


def test_a_store_behind_a_url_trains_as_the_one_on_disk(start, store_dir, tmp_path, monkeypatch):
    """Bit for bit, also when it goes on from a checkpoint with an empty cache, or with the store on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(str(store_dir), url, recursive=True)
    local, remote = start("local"), start("remote", data_dirs=(url,))
    shutil.rmtree(tmp_path / "cache")
    checkpoint = str(remote / "checkpoints" / "step-00000008")
    resumed = [start(f"resumed {place}", data_dirs=(place,), resume=checkpoint) for place in (url, store_dir)]
    for folder in (remote, *resumed):
        assert losses(folder) == losses(local)[-len(losses(folder)) :]
        assert final_weights(folder) == final_weights(local)
    monkeypatch.setattr(lumi.host.remote, "WAITS", ())
    shutil.rmtree(tmp_path / "cache")
    fsspec.filesystem("memory").rm(f"{url}/train.tokens")
    with pytest.raises(UserError, match=rf"^{url}/train.tokens: is missing; check the URL"):
        start("lost", data_dirs=(url,))


@pytest.mark.soak  # the same in one process is above
def test_killed_and_resumed_behind_a_url_is_bit_identical(command, store_dir, tmp_path):
    """Two processes share a cache that is smaller than the store's tokens."""
    changes = {"num_steps": 30, "save_every": 4, "validate_every": 15}
    launch(command("straight", **changes, processes=2))
    cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-size", "1KB"]
    killed = command("killed", "--resume-from-checkpoint", "auto", *cache, **changes, processes=2)
    killed[killed.index(str(store_dir))] = f"file://{store_dir}"
    process = subprocess.Popen(killed, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for_step(tmp_path / "killed" / "metrics.jsonl", 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert "resumed from" in launch(killed).stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")
