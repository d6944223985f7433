"""The first quarter of an hour on a GPU: is it right, how fast is it, and does it train.

    python benchmarks/gpu_first.py [--stages build smoke ...] [--seconds 720] [--output-dir DIR]
                                   [--data DIR] [--rehearse]

Stages follow each other; the jobs of a stage are processes of their own, each with a limit, that free workers
take from one queue. What is timed has the GPU to itself. After each stage `gpu_first.json` and `gpu_first.md`
are written, with the last lines of what failed. A failure stops nothing but the build's own. No stage begins
without time for it, and none outlasts its share. What other stages left in the same folder earlier stays in
the report. Training needs the text of smoke and the CPU's losses of correctness, or `--data`.

The files go to $OUT, or to `results/gpu_first-<device>`; the whole output of each job is in `logs`. Where the
packages that prepare text are missing, `--data` brings it. `--rehearse` runs every stage here, on the CPU and
in Triton's interpreter, at tiny sizes.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # before the build, lumi may not be installed: its plain Python does for this

from results import RESULTS, slug  # noqa: E402
from run_all import GPU_SUBJECTS, end_with_me, run_one, table  # noqa: E402

from lumi import command_line  # noqa: E402
from lumi.config import UserError  # noqa: E402
from lumi.host.storage import check_output  # noqa: E402

OPERATORS = "attention linear_cross_entropy rms_norm add_rms_norm swiglu rope decode_attention".split()
OPERATORS += ["lora_linear", "adamw"]
# Into how many jobs an operator's cases are cut in each dtype: most of the time goes into compiling.
PARTS = {"attention": 5, "decode_attention": 4, "linear_cross_entropy": 3, "rms_norm": 2, "add_rms_norm": 2}
WORKERS = 14
NEAREST = 6  # candidates of each attention kernel
LEAST_SECONDS = 10  # with less left a stage is not begun
SLOWER = 5  # a stage in a rehearsal
MADE_IN = {"data": "smoke", "losses_cpu": "correctness"}  # folders that training needs, and `--data` brings
LAST_LINES = 8  # of the output of what failed
WIDEST = 400  # characters of each


@dataclass(frozen=True)
class Job:
    """A program: its name, and its words after "python"."""

    name: str
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Stage:
    """Jobs, how many of them run at the same time, and the seconds that all of them may take."""

    jobs: list[Job]
    workers: int
    seconds: int


@dataclass(frozen=True)
class Outcome:
    """What became of a job: None, or its problem and the last lines that it printed."""

    stage: str
    job: str
    seconds: float
    problem: str | None
    last_lines: list[str]


def script(name: str, *words: str) -> tuple[str, ...]:
    """The words that start a benchmark."""
    return (str(Path(__file__).with_name(f"{name}.py")), *words)


def stages(output_dir: Path, rehearse: bool) -> dict[str, Stage]:
    """All stages in their order. Their seconds add up to twelve minutes; a CPU gets more."""
    mode = ("--rehearse",) if rehearse else ()
    words = lambda job: (job, "--output-dir", str(output_dir), *mode)
    measured = lambda *jobs: [Job(job, script("gpu_first_figures", *words(job))) for job in jobs]
    trained = lambda *jobs: [Job(job, script("gpu_first_training", *words(job))) for job in jobs]
    data = [] if (output_dir / "data").exists() else trained("data")
    cpu = [] if (output_dir / "losses_cpu").exists() else trained("losses cpu")
    build = [Job("build", ("-c", "import torch, lumi._csrc")) if rehearse else _build()]
    workers = min(WORKERS, max((os.cpu_count() or 2) - 2, 1))
    all_stages = {
        "build": Stage(build, 1, 90),
        "smoke": Stage([*_smoke(rehearse), *data], workers, 75),
        "correctness": Stage([*_correctness(rehearse), *cpu], workers, 165),
        "training_step": Stage(measured("training_step", "profile"), 1, 75),
        "tiles": Stage(_tiles(output_dir, rehearse, "--only-check"), workers, 75),
        "tuning": Stage(_tiles(output_dir, rehearse), 1, 60),
        "training": Stage(trained("losses gpu", "train 128", "train 16", "training"), 1, 90),
        "figures": Stage(measured("optimizer", "linear_cross_entropy", "row_kernels"), 1, 90),
    }
    if not rehearse:
        return all_stages
    return {name: replace(stage, seconds=SLOWER * stage.seconds) for name, stage in all_stages.items()}


def chosen(names: Sequence[str], output_dir: Path, rehearse: bool) -> dict[str, Stage]:
    """The stages of these names in their order; without the text, correctness takes no losses.

    Raises:
        UserError: training would lack what other stages make.
    """
    lacking = {
        folder: stage
        for folder, stage in MADE_IN.items()
        if stage not in names and not (output_dir / folder).exists()
    }
    if "training" in names and lacking:
        remedy = "add these stages, or bring it by --data"
        expectation = f"must have {' and '.join(lacking.values())} too: training needs what they make"
        raise UserError("--stages", expectation, got=" ".join(names), remedy=remedy)
    wanted = {name: stage for name, stage in stages(output_dir, rehearse).items() if name in names}
    if "data" in lacking and "correctness" in wanted:
        jobs = [job for job in wanted["correctness"].jobs if job.name != "losses cpu"]
        wanted["correctness"] = replace(wanted["correctness"], jobs=jobs)
    return wanted


def _build() -> Job:
    """The installation as `make gpu` does it, for the GPU at hand alone."""
    major, minor = torch.cuda.get_device_capability()
    words = ("-c", "import os, sys; os.execvp('make', ['make', 'gpu-installed', f'PYTHON={sys.executable}'])")
    return Job("build", words, (("LUMI_CUDA_ARCHES", f"{major}{minor}"), ("MAX_JOBS", "16")))


def _smoke(rehearse: bool) -> list[Job]:
    kind = ("--small", "--device", "cpu", "--part", "0/9") if rehearse else ("--production",)
    dtype = "float32" if rehearse else "bfloat16"
    words = lambda operator: script("correctness", *kind, "--operators", operator, "--dtypes", dtype)
    return [Job(operator, words(operator), (("CUDA_LAUNCH_BLOCKING", "1"),)) for operator in OPERATORS]


def _correctness(rehearse: bool) -> list[Job]:
    """The longest first, and the sanitizer beside them; it needs what it compiles as well."""
    sanitizer = Job(
        "memcheck", script("sanitize", "--seconds", "150", "--checks", "memcheck", "--operators", "attention")
    )
    if rehearse:
        words = ("--small", "--device", "cpu", "--dtypes", "float16", "--part", "0/9")
        jobs = [
            Job(operator, script("correctness", "--operators", operator, *words))
            for operator in ("swiglu", "rope")
        ]
        return [sanitizer, *jobs]
    jobs = [
        Job(
            f"{operator} {dtype} {part}",
            script(
                "correctness",
                "--operators",
                operator,
                "--dtypes",
                dtype,
                "--part",
                f"{part}/{PARTS.get(operator, 1)}",
            ),
        )
        for operator in OPERATORS
        for dtype in ("bfloat16", "float16", "float32")
        for part in range(PARTS.get(operator, 1))
    ]
    return [sanitizer, *jobs]


def _tiles(output_dir: Path, rehearse: bool, *more: str) -> list[Job]:
    """The tuner. `--only-check` compiles beforehand, each kernel beside the others; timing takes turns."""
    words = ("--nearest", str(1 if rehearse else NEAREST), *(("--rehearse",) if rehearse else ()), *more)
    own = lambda K, kernel: (
        "--table",
        str(output_dir / f"tiles-{K}-{kernel}.json"),
        "--head-dim",
        K,
        "--kernel",
        kernel,
    )
    return [
        Job(f"{kernel} {K}", script("tune_attention", *own(K, kernel), *words))
        for K in ("64", "128")
        for kernel in ("fwd", "dkdv", "dq")
    ]


def run_stage(
    name: str, stage: Stage, logs: Path, deadline: float, environment: dict[str, str]
) -> list[Outcome]:
    """Every job of a stage, ended at the stage's limit or the deadline, whichever comes first."""
    end = min(time.monotonic() + stage.seconds, deadline)

    def run(job: Job) -> Outcome:
        start = time.monotonic()
        if end - start < 1:
            return Outcome(name, job.name, 0.0, "not begun: no time was left", [])
        path = logs / f"{name}-{job.name.replace(' ', '_')}.txt"
        with path.open("wb") as output:
            own = environment | dict(job.environment)
            problem = run_one([sys.executable, *job.words], end - start, own, output)
        lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        last = [line[:WIDEST] for line in lines if line.strip()][-LAST_LINES:] if problem else []
        seconds = round(time.monotonic() - start, 1)
        print(f"{name}, {job.name}: {problem or 'done'}, {seconds} s", flush=True)
        return Outcome(name, job.name, seconds, problem, last)

    with ThreadPoolExecutor(stage.workers) as pool:
        return list(pool.map(run, stage.jobs))


