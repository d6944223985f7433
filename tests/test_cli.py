"""The stages as a stranger types them: every command a process of its own, torchrun included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import write_jsonl

import lumi
from lumi.cli import COMMANDS, dispatch
from lumi.command_line import add_config, normalize, parse, parser, run

BIN = Path(sys.executable).parent
TRAIN = Path(lumi.__file__).parent / "train.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

PREPARE = {"sources": [{"kind": "jsonl", "name": "synthetic", "paths": ["raw.jsonl"]}]}
TRAINING = {
    "model": {
        "vocab_size": 384,
        "num_layers": 2,
        "model_dim": 48,
        "num_heads": 2,
        "mlp_dim": 96,
        "max_positions": 128,
    },
    "batches": {"sequence_length": 64, "batch_tokens": 512, "micro_batch_size": 4},
    "optimizer": {"kind": "muon", "peak_lr": 0.01, "schedule": {"kind": "wsd", "warmup_steps": 5}},
    "num_steps": 60,
    "validate_every": 30,
    "save_every": 30,
}


def call(folder, *command, expect=0):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_raw_text_to_generated_text(tmp_path):
    write_jsonl(tmp_path / "raw.jsonl", 400)
    (tmp_path / "prepare.json").write_text(json.dumps(PREPARE))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab_size": 384}))
    (tmp_path / "train.json").write_text(json.dumps(TRAINING))
    lumi_command = BIN / "lumi"

    plan = call(
        tmp_path,
        lumi_command,
        "prepare",
        "--config",
        "prepare.json",
        "--output-dir",
        "corpus",
        "--analyze-only",
    )
    assert "400" in plan.stdout
    assert not (tmp_path / "corpus").exists()
    call(
        tmp_path,
        lumi_command,
        "prepare",
        "--config",
        "prepare.json",
        "--output_dir",
        "corpus",
        "--num_workers",
        "2",
    )
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["documents"] > 200
    assert (tmp_path / "corpus" / "DATA_CARD.md").exists()
    call(
        tmp_path,
        lumi_command,
        "tokenizer",
        "--config",
        "tokenizer.json",
        "--corpus-dirs",
        "corpus",
        "--output-dir",
        "tokenizer",
    )
    stage = (
        "tokenize",
        "--corpus-dirs",
        "corpus",
        "--tokenizer-dir",
        "tokenizer/tokenizer.model",
        "--output-dir",
        "tokens",
    )
    counted = call(tmp_path, lumi_command, *stage, "--validation-fraction", "0.1").stdout.splitlines()
    assert [line.split(":")[0] for line in counted] == ["train", "validation"]
    documents = [int(line.split()[1].replace(",", "")) for line in counted]
    assert sum(documents) == manifest["documents"]
    torchrun = (
        BIN / "torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        TRAIN,
        "--config",
        "train.json",
        "--device",
        "cpu",
    )
    done = call(
        tmp_path,
        *torchrun,
        "--data-dirs",
        "tokens",
        "--tokenizer-dir",
        "tokenizer",
        "--output-dir",
        "run",
        "seed=3",
    )
    assert "2 processes" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    generate = (
        lumi_command,
        "generate",
        "--model-path",
        "run",
        "--max-new-tokens",
        "20",
        "--temperature",
        "0",
    )
    text = call(tmp_path, *generate, "--prompt", "The river").stdout
    assert text.startswith("The river")
    assert len(text) > 20
    batch = call(tmp_path, *generate, "--prompt", "The river", "The stone").stdout
    assert batch.startswith(text.strip())
    refused = call(tmp_path, *generate, "--top-p", "0", "--prompt", "x", expect=2)
    assert refused.stderr.strip() == "error: --top-p must be between 0.000001 and 1 (off), got 0.0"


def test_normalize():
    given = ["--data_dirs", "a_b", "--x-y_z=p_q", "key_a.b_c=1", "-x_y"]
    assert normalize(given) == ["--data-dirs", "a_b", "--x-y-z=p_q", "key_a.b_c=1", "-x_y"]


def test_overrides_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    arguments = parser("x", "")
    add_config(arguments)
    arguments.add_argument("--data-dirs", nargs="+")
    for argv in (
        ["seed=1", "--config", "c.json", "--data-dirs", "S", "a=b", "model.dim=2"],
        ["--data-dirs", "S", "seed=1", "a=b", "--config", "c.json", "model.dim=2"],
        ["--config", "c.json", "--data-dirs", "S", "a=b", "--", "seed=1", "model.dim=2"],
    ):
        options = parse(arguments, argv)
        assert (options.config, options.data_dirs, options.overrides) == (
            "c.json",
            ["S", "a=b"],
            ["seed=1", "model.dim=2"],
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name](["--help"])
    assert stop.value.code == 0
    assert COMMANDS[name].__doc__ in capsys.readouterr().out


def test_usage_version_and_unknown_commands(capsys):
    assert dispatch(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"lumi {lumi.__version__}\n"
    assert run(dispatch, ["trian"]) == 2
    assert (
        capsys.readouterr().err == f"error: the command must be one of {', '.join(COMMANDS)}, got 'trian'\n"
    )


def test_plan(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(TRAINING))
    arguments = [
        "plan",
        "--config",
        str(tmp_path / "c.json"),
        "--nodes",
        "2",
        "--gpus_per_node",
        "2",
        "--network-gbps",
        "100",
    ]
    arguments.append("batches.micro_batch_size=2")
    assert run(dispatch, [*arguments, "parallel.shard=2", "num_steps=7"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("c on 2 nodes of 2 x H100: an estimate, by arithmetic\n")
    assert "replicate 2 x shard 2 x tensor 1; shard of 2 over NVLink, replicate of 2 over the network" in plan
    assert "7 steps, 3,584 tokens" in plan
    assert "FITS in 90% of 80 = 72.0 GiB" in plan
    assert (
        "2, network       2  4.63e-05     10" in plan
    )  # 2 bytes of half a layer of 23,136, twice; 80% of 100 Gb/s
    for more, message in (
        (["--mfu", "0"], "--mfu must be above 0 and at most 1, got 0.0"),
        (["--disk-gb-per-second", "-1"], "--disk-gb-per-second must be positive, got -1.0"),
        (["parallel.shard=3"], "parallel: replicate -1 x shard 3 x tensor 1 = 3 must divide the 4 processes"),
        (["model=null"], "--config must be one of pre-training"),
    ):
        assert run(dispatch, [*arguments, *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--config", "none.json", "--output-dir", "x"],
            "none.json: cannot be read: No such file or directory",
        ),
        (
            ["tokenize", "--corpus-dirs", "none", "--tokenizer-dir", "none", "--output-dir", "x"],
            "none: must be a tokenizer folder",
        ),
        (
            ["generate", "--model-path", "none", "--prompt", "x"],
            "none: must be a model folder with a config.json",
        ),
        pytest.param(
            ["generate", "--model-path", "none", "--prompt", "x", "--device", "cuda"],
            '--device must be "cpu" or "auto" on this machine, got "cuda"',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(dispatch, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
