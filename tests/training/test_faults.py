"""What may happen to a run, done to it: after each fault it goes on by itself, and ends as the one that
nothing happened to, bit for bit.

Processes are killed, signalled, held up and starved in earnest; `fault_processes.py` starts them.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_processes import Forks
from runs import ENVIRONMENT, final_weights, losses, merged, wait_for_step
from synthetic import document

import lumi.train
from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint, step_of
from lumi.config import write_json
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.data.tokenization import tokenize
from lumi.parallel.watchdog import EXIT_HUNG
from lumi.training.metrics import read_metrics
from lumi.training.run_status import read_status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and finds processes in /proc")
CHANGES = {"batches": {"batch_tokens": 384, "micro_batch_size": 4}, "validate_every": 5}  # 3 micro-steps
TERMINATED = 128 + signal.SIGTERM


def more(*values):
    """Cases that prove the same once more: for the soak."""
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 documents: some 6 steps see all of those that are trained on."""
    folder = tmp_path_factory.mktemp("forty") / "corpus"
    with CorpusWriter(folder, 1 << 20) as writer:
        for text in map(document, range(40)):
            writer.add(text, "synthetic", len(text.encode()))
        writer.commit({"documents": 40, "sources": []}, {"DATA_CARD.md": "a card"})
    return folder


