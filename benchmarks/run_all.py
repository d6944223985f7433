"""All benchmarks of the GPU at hand, or of the CPU where there is none: each in a process of its own, and one
table of what they aim at.

    python benchmarks/run_all.py [--only attention row_kernels] [--seconds 840]
                                 [--output-dir benchmarks/results]

Writes `<subject>-<device>.json` and `.png` as they are measured. `README-<device>.md` has the table of all
subjects that have been measured on this device, earlier ones too, each with its date. If a benchmark fails,
runs out of time or is not begun, the figures of the others stay, and the exit code is 1. The first subjects
have the aims that matter most, and fit the default limit. The rest gets what is left of it, or a run of its
own with --only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from results import PACKAGES, RESULTS, slug

# In this order, with the seconds that each may take: most of it is compiling the peers.
GPU_SUBJECTS = {
    "attention": 165,
    "training_step": 225,
    "linear_cross_entropy": 90,
    "optimizer": 60,
    "row_kernels": 240,
    "lora_linear": 90,
    "decode_attention": 120,
}
CPU_SUBJECTS = {
    "cpu_training": 265,
    "cpu_generation": 85,
    "cpu_serving": 240,
    "cpu_finetuning": 150,
    "cpu_operators": 95,
}
SUBJECTS = GPU_SUBJECTS if torch.cuda.is_available() else CPU_SUBJECTS
_running: set[int] = set()  # the sessions of the programs that `run_one` has begun
LEAST_SECONDS = 15  # with less left a benchmark is not begun


def run_one(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> str | None:
    """Run a program, in `environment` instead of this one's, and print into `output`; None, or what went
    wrong. Nothing that it started outlives the call."""
    # In its own session, so that it can be ended with all of its processes.
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    _running.add(process.pid)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:
        _end(process.pid)
        process.wait()
    return None if code == 0 else f"exit code {code}"


def end_with_me(say: Callable[[], None] = lambda: None) -> None:
    """From now on, SIGTERM and SIGINT end this program with all that `run_one` has begun, in any thread.

    Args:
        say: called before the end.
    """

    def end(number: int, frame: Any) -> None:
        for session in [*_running]:
            _end(session)
        say()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _end(session: int) -> None:
    with suppress(ProcessLookupError):  # there is nothing left of it
        os.killpg(session, signal.SIGKILL)
    _running.discard(session)


def table(
    records: Sequence[dict[str, Any]], problems: dict[str, str], subjects: Collection[str] = tuple(SUBJECTS)
) -> str:
    """Markdown of every claim of these benchmarks, what failed or is missing, and on what they ran.

    Args:
        subjects: those that are named where they are neither measured nor among the problems.
    """
    lines = ["| what | measured | aimed at | met |", "|---|---|---|---|"]
    for claim in (claim for record in records for claim in record["claims"]):
        aims = [
            f"{sign} {claim[key]:g}"
            for key, sign in (("at_least", ">="), ("at_most", "<="))
            if claim[key] is not None
        ]
        measured = "not measured" if claim["measured"] is None else f"{claim['measured']:.3f}"
        met = {None: "no" if aims and claim["measured"] is None else "", True: "yes", False: "no"}[
            claim["met"]
        ]
        lines.append(f"| {claim['claim']} | {measured} | {' and '.join(aims)} | {met} |")
    lines += ["", *(f"{subject}: {problem}" for subject, problem in problems.items())]
    found = problems.keys() | {record["subject"] for record in records}
    lines += [f"{subject}: not measured" for subject in subjects if subject not in found]
    for record in records:
        if not record["finished"]:
            lines.append(
                f"{record['subject']}: it was ended before it was done, so cases and claims are missing"
            )
        for kind, word in (("failures", "failed"), ("left_out", "left out")):
            lines += [
                f"{record['subject']}, {word}: {item['where']}: {item['error'].splitlines()[0]}"
                for item in record[kind]
            ]
    for record in records:
        about = record["environment"]
        versions = ", ".join(f"{key} {about[key]}" for key in (*PACKAGES, "cuda") if about.get(key))
        machine = f"driver {_driver(about)}" if "threads" not in about else _cpu(about)
        lines.append(f"{record['subject']}: {about['device']}, {about['date']}, {versions}, {machine}")
        if record.get("notes"):
            notes = ", ".join(f"{key} {value}" for key, value in record["notes"].items())
            lines.append(f"{record['subject']}: {notes}")
    return (
        "\n\n".join(
            ["\n".join(lines[: lines.index("")]), *(line for line in lines[lines.index("") :] if line)]
        )
        + "\n"
    )


def _cpu(environment: dict[str, Any]) -> str:
    return f"{environment['threads']} threads, {' '.join(environment['instructions'])}"


def _driver(environment: dict[str, Any]) -> str:
    return (environment.get("nvidia-smi") or {}).get("driver_version", "unknown")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seconds", type=float, default=840, help="limit of all together")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    there = torch.cuda.is_available()
    device = slug(torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu"))
    path = lambda subject: args.output_dir / f"{subject}-{device}.json"
    deadline, problems = time.monotonic() + args.seconds, {}
    for subject in args.only:
        script = str(Path(__file__).with_name(f"{subject}.py"))
        start = time.monotonic()
        left = deadline - start
        if left < LEAST_SECONDS:
            problems[subject] = "not begun, no time left; what is shown of it, if anything, is of its date"
        else:
            path(subject).unlink(missing_ok=True)  # figures of another day must not pass for this run's
            if problem := run_one(
                [sys.executable, script, "--output-dir", str(args.output_dir)], min(SUBJECTS[subject], left)
            ):
                problems[subject] = problem
        print(f"{subject}: {problems.get(subject, 'done')}, {time.monotonic() - start:.0f} s", flush=True)
    records = [
        json.loads(path(subject).read_text(encoding="utf-8"))
        for subject in SUBJECTS
        if path(subject).exists()
    ]
    text = table(records, problems)
    target = args.output_dir / f"README-{device}.md"
    target.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote {target}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
