"""The jobs for Slurm, with Slurm's part played here; `test_prepare.py` runs tasks on this machine."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from task_runs import files_of, pairs_config

from lumi.config import UserError
from lumi.corpus import prepare
from lumi.corpus.scale import stages
from lumi.corpus.scale.prepare import Executor, prepare_in_tasks
from lumi.data.tokenization import tokenize
from lumi.data.tokenize_tasks import tokenize_in_tasks
from lumi.tokenizer.loading import load_tokenizer

pytest.importorskip("datatrove")

# sbatch keeps the script and its arguments; srun runs what it is given; scontrol knows one node.
SBATCH = """#!/bin/bash
number=$(($(ls "$PLAY" | grep -c 'script$') + 1))
echo "$@" >"$PLAY/$number.arguments"
cp "${!#}" "$PLAY/$number.script"
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = "#!/bin/bash\necho localhost\n"
OPTIONS = "--partition=cpu --time=8:00:00 --mem-per-cpu=4G --exclusive"


@pytest.fixture
def play(tmp_path, monkeypatch):
    """The folder of what was submitted; the stand-ins come first on PATH."""
    folder, commands = tmp_path / "play", tmp_path / "commands"
    folder.mkdir()
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), os.environ["PATH"]]))
    monkeypatch.setenv("PLAY", str(folder))
    return folder


def start_job(play, number):
    """Start all tasks of a job as Slurm would; their exit codes."""
    script = play / f"{number}.script"
    last = int(re.search(r"^#SBATCH --array=0-(\d+)", script.read_text(), re.MULTILINE)[1])
    tasks = []
    for rank in range(last + 1):
        job = {"SLURM_ARRAY_TASK_ID": str(rank), "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": str(number)}
        with open(play / f"{number}.{rank}.log", "w") as log:
            command, environment = ["bash", str(script)], {**os.environ, **job, "RUN_OFFSET": "0"}
            tasks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return [task.wait() for task in tasks]


def test_jobs_of_slurm_make_the_files_of_one_process(play, tmp_path, capsys):
    config = pairs_config(tmp_path)
    prepare(config, tmp_path / "one", num_workers=1)
    capsys.readouterr()
    executor = Executor(kind="slurm", num_tasks=2, num_workers=7, sbatch=OPTIONS)
    assert prepare_in_tasks(config, tmp_path / "tasks", executor) is None
    assert f"Slurm has jobs 1, 2, 3, 4, 5; the last makes {tmp_path}/tasks; logs: " in capsys.readouterr().out
    arrays = []
    for number, stage in enumerate(stages.STAGES, start=1):
        script, arguments = (
            (play / f"{number}.script").read_text(),
            (play / f"{number}.arguments").read_text(),
        )
        assert {f"#SBATCH {option}" for option in OPTIONS.split()} <= set(script.splitlines())
        assert f"#SBATCH --job-name=lumi-{stage}\n" in script
        assert "qos" not in script
        assert ("--dependency" in arguments) == (number > 1)
        assert number == 1 or f"--dependency=afterok:{number - 1} " in arguments
        arrays += re.findall(r"^#SBATCH --array=(.*)$", script, re.MULTILINE)
    assert arrays == ["0-1%7", "0-0%7", "0-0%7", "0-1%7", "0-0%7"]
    assert len(list(play.glob("*.script"))) == 5  # none that adds up statistics
    for number in range(1, 6):
        assert set(start_job(play, number)) == {0}, (play / f"{number}.0.log").read_text()
    assert files_of(tmp_path / "tasks") == files_of(tmp_path / "one")
    logs = tmp_path / "tasks" / ".cache" / "logs"
    assert "Processing done" in (logs / "publish" / "logs" / "task_00000.log").read_text()
    assert prepare_in_tasks(config, tmp_path / "tasks", executor, use_cache=True)["documents"] > 10


def test_a_job_whose_task_fails_ends_with_an_error(play, tmp_path):
    config = pairs_config(tmp_path)
    executor = Executor(kind="slurm", num_tasks=1, sbatch=OPTIONS)
    prepare_in_tasks(config, tmp_path / "tasks", executor)
    Path(config.sources[0].paths[0].replace("*", "[1]")).unlink()
    assert start_job(play, 1) != [0]
    assert "paths must match at least one file" in (play / "1.0.log").read_text()


def test_jobs_of_slurm_tokenize_as_one_process(play, corpus_dir, tokenizer_dir, tmp_path, capsys):
    tokenize([corpus_dir], load_tokenizer(tokenizer_dir), tmp_path / "one", num_workers=1)
    executor = Executor(kind="slurm", num_tasks=2, sbatch=OPTIONS)
    assert tokenize_in_tasks([corpus_dir], tokenizer_dir, tmp_path / "tasks", executor) is None
    assert f"Slurm has jobs 1, 2; the last makes {tmp_path}/tasks; logs: " in capsys.readouterr().out
    for number in (1, 2):
        assert set(start_job(play, number)) == {0}, (play / f"{number}.0.log").read_text()
    assert files_of(tmp_path / "tasks") == files_of(tmp_path / "one")


def test_sbatch_that_is_missing_or_refuses_is_an_error(play, tmp_path, monkeypatch):
    config = pairs_config(tmp_path)
    executor = Executor(kind="slurm", num_tasks=1, sbatch=OPTIONS)
    (tmp_path / "commands" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(
        UserError, match=r"--executor slurm must run where sbatch takes jobs, got .*exit status 1"
    ):
        prepare_in_tasks(config, tmp_path / "tasks", executor)
    shutil.rmtree(tmp_path / "commands")
    with pytest.raises(
        UserError, match=r"where sbatch takes jobs, got .*No such file or directory: 'sbatch'"
    ):
        prepare_in_tasks(config, tmp_path / "tasks", executor)
