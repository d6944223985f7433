"""The stages as a stranger types them: every command a process of its own, torchrun included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import write_jsonl

import lumi
from lumi.cli import COMMANDS, dispatch
from lumi.command_line import run

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
    "num_steps": 20,
    "dtype": "float32",
    "validate_every": 10,
    "save_every": 10,
}


def call(folder, program, arguments):
    """Run a command line in `folder`; returns its stdout."""
    command = [*map(str, program), *arguments.split()]
    options = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 180}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.soak  # as commands in processes of their own; test_demo.py runs all stages in this one
def test_raw_text_to_generated_text(tmp_path):
    write_jsonl(tmp_path / "raw.jsonl", 400)
    (tmp_path / "prepare.json").write_text(json.dumps(PREPARE))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab_size": 384}))
    (tmp_path / "train.json").write_text(json.dumps(TRAINING))
    lumi_command = [BIN / "lumi"]
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", TRAIN]

    prepare = "prepare --config prepare.json"
    assert "400" in call(tmp_path, lumi_command, f"{prepare} --output-dir corpus --analyze-only")
    assert not (tmp_path / "corpus").exists()
    call(tmp_path, lumi_command, f"{prepare} --output_dir corpus --num_workers 2")
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["documents"] > 200
    assert (tmp_path / "corpus" / "DATA_CARD.md").exists()

    call(
        tmp_path,
        lumi_command,
        "tokenizer --config tokenizer.json --corpus-dirs corpus --output-dir tokenizer",
    )
    stage = "tokenize --corpus-dirs corpus --tokenizer-dir tokenizer/tokenizer.model --output-dir tokens"
    counted = call(tmp_path, lumi_command, f"{stage} --validation-fraction 0.1").splitlines()
    assert [line.split(":")[0] for line in counted] == ["train", "validation"]
    documents = [int(line.split()[1].replace(",", "")) for line in counted]
    assert sum(documents) == manifest["documents"]

    folders = "--data-dirs tokens --tokenizer-dir tokenizer --output-dir run"
    printed = call(tmp_path, torchrun, f"--config train.json --device cpu {folders} seed=3")
    assert "2 processes" in printed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3

    generate = [*lumi_command, *"generate --model-path run --max-new-tokens 20 --temperature 0".split()]
    text = call(tmp_path, [*generate, "--prompt", "The river"], "")
    assert text.startswith("The river")
    assert len(text) > 20
    batch = call(tmp_path, [*generate, "--prompt", "The river", "The stone"], "")
    assert batch.startswith(text.strip())


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


def test_the_list_of_commands_loads_no_framework():
    code = "import sys, lumi.cli; lumi.cli.dispatch(['--help']); print(*sys.modules)"
    loaded = call(None, [sys.executable, "-c", code], "").splitlines()[-1].split()
    assert "lumi.commands.inference" in loaded
    assert not {"torch", "numpy", "pyarrow", "lumi.host", "lumi.corpus"} & set(loaded)
