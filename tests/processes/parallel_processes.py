"""One training on several processes, for test_sharding.py; `case_server.py` starts it.

Every process of the training is a fork, and leaves in the run folder what only it can see.
"""

import collections
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # FSDP2 imports it when it is first used: here once, before the forks
from saver_processes import fork, served_store
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lumi.train
import lumi.training.run
import lumi.training.run_log
import lumi.training.trainer
from lumi.command_line import run
from lumi.training.optimizer import Optimizer
from lumi.training.trainer import Trainer

observed = {"norms": [], "collectives": []}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Collectives(TorchDispatchMode):
    """Counts what processes send each other. (Torch's CommDebugMode fails where a module is wrapped.)"""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self.counts[str(function.overloadpacket)] += 1
        return function(*arguments, **(keywords or {}))


class ObservedTrainer(Trainer):
    """Counts the collectives of every micro-step of step 3: in step 2 DDP still rearranges its buckets."""

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
            observed["norms"].append((clip.norm.item(), exact / loss_scale))
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
        observed["copies"] = len(self.copies)
        observed["gradients"] = {name: gradient.contiguous() for name, gradient in gradients.items()}


def train(rank, size, folder, arguments):
    """One process of a training; returns its exit code. Its output goes to files beside the run folder."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}-{rank}", os.O_WRONLY | os.O_CREAT, 0o644), number)
    lumi.training.run.Trainer, lumi.training.trainer.Optimizer = ObservedTrainer, ObservedOptimizer
    lumi.training.run_log.draw_loss = lambda *_: None  # a picture costs as much as ten steps
    try:
        code = run(lumi.train.main, [*arguments, "--output-dir", str(folder)])
    except SystemExit as end:  # of a process that leaves the message to the first
        return end.code
    if code == 0:
        if rank == 0:
            safetensors.torch.save_file(observed["gradients"], folder / "gradients.safetensors")
        (folder / f"observed-{rank}.json").write_text(
            json.dumps({key: observed[key] for key in observed.keys() - {"gradients"}})
        )
    return code


def main(folder, size, expected, *arguments):
    """Train on `size` processes, all of which must end with the exit code `expected`."""
    folder, size = Path(folder), int(size)
    with served_store():
        codes = fork(size, train, folder, arguments)
    if codes != [int(expected)] * size:
        errors = "".join(Path(f"{folder}.err-{rank}").read_text()[-3000:] for rank in range(size))
        raise RuntimeError(f"{folder.name}: exit codes {codes}\n{errors}")
