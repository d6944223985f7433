"""Where stages put their results: behind symbolic links, on mount points, on disks that are read-only."""

import json
import subprocess

import pytest
from crafted_models import save_adapted, save_base
from runs import CONFIG
from synthetic import write_jsonl

import lumi.train
from lumi.cli import dispatch
from lumi.command_line import run
from lumi.data.token_store import TokenStore
from lumi.model.lora import LoraConfig

STAGES = {  # arguments, and a file of what they leave
    "prepare": ("--config prepare.json --num-workers 1", "manifest.json"),
    "tokenizer": ("--config tokenizer.json --corpus-dirs {corpus}", "tokenizer.model"),
    "tokenize": (
        "--corpus-dirs {corpus} --tokenizer-dir {tokenizer} --validation-fraction 0",
        "manifest.json",
    ),
    "train": ("--config train.json --data-dirs {store} --tokenizer-dir {tokenizer}", "final/config.json"),
    "evaluate": ("--model-path base --data-dirs {store} smoke_tests=null", "evaluation_results.json"),
    "export": ("--model-path base", "model.safetensors"),
    "merge": ("--model-path adapter", "model.safetensors"),
}
REPLACED = ("tokenizer", "tokenize", "export", "merge")  # their folders take their places as a whole


@pytest.fixture
def stage(corpus_dir, tokenizer, tokenizer_dir, store_dir, tmp_path, monkeypatch):
    """Calls a stage with an output folder; returns its exit code."""
    save_adapted(save_base(tokenizer, tmp_path / "base"), LoraConfig(rank=2), tokenizer, tmp_path / "adapter")
    raw = {"kind": "jsonl", "name": "raw", "paths": [str(write_jsonl(tmp_path / "raw.jsonl", 100))]}
    configs = {"prepare": {"sources": [raw]}, "tokenizer": {"vocab_size": 384}, "train": CONFIG}
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    def stage(name, output):
        folders = {"corpus": corpus_dir, "tokenizer": tokenizer_dir, "store": store_dir}
        arguments = [*STAGES[name][0].format(**folders).split(), "--output-dir", str(output)]
        if name == "train":
            return run(lumi.train.main, [*arguments, "--device", "cpu", "num_steps=1"])
        return run(dispatch, [name, *arguments])

    return stage


def remount(disk, option):
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


@pytest.mark.parametrize("name", STAGES)
def test_a_link_to_a_folder_on_another_disk_is_followed(name, stage, disk_of, tmp_path):
    (disk_of("64m") / "results").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "results")
    assert stage(name, link) == 0
    assert link.is_symlink()
    assert (tmp_path / "disk" / "results" / STAGES[name][1]).is_file()
    assert not list((tmp_path / "disk").glob(".tmp-*"))


@pytest.mark.parametrize("name", STAGES)
def test_a_mount_point_works_or_is_refused_before_the_work(name, stage, disk_of, capsys):
    disk = disk_of("64m")
    code = stage(name, disk)
    printed = capsys.readouterr()
    if name in REPLACED:
        refused = f"must be a folder that can be replaced, got {disk}, a mount point"
        assert printed.err == f"error: --output-dir {refused}; choose one inside it: {disk}/output\n"
        assert (code, printed.out, list(disk.iterdir())) == (2, "", [])
        assert stage(name, disk / "output") == 0
    else:
        assert code == 0, printed.err
        assert (disk / STAGES[name][1]).is_file()


@pytest.mark.parametrize("name", STAGES)
def test_a_read_only_disk_is_refused_before_the_work(name, stage, disk_of, capsys):
    disk = disk_of("64m")
    remount(disk, "ro")
    assert stage(name, disk / "output") == 2
    *before, error = capsys.readouterr().err.splitlines()
    place = f"got {disk / 'output'}: {disk} is a folder that cannot be written to"
    assert error == f"error: --output-dir must be a folder that can be written to, {place}"
    assert before == []


def test_the_tokens_of_a_read_only_corpus_go_to_the_user_s_cache(
    stage, disk_of, corpus_dir, tokenizer_dir, tmp_path, monkeypatch, capsys
):
    disk = disk_of("64m")
    subprocess.run(["cp", "-r", corpus_dir, disk / "corpus"], check=True)
    subprocess.run(["rm", "-rf", disk / "corpus" / ".tokens"], check=True)
    remount(disk, "ro")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = [
        "--tokenizer-dir",
        str(tokenizer_dir),
        "--config",
        "train.json",
        "--device",
        "cpu",
        "num_steps=1",
    ]

    def train(name, *arguments):
        places = ["--data-dirs", str(disk / "corpus"), "--output-dir", name]
        assert run(lumi.train.main, [*common, *places, *arguments]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "tokens are kept" in line]

    (line,) = train("first")
    (cache,) = (tmp_path / "cache" / "lumi" / "tokens").iterdir()
    assert line == f"{disk / 'corpus'}: cannot be written to; its tokens are kept in {cache}"
    assert TokenStore.open(cache).has_split("train")
    assert train("second") == []  # they are there
    assert train("third", "--cache-dir", "named") == []  # as it was asked for
    assert [place.name for place in (tmp_path / "named").iterdir()] == [cache.name]