def report(state: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """What was done, what went wrong with its last lines, the figures, and what is left to measure."""
    title = (
        "A rehearsal, whose figures mean nothing," if state["rehearsal"] else "The first quarter of an hour"
    )
    lines = [f"# {title} on {state['device']}, {state['date']}", ""]
    if state["interrupted"]:
        lines += ["It was interrupted. What the jobs of that stage printed is in `logs`.", ""]
    lines += ["| stage | seconds | done | not | date |", "|---|---|---|---|---|"]
    for name, found in state["stages"].items():
        done = sum(outcome["problem"] is None for outcome in found["jobs"])
        not_done = len(found["jobs"]) - done
        lines.append(f"| {name} | {found['seconds']} | {done} | {not_done} | {found['date']} |")
    for name in state["missing"]:
        word = "interrupted" if name == state["interrupted"] else "not begun"
        lines.append(f"| {name} | | | {word} | |")
    for outcome in (outcome for found in state["stages"].values() for outcome in found["jobs"]):
        if outcome["problem"]:
            lines += [
                "",
                f"{outcome['stage']}, {outcome['job']}: {outcome['problem']}",
                "```",
                *outcome["last_lines"],
                "```",
            ]
    if state["rehearsal"]:
        records = [
            record | {"claims": [_without_aim(claim) for claim in record["claims"]]} for record in records
        ]
    subjects = {record["subject"] for record in records}
    left = {subject: "left for make gpu-bench" for subject in GPU_SUBJECTS if subject not in subjects}
    return "\n".join([*lines, "", table(records, left, ())])


def _without_aim(claim: dict[str, Any]) -> dict[str, Any]:
    return claim | {"at_least": None, "at_most": None, "met": None}


def write(state: dict[str, Any], output_dir: Path) -> str:
    """The state and its report; figures that were there before all of it are left out."""
    paths = [path for path in sorted(output_dir.glob("*.json")) if path.stat().st_mtime >= state["began"]]
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in paths if path.name != "gpu_first.json"
    ]
    text = report(state, [record for record in records if "claims" in record])
    (output_dir / "gpu_first.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    (output_dir / "gpu_first.md").write_text(text, encoding="utf-8")
    return text


def begin(wanted: dict[str, Stage], output_dir: Path, device: str, rehearse: bool) -> dict[str, Any]:
    """The state before the first stage: what other stages left in this folder stays in it."""
    date = time.strftime("%Y-%m-%d %H:%M")
    state = {"device": device, "rehearsal": rehearse, "date": date, "began": time.time(), "stages": {}}
    state |= {"missing": list(wanted), "interrupted": ""}
    path = output_dir / "gpu_first.json"
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if (earlier["device"], earlier["rehearsal"]) == (device, rehearse):
                kept = {name: found for name, found in earlier["stages"].items() if name not in wanted}
                state |= {"stages": kept, "began": earlier["began"] if kept else state["began"]}
        except (ValueError, KeyError, TypeError) as error:
            expectation = "must be as this version of gpu_first.py writes it"
            raise UserError(str(path), expectation, remedy="remove it, or choose another folder") from error
    for job in (job for stage in wanted.values() for job in stage.jobs):
        (output_dir / f"{job.name}-{device}.json").unlink(
            missing_ok=True
        )  # earlier figures of what is done anew
    return state


def first(
    wanted: dict[str, Stage],
    state: dict[str, Any],
    output_dir: Path,
    seconds: float,
    environment: dict[str, str],
) -> None:
    """Run the stages in their order. What they find goes into the state, which is written after each."""
    deadline = time.monotonic() + seconds
    logs = output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, stage in wanted.items():
        start = time.monotonic()
        if deadline - start < LEAST_SECONDS:
            break
        outcomes = run_stage(name, stage, logs, deadline, environment)
        found = {"seconds": round(time.monotonic() - start, 1), "date": time.strftime("%Y-%m-%d %H:%M")}
        state["stages"][name] = found | {"jobs": [asdict(each) for each in outcomes]}
        state["missing"].remove(name)
        write(state, output_dir)
        if name == "build" and any(outcome.problem for outcome in outcomes):
            break
    print(f"\n{write(state, output_dir)}\nwrote {output_dir / 'gpu_first.md'}", flush=True)


def _bring(data: Path, output_dir: Path) -> None:
    """Copy the text, and the CPU's losses where they are, of another machine."""
    if not (data / "data").is_dir():
        made = "gpu_first_training.py data --output-dir DIR"
        raise UserError("--data", f"must be a folder DIR that {made} has filled", got=data)
    if data.resolve() != output_dir.resolve():
        for folder in MADE_IN:
            if (data / folder).is_dir():
                shutil.copytree(data / folder, output_dir / folder, dirs_exist_ok=True)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(stages(Path(), rehearse=True))
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, help="limit of all together; 720, or for a rehearsal 3600")
    parser.add_argument("--output-dir", type=Path, help="$OUT, or results/gpu_first-<device>, if not given")
    parser.add_argument(
        "--data", type=Path, help="where gpu_first_training.py put data, and the CPU's losses"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args(argv)
    if args.seconds is None:
        args.seconds = 3600 if args.rehearse else 720
    if not args.seconds >= LEAST_SECONDS:  # also NaN
        raise UserError("--seconds", f"must be at least {LEAST_SECONDS}", got=f"{args.seconds:g}")
    return args


def main(argv: Sequence[str]) -> int:
    """Exit code 0 where every job of every stage was done, else 1; 2 without a GPU."""
    args = parsed(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "benchmarks/gpu_first.py needs a CUDA device, and there is none here; try --rehearse",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    place = os.environ.get("OUT") or RESULTS / f"gpu_first-{slug(device)}"
    output_dir = (args.output_dir or Path(place)).absolute()
    check_output(output_dir, renamed=False, option="--output-dir" if args.output_dir else "$OUT")
    if args.data:
        _bring(args.data, output_dir)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # of the jobs: so many run at the same time
    if args.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    wanted = chosen(args.stages, output_dir, args.rehearse)
    state = begin(wanted, output_dir, slug(device), args.rehearse)

    def say() -> None:
        state["interrupted"] = next(iter(state["missing"]), "at its end")
        write(state, output_dir)
        print(f"interrupted; wrote {output_dir / 'gpu_first.md'}", file=sys.stderr, flush=True)

    output_dir.mkdir(parents=True, exist_ok=True)
    end_with_me(say)
    first(wanted, state, output_dir, args.seconds, environment)
    failed = any(job["problem"] for name in wanted for job in state["stages"].get(name, {"jobs": ()})["jobs"])
    return 1 if failed or state["missing"] else 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
