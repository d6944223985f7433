"""The loop, in this process and as users start it: torchrun, kill -9, resume."""

import dataclasses
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, final_weights, launch, losses, wait_for_step

import lumi.checkpoint.saver
import lumi.model.transformer
import lumi.train
import lumi.training.trainer
import lumi.training.validation
from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint
from lumi.config import UserError, from_dict
from lumi.host.interruption import StopSignal
from lumi.training.loss_scale import LossScale
from lumi.training.metrics import read_metrics
from lumi.training.run_config import TrainConfig
from lumi.training.trainer import Trainer

SCRIPT = Path(lumi.train.__file__)


def test_it_learns_and_leaves_what_the_design_says(start, tokenizer, capsys):
    folder = start(num_steps=60, validate_every=20, save_every=20)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "status.json",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "final",
        ".lock",
    }
    curve = losses(folder)
    assert len(curve) == 60
    assert curve[0] == pytest.approx(
        torch.tensor(384.0).log().item(), rel=0.02
    )  # untrained: uniform over the vocabulary
    assert curve[-1] < 0.6 * curve[0]
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert from_dict(TrainConfig, json.loads((folder / "config.json").read_text())).num_steps == 60
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-00000040",
        "step-00000060",
    ]
    validation = [
        record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"
    ]
    assert [record["step"] for record in validation] == [20, 40, 60]
    assert validation[-1]["bits_per_byte"] < validation[0]["bits_per_byte"]
    printed = capsys.readouterr().out
    for line in (
        "45,216 parameters",
        "60 of 256 tokens: 1 process x 4 micro-steps x 2 rows x 32",
        "FLOPs",
        "MiB",
        "epochs",
    ):
        assert line in printed
    assert printed.index("parameters") < printed.index("validation loss")


def test_micro_batches_change_rounding_only(start):
    whole = losses(start("whole", batches={"micro_batch_size": 8}))
    assert losses(start("slices", batches={"micro_batch_size": 1})) == pytest.approx(whole, rel=5e-5)
    assert losses(start("other seed", seed=1)) != pytest.approx(whole, rel=2e-3)


