"""The data of a run."""

import shutil

import pytest

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
