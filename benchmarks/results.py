"""What every benchmark here records: times, claims, faults and the machine, in one JSON file."""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measure import ROUNDS, interleaved, prepared, ready

from lumi.host.devices import cpu_flags, cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "transformers", "litgpt", "trl", "peft")


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    record: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if device.type == "cpu":
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        record["instructions"] = [name for name in wanted if name in cpu_flags()]
        record["threads"] = torch.get_num_threads()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # not installed: then it is no peer here
            record[name] = version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
        record |= {
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    if shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        line = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        record["nvidia-smi"] = (
            dict(zip(query.split(","), line.stdout.splitlines()[0].split(", "), strict=False))
            if line.stdout
            else None
        )
    return record


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200", or "AMD EPYC, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_name()
    return f"{name}, {os.cpu_count()} cores" if name else platform.machine()


def slug(device: torch.device) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", device_name(device)).strip("_")


class Results:
    """The figures of one benchmark, in `<subject>-<device>.json` after every single one of them."""

    def __init__(self, subject: str, device: torch.device, folder: Path, rounds: int = ROUNDS):
        self.device, self.rounds = device, rounds
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{subject}-{slug(device)}.json"
        self.data: dict[str, Any] = {"subject": subject, "environment": environment(device)}
        self.data |= {
            "finished": False,
            "claims": [],
            "times": [],
            "failures": [],
            "left_out": [],
            "notes": {},
        }
        self._write()

    def time(
        self,
        case: str,
        candidates: dict[str, Callable[[], list[Callable]]],
        *,
        graph: bool = True,
        num_bytes: int = 0,
        flops: int = 0,
        rounds: int | None = None,
        replays: Collection[str] = (),
    ) -> dict[str, float]:
        """Seconds of each candidate, which is a function that checks and then returns the calls to time.

        "lumi" must work; a peer that does not is recorded and left out. `num_bytes` and `flops` of one call
        become rates. `graph`: the calls are captured here; `replays`: candidates whose calls replay graphs of
        their own.
        """
        ready = {}
        for name, prepare in candidates.items():
            with nullcontext() if name == "lumi" else self._reported(f"{case}: {name}", "left_out"):
                ready[name] = prepared(prepare(), self.device, graph=graph)
        samples = interleaved(ready, self.device, rounds or self.rounds)
        for name, sample in samples.items():
            captured = (graph or name in replays) and self.device.type == "cuda"
            record: dict[str, Any] = {
                "case": case,
                "candidate": name,
                "launch": "graph" if captured else "eager",
            }
            record |= {key: round(getattr(sample, key) * 1e6, 3) for key in ("seconds", "low", "high")}
            record["microseconds"] = record.pop("seconds")
            rates = {
                "gb_per_second": num_bytes / sample.seconds / 1e9,
                "tflops": flops / sample.seconds / 1e12,
            }
            record |= {key: round(rate, 2) for key, rate in rates.items() if rate}
            self.data["times"].append(record)
            shown = "  ".join(f"{value:.3g} {key}" for key, value in record.items() if key in rates)
            spread = (sample.high - sample.low) / sample.seconds
            print(
                f"{case:<58} {name:<14} {record['launch']:<5} "
                f"{record['microseconds']:>11.1f} us +- {spread / 2:<5.1%} {shown}",
                flush=True,
            )
        self._write()
        return {name: sample.seconds for name, sample in samples.items()}

    def compare(
        self, case: str, *, at_least: float | None = None, peers: Collection[str] | None = None
    ) -> None:
        """Claim how many times faster "lumi" is than the fastest of `peers`, or of all that were timed.

        No ratio is claimed if the quartiles of the two overlap.
        """
        times = {t["candidate"]: t for t in self.data["times"] if t["case"] == case}
        others = [t for name, t in times.items() if name != "lumi" and (peers is None or name in peers)]
        if not others or "lumi" not in times:
            return self.claim(f"{case}: over its peers", None, at_least=at_least)
        ours, best = times["lumi"], min(others, key=lambda t: t["microseconds"])
        text = f"{case}: over {best['candidate']}"
        if ours["low"] <= best["high"] and best["low"] <= ours["high"]:
            return self.claim(f"{text} (as fast, within the spread)", None, at_least=at_least)
        return self.claim(text, best["microseconds"] / ours["microseconds"], at_least=at_least)

    def matmul_rate(self, size: int = 8192) -> float:
        """FLOP/s of torch's bfloat16 product of random square matrices. A floor of FLOPs is divided by it."""
        draw = lambda: torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        sets, flops = [(draw(), draw()) for _ in range(2)], 2 * size**3
        calls = [lambda a=a, b=b: a @ b for a, b in sets]
        return flops / self.time(f"matmul {size}", {"torch": lambda: calls}, flops=flops)["torch"]

    def claim(
        self, text: str, value: float | None, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """One line of the table: a figure and its aim. No aim: for information. None: it could not be
        measured."""
        wanted = at_least is not None or at_most is not None
        met = (at_least or 0) <= value <= (at_most or math.inf) if wanted and value is not None else None
        measured = None if value is None else round(value, 4)
        self.data["claims"].append(
            {"claim": text, "measured": measured, "at_least": at_least, "at_most": at_most, "met": met}
        )
        print(f"-> {text}: {measured}" + {None: "", True: ", met", False: ", NOT met"}[met], flush=True)
        self._write()

    def note(self, **values: Any) -> None:
        """Further figures of the machine or a case."""
        self.data["notes"].update(values)
        self._write()

    def finish(self) -> None:
        """Mark the file: everything was run. Without the mark the run was ended from outside."""
        self.data["finished"] = True
        self._write()

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What goes wrong in here is shown and recorded; the other cases go on."""
        with self._reported(name, "failures"):
            yield

    @contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """A peer that does not run in here is named and left out."""
        with self._reported(name, "left_out"):
            yield

    @contextmanager
    def _reported(self, where: str, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:500]
            if kind == "failures":
                traceback.print_exc()
            else:
                print(f"{where}: left out, {text.splitlines()[0]}", flush=True)
            self.data[kind].append({"where": where, "error": text})
            self._write()

    def draw(self) -> None:
        """Bars of every time, beside the JSON, where matplotlib is installed."""
        if not self.data["times"] or not importlib.util.find_spec("matplotlib"):
            return
        from matplotlib.figure import Figure

        times = self.data["times"][::-1]
        slowest = {t["case"]: max(u["microseconds"] for u in times if u["case"] == t["case"]) for t in times}
        figure = Figure(figsize=(11, 1 + 0.2 * len(times)), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:green" if t["candidate"] == "lumi" else "tab:gray" for t in times]
        axes.barh(range(len(times)), [t["microseconds"] / slowest[t["case"]] for t in times], color=colors)
        axes.set_yticks(
            range(len(times)), [f"{t['case']}, {t['candidate']}, {t['launch']}" for t in times], fontsize=6
        )
        axes.set_xlabel("time, as a share of the slowest of its case")
        axes.set_title(f"{self.data['subject']}, {self.data['environment']['device']}")
        figure.savefig(self.path.with_suffix(".png"), dpi=120)

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def main(
    subject: str,
    description: str,
    run: Callable[[Results], None],
    device_type: str = "cuda",
    rounds: int = ROUNDS,
) -> int:
    """The command line of a benchmark. Exit code 1 where a case failed, 2 without the GPU it needs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=rounds)
    args = parser.parse_args()
    if device_type == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks/{subject}.py needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cpu" if device_type == "cpu" else f"cuda:{torch.cuda.current_device()}")
    results = Results(subject, device, args.output_dir, args.rounds)
    with ready(device), results.case(subject):
        run(results)
    results.finish()
    results.draw()
    print(f"wrote {results.path}")
    return 1 if results.data["failures"] else 0
