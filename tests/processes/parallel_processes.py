"""What tests/test_parallel.py runs, under torchrun or alone: `parallel_processes.py JOBS.json`, one training after another.

Torch is imported once; every process of a training is a fork of one of torchrun's, and leaves in the run folder what only it can see.
"""

import collections
import ctypes
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # FSDP2 imports it when it is first used: here once, before the forks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lumi.train
import lumi.training.run
import lumi.training.trainer
from lumi.command_line import run
from lumi.training.optimizer import Optimizer
from lumi.training.trainer import Trainer

DEADLINE_SECONDS = 100
RANK = int(os.environ.get("RANK", 0))
observed = {"norms": [], "collectives": []}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Collectives(TorchDispatchMode):
    """Counts what processes send each other. (Torch's own CommDebugMode loses its way where a module is called under another roof.)"""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self.counts[str(function.overloadpacket)] += 1
        return function(*arguments, **(keywords or {}))


class ObservedTrainer(Trainer):
    """Counts the collectives of every micro-step of step 3: in the second one DDP still rearranges its buckets."""

    def forward_backward(self, batch, dloss, last):
        if self.state.step != 2:
            return super().forward_backward(batch, dloss, last)
        with Collectives() as counted:
            nats = super().forward_backward(batch, dloss, last)
        observed["collectives"].append(counted.counts)
        return nats


class ObservedOptimizer(Optimizer):
    """Puts the gradients of three steps together by torch's own means, and measures them in float64."""

    def measure_gradients(self, loss_scale=1.0):
        clip = super().measure_gradients(loss_scale)
        if len(observed["norms"]) < 3:
            gradients = {name: whole(p.grad) for name, p in self.named.items() if p.grad is not None}
            exact = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
            if not observed["norms"]:
                self._describe(gradients)
            observed["norms"].append((clip.norm, exact / loss_scale))
        return clip

    def _describe(self, gradients):
        values = [gradient.flatten() for gradient in gradients.values()]
        observed["bfloat16_gradients"] = all(torch.equal(value, value.bfloat16().float()) for value in values)
        tensors = {
            "parameters": list(self.named.values()),
            "states": [t for t in self.state_tensors().values() if t.ndim],
        }
        for name, members in tensors.items():
            observed[name] = sorted(
                {f"{type(t.data).__name__} {str(own(t).dtype).removeprefix('torch.')}" for t in members}
            )
            observed[f"own_{name}"] = sum(own(t).numel() for t in members)
            observed[f"all_{name}"] = sum(t.numel() for t in members)
        observed["gradients"] = {name: gradient.contiguous() for name, gradient in gradients.items()}


def train(folder, arguments):
    """One training in this process; returns its exit code."""
    lumi.training.run.Trainer, lumi.training.trainer.Optimizer = ObservedTrainer, ObservedOptimizer
    code = run(lumi.train.main, [*arguments, "--output-dir", str(folder)])
    if code == 0:
        if RANK == 0:
            safetensors.torch.save_file(observed["gradients"], folder / "gradients.safetensors")
        (folder / f"observed-{RANK}.json").write_text(
            json.dumps({key: observed[key] for key in observed.keys() - {"gradients"}})
        )
    return code


def fork(folder, arguments):
    """`train` in a fork, its output in files beside the run folder; returns its exit code."""
    sys.stdout.flush()
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left over
    signal.alarm(DEADLINE_SECONDS)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}-{RANK}", os.O_WRONLY | os.O_CREAT, 0o644), number)
    code = 70
    try:
        code = train(folder, arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's clean-up costs more than most of this


def main(jobs):
    for job in json.loads(Path(jobs).read_text()):
        folder = Path(job["folder"])
        code = fork(folder, job["arguments"])
        if code != job["exit"]:
            sys.exit(
                f"{folder.name}, rank {RANK}: exit code {code}\n"
                + Path(f"{folder}.err-{RANK}").read_text()[-3000:]
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