class Runs:
    """The runs of one test, by name, in its folder."""

    def __init__(self, forks, store, tokenizer_dir, folder):
        self.forks, self.store, self.tokenizer_dir, self.folder = forks, store, tokenizer_dir, folder

    def arguments(self, name, data=None, output=None, **changes):
        config = self.folder / f"{name}.json"
        write_json(config, merged(changes, merged(CHANGES)))
        paths = [
            "--data-dirs",
            data or self.store,
            "--tokenizer-dir",
            self.tokenizer_dir,
            "--output-dir",
            output or self.folder / name,
        ]
        return ["--config", config, *paths, "--resume-from-checkpoint", "auto", "--device", "cpu"]

    def begin(self, name, processes=None, faults=(), **changes):
        if processes:
            changes = merged({"batches": {"micro_batch_size": 4 // processes}}, changes)
        return self.forks.start(self.arguments(name, **changes), self.folder / "logs", processes, faults)

    def end(self, name, processes=None, faults=(), expect=0, **changes):
        """Let a run come to its end, with this exit code of every process; returns what they print."""
        started = self.begin(name, processes, faults, **changes)
        codes, logs = [process.wait() for process in started], [process.log for process in started]
        assert codes == [expect] * len(started), "\n".join(logs)[-4000:]
        return logs

    def status(self, name):
        return {
            key: value
            for key, value in read_status(self.folder / name).items()
            if key not in ("time", "host")
        }


@pytest.fixture(scope="module")
def validated(corpus, tokenizer, tmp_path_factory):
    """A token store of which half is held out: 25 batches or so."""
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize([corpus], tokenizer, folder, validation_fraction=0.5, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def store(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "tokens"
    tokenize([corpus], tokenizer, folder, validation_fraction=0.0, num_workers=1)
    return folder


@pytest.fixture
def runs(forks, store, tokenizer_dir, tmp_path):
    return Runs(forks, store, tokenizer_dir, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(forks, store, tokenizer_dir, tmp_path_factory):
    """The folder of a run, with these settings, that nothing happens to."""
    folders, runs = {}, Runs(forks, store, tokenizer_dir, tmp_path_factory.mktemp("uninterrupted"))

    def uninterrupted(processes=None, **changes):
        key = json.dumps([processes, changes], default=str)
        if key not in folders:
            runs.end(str(len(folders)), processes, **changes)
            folders[key] = runs.folder / str(len(folders))
        return folders[key]

    return uninterrupted


def validations(folder):
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"]
    assert len({record["step"] for record in records}) == len(records)
    return [(record["step"], record["loss"], record["bits_per_byte"]) for record in records]


def assert_same(folder, expected):
    """Every loss, every validation and every byte of the weights; nothing else lies about."""
    assert losses(folder) == losses(expected)
    assert validations(folder) == validations(expected)
    assert final_weights(folder) == final_weights(expected)
    assert names(folder) == names(expected)
    assert read_status(folder)["status"] == "finished"


def names(folder):
    """All files, but those of the checkpoints, which a signal may have left at other steps."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in found if not re.match(r"checkpoints/step-\d{8}", name)]


def error_lines(*logs):
    return [line for log in logs for line in log.splitlines() if line.startswith("error: ")]


# kill -9


@pytest.mark.parametrize(("kills", "num_steps", "least_in_a_save"), [(10, 40, 1), more(50, 150, 5)])
def test_killed_at_many_moments_of_one_run(kills, num_steps, least_in_a_save, runs, uninterrupted):
    """Half of the moments are drawn in time, a quarter among what a run does to files from its start, a
    quarter among what its first save does to them. All hit the same run.
    """
    changes = {"num_steps": num_steps, "save_every": 1}
    folder, rng = runs.folder / "run", random.Random(0)
    checkpoints, litter, kills_in_a_save = folder / "checkpoints", set(), 0
    for moment in range(kills):
        before = losses(folder) if (folder / "metrics.jsonl").exists() else []
        if moment % 2:
            if moment % 4 == 3:
                where = (rng.randrange(1, 18), "lumi.checkpoint.saver:Saver._write")
            else:
                where = (5 * (moment // 2) + rng.randrange(5) if moment > 1 else 0,)
            (process,) = runs.begin("run", faults=[(0, "kill_at_file_operation", *where)], **changes)
        else:
            (process,) = runs.begin("run", **changes)
            if moment % 10:
                wait_for_step(folder / "metrics.jsonl", len(before) + 1, process)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        assert process.wait() == -signal.SIGKILL, process.log[-1000:]
        for path in list_checkpoints(checkpoints):
            open_checkpoint(path).verify()
        newest = max(map(step_of, list_checkpoints(checkpoints)), default=0)
        left = {path.name for path in checkpoints.glob(".tmp-*")}
        done = len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0
        assert done - newest <= 2  # one that is being saved, one on which its save is waited for
        assert done >= len(before) - 2
        if "train:" in process.log:  # it came to its first step: what the one before it had left is gone
            assert not left & litter
        litter = left
        kills_in_a_save += any(not name.endswith("-discarded") for name in left)
    assert kills_in_a_save >= least_in_a_save
    assert newest < num_steps
    runs.end("run", **changes)
    assert_same(folder, uninterrupted(**changes))


@pytest.mark.parametrize("operation", [more(1), 8, more(17), 26])
def test_killed_while_final_is_written(operation, runs, uninterrupted):
    faults = [(0, "kill_at_file_operation", operation, "lumi.training.run_checkpoints:save_final")]
    runs.end("run", faults=faults, expect=-signal.SIGKILL)
    assert "resumed from" in runs.end("run")[0]
    assert_same(runs.folder / "run", uninterrupted())


def test_killed_in_the_middle_of_accumulation_loses_that_step(runs, uninterrupted):
    changes = {"save_every": 1, "num_steps": 6}
    runs.end(
        "run", faults=[(0, "at_step", 5, "micro-step 2 of 3", "kill")], expect=-signal.SIGKILL, **changes
    )
    assert len(losses(runs.folder / "run")) == 4
    assert re.search(r"resumed from .* at step [34]\b", runs.end("run", **changes)[0])
    assert_same(runs.folder / "run", uninterrupted(**changes))


@pytest.mark.parametrize(("rank", "operation"), [(0, 7), more(0, 18), more(1, 0), (1, 3)])
def test_one_of_two_is_killed_in_a_save(rank, operation, runs, uninterrupted):
    """The other one ends too, and does not wait for it for ever."""
    faults = [(rank, "kill_at_file_operation", operation, "lumi.checkpoint.saver:Saver._write")]
    killed = runs.begin("run", 2, faults=faults)
    codes = [process.wait() for process in killed]
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, -signal.SIGALRM), killed[1 - rank].log
    runs.end("run", 2)
    assert_same(runs.folder / "run", uninterrupted(2))


def workers(torchrun):
    """Process ids by rank."""
    found = {}
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {
            int(variable.removeprefix("RANK=")): int(pid)
            for variable in variables
            if variable.startswith("RANK=")
        }
    return found


def start_torchrun(runs, log, *options, **changes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        lumi.train.__file__,
    ]
    arguments = runs.arguments("run", **merged({"batches": {"micro_batch_size": 2}}, changes))
    with open(log, "a") as output:
        return subprocess.Popen(
            [*command, *map(str, arguments)], env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )


def end_torchrun(torchrun, log):
    try:
        return torchrun.wait(timeout=120)
    finally:
        if torchrun.poll() is None:
            for pid in [*workers(torchrun.pid).values(), torchrun.pid]:
                os.kill(pid, signal.SIGKILL)
            print(log.read_text()[-3000:])


@pytest.mark.soak  # torchrun itself; the tests above kill ranks and start them again
def test_torchrun_starts_again_after_a_rank_was_killed(runs, uninterrupted):
    changes, log = {"num_steps": 40}, runs.folder / "log"
    torchrun = start_torchrun(runs, log, "--max-restarts=1", **changes)
    wait_for_step(
        runs.folder / "run" / "metrics.jsonl", 9, torchrun
    )  # the second save waits for the first one
    os.kill(workers(torchrun.pid)[0], signal.SIGKILL)
    assert end_torchrun(torchrun, log) == 0
    assert "resumed from" in log.read_text()
    assert_same(runs.folder / "run", uninterrupted(2, **changes))


# A rank that hangs


def test_a_rank_that_hangs_is_named_and_all_end(runs, uninterrupted):
    limited = {"step_timeout_seconds": 4.0}
    hung = runs.begin(
        "run",
        2,
        faults=[(1, "before", "lumi.data.batches:Batches.rows", 5 * 3 - 1, "sleep", 1000)],
        **limited,
    )
    assert [process.wait() for process in hung] == [EXIT_HUNG] * 2
    (line,) = error_lines(*(process.log for process in hung))
    assert re.search(
        rf"error: step 5: rank 1 \(host .*, pid {hung[1].pid}\) has not gone on for .* "
        r"at step 5, waiting for data, in ",
        line,
    )
    assert "Traceback" not in hung[0].log + hung[1].log
    status = runs.status("run")
    assert status["status"] == "failed"
    assert status["message"] in line
    runs.end("run", 2, **limited)
    assert_same(runs.folder / "run", uninterrupted(2))


def test_a_slow_save_is_no_hang(runs, uninterrupted):
    """Six seconds in all, with a limit of three; but something is written every two."""
    slow = [(0, "before", "lumi.checkpoint.saver:save_tensors", call, "sleep", 2) for call in (3, 4)]
    slow.append((0, "before", "lumi.checkpoint.saver:seal_checkpoint", 2, "sleep", 2))
    logs = runs.end("run", 2, faults=slow, step_timeout_seconds=3.0)
    assert not error_lines(*logs)
    assert_same(runs.folder / "run", uninterrupted(2))


def test_a_save_that_hangs_is_named(runs):
    hung = runs.begin(
        "run",
        2,
        faults=[(0, "before", "lumi.checkpoint.saver:save_tensors", 1, "sleep", 1000)],
        step_timeout_seconds=3.0,
    )
    assert [process.wait() for process in hung] == [EXIT_HUNG] * 2
    (line,) = error_lines(*(process.log for process in hung))
    assert re.search(rf"rank 0 \(host .*, pid {hung[0].pid}\) has written nothing for ", line)


# SIGTERM


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (["at_step", 6, "micro-step 2"], 6),
        (["at_step", 6, "optimizer"], 6),
        (["before", "lumi.checkpoint.saver:Saver._write", 2], None),  # behind the loop's back
        (["before", "lumi.checkpoint.saver:seal_checkpoint", 1], None),
        (["before", "lumi.training.trainer:Trainer.save", 3], 12),
        (["before", "lumi.training.run_checkpoints:save_final", 1], 12),
        (["before", "lumi.formats.hf_format:_save_weights", 1], 12),
        (["before", "lumi.training.trainer:Optimizer", 1], 0),
    ],
    ids=str,
)
def test_sigterm(place, step, runs, uninterrupted):
    log = runs.end("run", faults=[(0, *place, "terminate")], expect=TERMINATED)[0]
    status = runs.status("run")
    assert status["status"] == "preempted"
    assert status["signal"] == "SIGTERM"
    assert status["step"] == step or step is None
    assert status["step"] == max(
        map(step_of, list_checkpoints(runs.folder / "run" / "checkpoints")), default=0
    )  # nothing is lost
    assert re.search(r"stopped by SIGTERM after step \d+; go on with --resume-from-checkpoint auto", log)
    assert not list((runs.folder / "run").rglob(".tmp-*"))
    runs.end("run")
    assert_same(runs.folder / "run", uninterrupted())


def test_sigterm_in_a_long_evaluation_cuts_it_short(runs, uninterrupted, validated):
    changes = {"data": validated, "validate_every": 6, "save_every": 12, "batches": {"micro_batch_size": 1}}
    runs.end("run", faults=[(0, "at_step", 6, "validation", "terminate")], expect=TERMINATED, **changes)
    assert runs.status("run") == {"status": "preempted", "step": 6, "signal": "SIGTERM"}
    assert validations(runs.folder / "run") == []
    runs.end("run", **changes)
    assert_same(runs.folder / "run", uninterrupted(**changes))


def test_sigterm_in_the_rehearsal(runs, uninterrupted):
    runs.end(
        "run",
        faults=[(0, "before", "lumi.training.trainer:rehearse", 1, "terminate")],
        expect=TERMINATED,
        preflight=True,
    )
    assert runs.status("run") == {"status": "preempted", "step": 0, "signal": "SIGTERM"}
    runs.end("run", preflight=True)
    assert_same(runs.folder / "run", uninterrupted())


@pytest.mark.parametrize(("processes", "rank"), [(None, 0), (2, 0), (2, 1)])
def test_sigterm_while_a_corpus_is_tokenized(processes, rank, runs, uninterrupted, corpus_dir, tmp_path):
    """The first process stops at once; where another one is told, they stop together before the first
    step."""
    own = tmp_path / "corpus"
    shutil.copytree(corpus_dir, own, ignore=shutil.ignore_patterns(".tokens"))
    place = "lumi.data.store_writer:StoreWriter.append", 1
    if rank == 1:
        place = "lumi.parallel.world:World._any", 8  # it waits for the first process
    runs.end("run", processes, faults=[(rank, "before", *place, "terminate")], expect=TERMINATED, data=own)
    assert runs.status("run") == {"status": "preempted", "step": 0, "signal": "SIGTERM"}
    assert bool(list(own.rglob("train.tokens"))) == (rank == 1)
    assert not list(own.rglob(".tmp-*"))
    runs.end("run", processes, data=own)
    assert_same(runs.folder / "run", uninterrupted(processes, data=own))


@pytest.mark.parametrize(
    "place",
    [
        ["at_step", 6, "micro-step 2"],
        ["at_step", 4, "validation"],
        ["before", "lumi.checkpoint.saver:Saver._write", 1],
    ],
    ids=str,
)
def test_sigterm_to_one_of_two(place, runs, uninterrupted, validated):
    changes = {"data": validated, "validation_tokens": 512}
    runs.end("run", 2, faults=[(1, *place, "terminate")], expect=TERMINATED, **changes)
    status = runs.status("run")
    assert status["status"] == "preempted"
    assert status["step"] == max(map(step_of, list_checkpoints(runs.folder / "run" / "checkpoints")))
    runs.end("run", 2, **changes)
    assert_same(runs.folder / "run", uninterrupted(2, **changes))


@pytest.mark.soak  # torchrun hands the signal on; the tests above send it to each process
def test_sigterm_to_torchrun(runs, uninterrupted):
    changes, log = {"num_steps": 60, "save_every": 30}, runs.folder / "log"
    torchrun = start_torchrun(runs, log, **changes)
    wait_for_step(runs.folder / "run" / "metrics.jsonl", 6, torchrun)
    torchrun.terminate()
    assert end_torchrun(torchrun, log) == 1  # though every process saved and left as it should
    status = runs.status("run")
    assert status == {"status": "preempted", "step": len(losses(runs.folder / "run")), "signal": "SIGTERM"}
    runs.end("run", 2, **changes)
    assert_same(runs.folder / "run", uninterrupted(2, **changes))


# Losses and gradients that are not finite, and spikes


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_on_one_rank_is_skipped_by_both(where, runs, uninterrupted):
    prints = [runs.folder / f"weights of rank {rank}" for rank in range(2)]
    fingerprints = [(rank, "leave_fingerprint", str(path)) for rank, path in enumerate(prints)]
    logs = runs.end("run", 2, faults=[(1, "spoil", [5, 6], "nan", where), *fingerprints])
    assert prints[0].read_text() == prints[1].read_text()
    records = [
        record for record in read_metrics(runs.folder / "run" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert [record["step"] for record in records if record["skipped"]] == [5, 6]
    assert [record.get("skipped_steps") for record in records] == [None] * 4 + [1] + [2] * 7
    assert logs[0].count("step 5 skipped: ") == 1
    named = re.compile(rf"step 5: loss \S+ in a micro-batch of {runs.store} documents \[\d+")
    assert len(named.findall(logs[1])) == 3
    assert len(named.findall(logs[0])) == (
        0 if where == "loss" else 3
    )  # of gradients nobody knows whose they were
    runs.end("truth", 2, faults=[(rank, "leave_out_updates", [5, 6]) for rank in range(2)])
    assert final_weights(runs.folder / "run") == final_weights(runs.folder / "truth")
    assert final_weights(runs.folder / "run") != final_weights(uninterrupted(2))


def test_many_of_them_stop_both_with_a_checkpoint(runs, uninterrupted):
    faults = [(1, "spoil", [5, 6, 7], "nan", "loss")]
    logs = runs.end("run", 2, faults=faults, expect=2, max_skipped_steps=3)
    newest = runs.folder / "run" / "checkpoints" / "step-00000007"
    (line,) = error_lines(*logs)
    assert "not finite in 3 steps running, up to step 7; to inspect: " + str(newest) in line
    assert runs.status("run") == {"status": "failed", "step": 7, "message": line.removeprefix("error: ")}
    checkpoint = open_checkpoint(newest)
    checkpoint.verify()
    assert checkpoint.state["skipped_steps"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors("model").values())
    shutil.rmtree(newest)
    runs.end("run", 2, max_skipped_steps=3)  # from before the fault, which is mended now
    assert_same(runs.folder / "run", uninterrupted(2))


@pytest.mark.parametrize("sigmas", [4.0, None])
def test_a_spike_is_skipped_where_asked(sigmas, runs):
    faults = [(0, "short_spike_window", 6), (0, "spoil", [9], 3.0, "loss")]
    (log,) = runs.end("run", faults=faults, max_loss_sigmas=sigmas)
    assert (", a spike" in log) == (sigmas is not None)
    runs.end("truth", faults=[(0, "leave_out_updates", [9])])
    assert losses(runs.folder / "run")[:8] == losses(runs.folder / "truth")[:8]
    assert (losses(runs.folder / "run")[9:] == losses(runs.folder / "truth")[9:]) == (sigmas is not None)
    for step in (7, 9):  # what the losses before it say of the next one goes with the checkpoint
        name = f"stopped in {step}"
        stopped = [*faults, (0, "at_step", step, "optimizer", "terminate")]
        runs.end(name, faults=stopped, expect=TERMINATED, max_loss_sigmas=sigmas)
        runs.end(name, faults=faults, max_loss_sigmas=sigmas)
        assert_same(runs.folder / name, runs.folder / "run")
        states = [
            open_checkpoint(runs.folder / run / "checkpoints" / "step-00000012").state
            for run in (name, "run")
        ]
        assert states[0] == states[1]


# Disks


def test_one_flipped_byte_sends_both_to_the_same_older_checkpoint(runs, uninterrupted):
    runs.end("run", 2, faults=[(0, "at_step", 10, "optimizer", "terminate")], expect=TERMINATED)
    checkpoints = runs.folder / "run" / "checkpoints"
    file = checkpoints / "step-00000010" / "model-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    file.write_bytes(data)
    logs = runs.end("run", 2)
    assert "".join(logs).count(f"{file}: SHA-256 must be ") == 1
    assert f"resumed from {checkpoints / 'step-00000008'} at step 8" in logs[0]
    assert_same(runs.folder / "run", uninterrupted(2))


@pytest.mark.parametrize("processes", [None, 2])
def test_files_that_cannot_grow_end_the_run_and_not_its_checkpoint(processes, runs, uninterrupted):
    faults = [
        (rank, "before", "lumi.checkpoint.saver:Saver._write", 2, "limit_files", 20_000)
        for rank in range(processes or 1)
    ]
    logs = runs.end("run", processes, faults=faults, expect=2)
    (line,) = error_lines(*logs)
    assert re.search(
        r"step-00000008: cannot be written: (rank \d: )?File too large; earlier checkpoints are intact", line
    )
    assert "Traceback" not in "".join(logs)
    assert runs.status("run")["status"] == "failed"
    assert runs.status("run")["message"] in line
    (left,) = (runs.folder / "run" / "checkpoints").iterdir()
    open_checkpoint(left).verify()
    runs.end("run", processes)
    assert_same(runs.folder / "run", uninterrupted(processes))


@pytest.fixture
def small_disk(disk_of):
    """A disk of 3 MB."""
    return disk_of("3m")


@pytest.mark.parametrize(
    ("processes", "room"), [(None, 0), more(2, 0), more(None, 200_000), more(2, 200_000)]
)
def test_a_full_disk_ends_the_run_and_not_its_checkpoint(room, processes, small_disk, runs, uninterrupted):
    """Not even the log can be written; or all but the next checkpoint."""
    folder, filler = small_disk / "run", small_disk / "of somebody else"
    changes = {
        "num_steps": 80,
        "save_every": 40,
    }  # between two saves the log needs more than the rest of its last page
    faults = [
        (0, "before", "lumi.training.run_folder:RunFolder.prune", 1, "fill_disk", str(filler), room)
    ]  # when the first one is whole
    logs = runs.end("run", processes, faults=faults, expect=2, output=folder, **changes)
    (line,) = error_lines(*logs)
    what = "checkpoints/step-00000080" if room else "metrics.jsonl"
    assert re.match(
        rf"error: {folder}/{what}: cannot be written: (rank \d: )?No space left on device; ", line
    )
    assert "Traceback" not in "".join(logs)
    (left,) = (folder / "checkpoints").iterdir()
    assert left.name == "step-00000040"
    open_checkpoint(left).verify()
    assert read_status(folder)["status"] == ("failed" if room else "running")  # there is no room to say so
    filler.unlink()
    runs.end("run", processes, output=folder, **changes)
    assert_same(folder, uninterrupted(processes, **changes))


def test_a_data_file_that_shrinks_ends_both(runs, store, tmp_path):
    own = tmp_path / "tokens"
    shutil.copytree(store, own)
    file = own / "train.tokens"
    size = file.stat().st_size
    logs = runs.end(
        "run",
        2,
        faults=[(1, "at_step", 5, "optimizer", "truncate", str(file), 2000)],
        expect=2,
        data=own,
        num_steps=4000,
        save_every=4000,
    )
    (line,) = error_lines(*logs)
    assert f"{file}: must be {size} bytes, got 2000: the file was truncated while it was in use" in line
    assert "Traceback" not in "".join(logs)
    assert runs.status("run")["status"] == "failed"
    assert runs.status("run")["message"] in line


# N = k + rest


@pytest.mark.parametrize("kind", ["muon", more("adamw")])
def test_stopped_at_every_step(kind, runs, uninterrupted):
    """Across an epoch's end, a skipped step and a spike, a run stopped after any step is the one that was
    not."""
    changes = {
        "optimizer": {"kind": kind},
        "num_steps": 8,
        "batches": {"batch_tokens": 1536, "micro_batch_size": 16},
        "max_loss_sigmas": 4.0,
    }
    faults = [(0, "short_spike_window", 3), (0, "spoil", [3], "nan", "loss"), (0, "spoil", [6], 3.0, "loss")]
    runs.end("whole", faults=faults, **changes)
    whole = runs.folder / "whole"
    assert [record["step"] for record in read_metrics(whole / "metrics.jsonl") if record.get("skipped")] == [
        3,
        6,
    ]
    for step in range(1, 8):
        name = f"stopped after {step}"
        runs.end(
            name, faults=[*faults, (0, "at_step", step, "logging", "terminate")], expect=TERMINATED, **changes
        )
        assert runs.status(name)["step"] == step
        runs.end(name, faults=faults, **changes)
        assert_same(runs.folder / name, whole)
        ends = [open_checkpoint(run / "checkpoints" / "step-00000008") for run in (runs.folder / name, whole)]
        assert ends[0].state == ends[1].state
        assert ends[0].records == ends[1].records  # SHA-256 of the weights and of the optimizer's state
