"""The first quarter of an hour on a GPU: is it right, how fast is it, and does it train.

    python benchmarks/gpu_first.py [--stages build smoke ...] [--seconds 720] [--output-dir DIR]
                                   [--data DIR] [--rehearse]

Stages follow each other; the jobs of a stage are processes of their own, each with a limit, that free workers
take from one queue. What is timed has the GPU to itself. After each stage `gpu_first.json` and `gpu_first.md`
are written, with the last lines of what failed. A failure stops nothing but the build's own. No stage begins
without time for it, and none outlasts its share. The files go to $OUT, or to `results/gpu_first-<device>`;
the whole output of each job is in `logs`. Where the packages that prepare text are missing, `--data` brings
it. `--rehearse` runs every stage here, on the CPU and in Triton's interpreter, at tiny sizes.
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
from run_all import SUBJECTS, end_with_me, run_one, table  # noqa: E402

OPERATORS = "attention linear_cross_entropy rms_norm add_rms_norm swiglu rope decode_attention".split()
OPERATORS += ["lora_linear", "adamw"]
# Into how many jobs an operator's cases are cut in each dtype: most of the time goes into compiling.
PARTS = {"attention": 5, "decode_attention": 4, "linear_cross_entropy": 3, "rms_norm": 2, "add_rms_norm": 2}
WORKERS = 14
NEAREST = 6  # candidates of each attention kernel
LEAST_SECONDS = 10  # with less left a stage is not begun
SLOWER = 5  # a stage in a rehearsal
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
    build = [Job("build", ("-c", "import lumi._csrc")) if rehearse else _build()]
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
    lines = [f"# The first quarter of an hour on {state['device']}, {state['date']}", ""]
    lines += ["| stage | seconds | done | not |", "|---|---|---|---|"]
    for name, found in state["stages"].items():
        done = sum(outcome["problem"] is None for outcome in found["jobs"])
        lines.append(f"| {name} | {found['seconds']} | {done} | {len(found['jobs']) - done} |")
    for name in state["missing"]:
        lines.append(f"| {name} | | | not begun |")
    for outcome in (outcome for found in state["stages"].values() for outcome in found["jobs"]):
        if outcome["problem"]:
            lines += [
                "",
                f"{outcome['stage']}, {outcome['job']}: {outcome['problem']}",
                "```",
                *outcome["last_lines"],
                "```",
            ]
    subjects = {record["subject"] for record in records}
    left = {subject: "left for make gpu-bench" for subject in SUBJECTS if subject not in subjects}
    return "\n".join([*lines, "", table(records, left)])


def write(state: dict[str, Any], output_dir: Path, began: float) -> str:
    """The state and its report; figures that were there before are left out."""
    paths = [path for path in sorted(output_dir.glob("*.json")) if path.stat().st_mtime >= began]
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in paths if path.name != "gpu_first.json"
    ]
    text = report(state, [record for record in records if "claims" in record])
    (output_dir / "gpu_first.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    (output_dir / "gpu_first.md").write_text(text, encoding="utf-8")
    return text


def first(
    wanted: dict[str, Stage], output_dir: Path, device: str, seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run the stages in their order; returns the state that is written after each."""
    began, deadline = time.time(), time.monotonic() + seconds
    logs = output_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"device": device, "date": time.strftime("%Y-%m-%d %H:%M"), "stages": {}}
    state["missing"] = list(wanted)
    for name, stage in wanted.items():
        start = time.monotonic()
        if deadline - start < LEAST_SECONDS:
            break
        outcomes = run_stage(name, stage, logs, deadline, environment)
        state["missing"].remove(name)
        found = {"seconds": round(time.monotonic() - start, 1), "jobs": [asdict(each) for each in outcomes]}
        state["stages"][name] = found
        text = write(state, output_dir, began)
        if name == "build" and any(outcome.problem for outcome in outcomes):
            break
    print(f"\n{text if state['stages'] else ''}\nwrote {output_dir / 'gpu_first.md'}", flush=True)
    return state


def main(argv: Sequence[str]) -> int:
    """Exit code 0 where every job of every stage was done, else 1; 2 without a GPU."""
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
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "benchmarks/gpu_first.py needs a CUDA device, and there is none here; try --rehearse",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    place = os.environ.get("OUT") or RESULTS / f"gpu_first-{slug(device)}"
    output_dir = (args.output_dir or Path(place)).absolute()
    if args.data:
        shutil.copytree(args.data, output_dir, dirs_exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # of the jobs: so many run at the same time
    if args.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    wanted = {name: stage for name, stage in stages(output_dir, args.rehearse).items() if name in args.stages}
    seconds = args.seconds or (3600 if args.rehearse else 720)
    end_with_me()
    state = first(wanted, output_dir, slug(device), seconds, environment)
    failed = any(job["problem"] for found in state["stages"].values() for job in found["jobs"])
    return 1 if failed or state["missing"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