def kill_after(command, metrics, step, number):
    """Start a training, send it a signal once it has logged `step`; returns its exit code."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for_step(metrics, step, process)
    os.killpg(process.pid, number)
    return process.wait(timeout=60)


def test_killed_and_resumed_is_bit_identical(command, tmp_path):
    """In bfloat16; tests/test_faults.py kills in float32, at every kind of moment."""
    changes = {"num_steps": 30, "save_every": 4, "validate_every": 15, "dtype": "bfloat16"}
    launch(command("straight", **changes))
    killed = command("killed", "--resume-from-checkpoint", "auto", **changes)
    assert kill_after(killed, tmp_path / "killed" / "metrics.jsonl", 6, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    assert "resumed from" in launch(killed).stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "straight")


def test_a_second_signal_stops_at_once(monkeypatch):
    exits, now = [], iter([10.0, 10.2, 12.0])
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        signal.raise_signal(
            signal.SIGINT
        )  # a fifth of a second later: the same Ctrl-C, handed on by torchrun
        assert exits == []
        signal.raise_signal(signal.SIGINT)
        assert exits == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_auto_goes_back_to_the_newest_whole_checkpoint(start, tmp_path, capsys):
    """One flipped byte costs the steps since the checkpoint before; the run then is the one that never stopped."""
    whole = start("whole")
    start("damaged", num_steps=8)
    newest, older = (tmp_path / "damaged" / "checkpoints" / f"step-0000000{step}" for step in (8, 4))
    file = newest / "optimizer-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    start("damaged", resume="auto")
    printed = capsys.readouterr().out
    assert f"{file}: SHA-256 must be" in printed
    assert f"resumed from {older} at step 4" in printed
    assert losses(tmp_path / "damaged") == losses(whole)
    assert final_weights(tmp_path / "damaged") == final_weights(whole)
    for path in list_checkpoints(tmp_path / "damaged" / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(
        UserError,
        match=r"none of 2 checkpoints is whole; the newest: .*step-00000012/state\.json: must be \d+ bytes, got 2",
    ):
        start("damaged", resume="auto", num_steps=16)


def test_best_and_last_checkpoints_are_kept(start, monkeypatch):
    results = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    real = lumi.training.validation.held_out_loss

    def scripted(*arguments):
        return type(real(*arguments))(loss=next(results), bits_per_byte=1.0, tokens=1, bytes=1)

    monkeypatch.setattr(lumi.training.validation, "held_out_loss", scripted)
    folder = start(num_steps=10, validate_every=2, save_every=2, keep_last=2)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
    assert open_checkpoint(folder / "checkpoints" / "step-00000010").state["best"] == {"step": 4, "loss": 1.0}


def test_the_best_is_known_though_a_signal_cut_its_validation(start, monkeypatch):
    """The validation of step 4, at which a checkpoint is saved, is done over when the run goes on; it is the lowest."""
    real, signals = lumi.training.validation.held_out_loss, iter([False] * 3 + [True])
    scripted = iter([1.0, 2.0, 3.0] * 2)

    def held_out_loss(*arguments):
        if next(signals, False):
            signal.raise_signal(signal.SIGTERM)
        result = real(*arguments)
        return result and dataclasses.replace(result, loss=next(scripted))

    monkeypatch.setattr(lumi.training.validation, "held_out_loss", held_out_loss)
    whole = start("whole", final="best")
    start("cut", final="best", expect=128 + signal.SIGTERM)
    cut = start("cut", final="best", resume="auto")
    best = [
        open_checkpoint(folder / "checkpoints" / "step-00000012").state["best"] for folder in (whole, cut)
    ]
    assert best == [{"step": 4, "loss": 1.0}] * 2
    assert final_weights(cut) == final_weights(whole)


def spoil(monkeypatch, bad_steps, value):
    """Make the training loss of some steps `value`."""
    real, micro_batches = (
        lumi.model.transformer.Transformer.forward,
        itertools.count(4),
    )  # four micro-batches a step

    def forward(self, *arguments):
        loss = real(self, *arguments)
        bad = torch.is_grad_enabled() and next(micro_batches) // 4 in bad_steps
        return loss * value if bad else loss

    monkeypatch.setattr(lumi.model.transformer.Transformer, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_named(start, monkeypatch, capsys, store_dir, value):
    spoil(monkeypatch, {5}, value)
    folder = start()
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records if record["skipped"]] == [5]
    assert records[4]["loss"] is None
    assert all(record["loss"] < 7 for record in records[5:])
    printed = capsys.readouterr().out
    assert f"step 5 skipped: loss {value}" in printed
    assert printed.count(f"step 5: loss {value} in a micro-batch of {store_dir} documents [") == 4


def test_many_of_them_stop_the_run_with_a_checkpoint(start, monkeypatch, tmp_path):
    spoil(monkeypatch, range(6, 99), float("nan"))
    with pytest.raises(
        UserError, match=r"not finite in 3 steps running, up to step 8; to inspect: .*step-00000008"
    ):
        start(max_skipped_steps=3)
    tensors = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000008").tensors("model")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_switches_reach_the_run(start, monkeypatch):
    seen = {}
    real = Trainer.run_to_the_end

    def spy(self):
        seen.update(
            compute_dtype=self.model.compute_dtype,
            checkpointing=self.model.gradient_checkpointing,
            ops=self.run.ops.name,
        )
        return real(self)

    monkeypatch.setattr(Trainer, "run_to_the_end", spy)
    plain = losses(start("plain"))
    assert seen == {"compute_dtype": torch.float32, "checkpointing": False, "ops": "reference"}
    assert losses(start("recomputing", gradient_checkpointing=True)) == plain
    assert seen["checkpointing"]
    for dtype in ("bfloat16", "float16"):
        narrow = losses(start(dtype, dtype=dtype))
        assert seen["compute_dtype"] == getattr(torch, dtype)
        assert narrow != plain
        assert narrow == pytest.approx(plain, rel=0.02)
    small = {
        "num_steps": 2,
        "validation_tokens": 32,
        "model": {"num_layers": 1},
        "batches": {"batch_tokens": 64, "micro_batch_size": 1},
    }
    reference = losses(start("reference", **small))
    assert losses(start("triton", kernels="triton", **small)) == pytest.approx(reference, rel=1e-5)
    assert seen["ops"] == "triton"


def test_compile_changes_rounding_only(start):
    short = {"num_steps": 2, "model": {"num_layers": 1}}
    plain = losses(start("plain", **short))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(start("compiled", compile=True, **short)) == pytest.approx(plain, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


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


def test_a_corpus_folder_is_tokenized_once(start, corpus_dir, capfd):
    start("first", data_dirs=(corpus_dir,), num_steps=2)
    assert "tokenizing" in capfd.readouterr().err
    start("second", data_dirs=(corpus_dir,), num_steps=2)
    assert "tokenizing" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"vocab_size": 300}},
            "model.vocab_size must be at least the tokenizer's 384 pieces, got 300",
        ),
        ({"kernels": "tritn"}, 'kernels must be one of "auto", "reference", "triton", got "tritn"'),
        ({"seed": -1}, "seed must be between 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (
            {"batches": {"sequence_length": 256, "batch_tokens": 512}},
            "sequence_length must be at most model.max_positions = 128, got 256",
        ),
        ({"weights": [1.0, 2.0]}, "one weight per data folder, got 2 for 1"),
    ],
    ids=str,
)
def test_refuses(start, changes, message):
    with pytest.raises(UserError, match=message):
        start(**changes)


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(start, tmp_path):
    folder = start()
    before = final_weights(folder)
    with pytest.raises(
        UserError,
        match=r"--output-dir must be new, got .*run, which holds a run; go on with it by --resume-from-checkpoint auto",
    ):
        start()
    with pytest.raises(UserError, match=r"cannot go on from here: seed was 0, is 5 now"):
        start(resume="auto", seed=5)
    with pytest.raises(UserError, match=r"cannot go on from here: batch_tokens was 256, is 512 now"):
        start(resume="auto", batches={"batch_tokens": 512})
    with pytest.raises(UserError, match=r"num_steps must be at least the checkpoint's step 12, got 5"):
        start(resume="auto", num_steps=5)
    with pytest.raises(UserError, match=r"--output-dir must be new, got .*other, which holds a run"):
        start("other", resume=str(start("other") / ".." / "run" / "checkpoints" / "step-00000012"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output-dir must be a folder, got a file: .*file"):
        start("file")
    assert final_weights(folder) == before
    with pytest.raises(UserError, match=r"nowhere: must be a checkpoint folder"):
        start("new", resume=str(tmp_path / "nowhere"))


def test_a_corrupt_checkpoint_that_was_asked_for_is_an_error(start):
    folder = start()
    newest = list_checkpoints(folder / "checkpoints")[-1]
    data = bytearray((newest / "model-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model-00000.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=rf"{newest.name}/model-00000\.safetensors: SHA-256 must be"):
        start(resume=str(newest))
    assert len(losses(folder)) == 12  # nothing was thrown away


def test_from_an_older_checkpoint_the_newer_ones_make_way(start, capsys):
    folder = start(keep_last=1, save_every=3)
    straight, weights = losses(folder), final_weights(folder)
    folder = start("again", keep_last=9, save_every=3)
    older = folder / "checkpoints" / "step-00000003"
    start("again", resume=str(older), keep_last=1, save_every=3)
    printed = capsys.readouterr().out
    assert "set aside step-00000012: this run goes on from before it" in printed
    assert "changed since the checkpoint: keep_last was 9, is 1 now" in printed
    assert losses(folder) == straight
    assert final_weights(folder) == weights
    assert "step-00000012" in [path.name for path in list_checkpoints(folder / "checkpoints")]


def test_another_runs_checkpoint_starts_a_new_run(start):
    folder = start()
    other = start("other", resume=str(folder / "checkpoints" / "step-00000008"))
    assert losses(other) == losses(folder)[8:]
    assert final_weights(other) == final_weights(folder)
    at_its_end = start(
        "at its end", resume=str(folder / "checkpoints" / "step-00000012")
    )  # nothing is left to do but final/
    assert final_weights(at_its_end) == final_weights(folder)


def test_a_stop_right_after_a_save_does_not_save_again(start, monkeypatch):
    """Replacing a whole checkpoint by the same one would open a moment in which a kill finds none."""
    real, saves = lumi.checkpoint.saver.Saver.begin, []

    def begin(self, step, *arguments):
        saves.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(self, step, *arguments)

    monkeypatch.setattr(lumi.checkpoint.saver.Saver, "begin", begin)
    start(expect=128 + signal.SIGTERM)
    assert saves == [4]


def test_a_validation_loss_that_is_not_finite_ends_nothing(start, monkeypatch):
    real = lumi.training.validation.held_out_loss
    monkeypatch.setattr(
        lumi.training.validation,
        "held_out_loss",
        lambda *arguments: dataclasses.replace(real(*arguments), loss=math.nan),
    )
    folder = start()
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"]
    assert [record["loss"] for record in records] == [None] * 3
    assert open_checkpoint(folder / "checkpoints" / "step-00000012").state["best"] is None


def test_what_a_step_draws_depends_on_seed_and_step_alone(start, monkeypatch):
    real = lumi.model.transformer.Transformer.forward
    monkeypatch.setattr(
        lumi.model.transformer.Transformer,
        "forward",
        lambda self, *arguments: real(self, *arguments) * (1 + 0.1 * torch.rand(())),
    )
    straight = losses(start())
    folder = start("resumed", keep_last=9)
    torch.rand(7)
    start("resumed", resume=str(folder / "checkpoints" / "step-00000004"))
    assert losses(folder) == straight
    assert losses(start("other", seed=1)) != straight


def test_float16_resumes_with_its_loss_scale(start, monkeypatch):
    monkeypatch.setattr(lumi.training.trainer, "LossScale", lambda dtype: LossScale(dtype, patience=3))
    folder = start(dtype="float16", keep_last=9)
    last = folder / "checkpoints" / "step-00000012"
    straight = open_checkpoint(last).state["loss_scale"]
    assert straight["value"] > 2.0**15
    weights = final_weights(folder)
    start(dtype="float16", keep_last=9, resume=str(folder / "checkpoints" / "step-00000008"))
    assert open_checkpoint(last).state["loss_scale"] == straight
    assert final_weights(folder) == weights


def two_processes(command, tmp_path):
    """Ranks 0 and 1 without torchrun, so that each can be signalled and its exit code read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command,
            env={**group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def test_an_error_of_the_main_process_is_said_once(command, start, tmp_path):
    start("used")
    processes = two_processes(command("used"), tmp_path)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "error: --output-dir must be new" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    assert "error:" not in errors[1]


def test_auto_with_nothing_to_resume_says_so(start, capsys):
    start(resume="auto")
    assert "starting at step 0" in capsys.readouterr().out


def test_litter_of_an_interrupted_save_is_swept(start, tmp_path, capsys):
    litter = tmp_path / "run" / "checkpoints" / ".tmp-step-00000003-1"
    litter.mkdir(parents=True)
    start()
    assert not litter.exists()
    assert "removed" in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_code_2(command, tmp_path):
    done = launch(command("bad", "optimizer.peek_lr=1"), expect=2)
    assert (
        done.stderr.strip()
        == f"error: {tmp_path / 'bad.json'}: optimizer.peek_lr unknown key (value 1); did you mean 'peak_lr'?"
    )
    done = launch([*command("worse"), "--no-such-option"], expect=2)
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr
