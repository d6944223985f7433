"""A whole training step on a CPU (forward, backward, clipping, AdamW), against the models of others.

    python benchmarks/cpu_training.py [--output-dir benchmarks/results] [--rounds 2]

The model is `configs/pretrain/tiny.json` with tied embeddings; a step has 2,048 tokens. "Packed" means rows
of 1,024 tokens in documents of 256 that do not see each other: the peers get a mask for that. dtype:
float32, and bfloat16 where the CPU multiplies it. Peers: transformers' Llama, litgpt, and GPT-2 as nanoGPT
has it; with rows of 256 they are compiled as well, in the faster dtype. The Llama of transformers has the
same weights, so the two losses must agree.

Peak memory is what a process of its own has needed at most during a step, less what it needed before.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from results import Results, main
from torch import Tensor, nn
from training_step import GPT, shipped_config

from lumi.host.devices import fast_bfloat16
from lumi.kernels.bundle import Ops, select
from lumi.model.transformer import Transformer

TOKENS, DOCUMENT = 2048, 256
CASES = {"rows of 256": (256, False), "rows of 1,024": (1024, False), "packed": (1024, True)}
OVER_PEERS = {"rows of 256": 1.5, "rows of 1,024": 1.5, "packed": 2.0}
COMPILED = "rows of 256"  # compiling takes a minute for each of the peers
RATE_SHARE, MEMORY_SHARE = 0.6, 0.5


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it."""
    return torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32


def mean_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """As everybody writes it."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def steps(
    case: str, dtype: torch.dtype, ops: Ops, names: tuple[str, ...] = ("lumi", "hf", "litgpt", "gpt")
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """For each candidate what makes its step, with a model of its own."""
    length, packed = CASES[case]
    shape = replace(shipped_config("tiny"), tied_embeddings=True, max_positions=1024)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (
        torch.randint(shape.vocab_size, (TOKENS // length, length), generator=generator) for _ in range(2)
    )
    positions = torch.arange(length).expand(tokens.shape)
    documents, inputs = {}, {"position_ids": positions}
    if packed:
        positions = positions % DOCUMENT
        documents = {
            "positions": positions,
            "documents": torch.arange(0, TOKENS + 1, DOCUMENT, dtype=torch.int32),
        }
        number = torch.arange(length) // DOCUMENT
        mask = (number[:, None] == number) & torch.ones(length, length, dtype=torch.bool).tril()
        inputs = {"position_ids": positions, "attention_mask": mask.expand(len(tokens), 1, -1, -1)}

    def ours() -> Transformer:
        return Transformer(shape, ops, compute_dtype=dtype).init_weights(0).train()

    def lumi() -> Callable[[], Tensor]:
        return peers.lumi_step(ours(), tokens, targets, **documents)

    def peer(model: nn.Module, loss: Callable[..., Tensor], compiled: bool) -> Callable[[], Tensor]:
        call = torch.compile(loss, dynamic=False) if compiled else loss
        return peers.peer_step(model, dtype, lambda: call(tokens, targets))

    def hf(compiled: bool = False) -> Callable[[], Tensor]:
        theirs = peers.hf_llama(ours()).train()
        return peer(theirs, lambda x, y: mean_loss(theirs(x, **inputs).logits, y), compiled)

    def litgpt(compiled: bool = False) -> Callable[[], Tensor]:
        if packed:
            raise RuntimeError("it takes no mask of documents in training")
        theirs = peers.litgpt_llama(shape).train()
        return peer(theirs, lambda x, y: mean_loss(theirs(x), y), compiled)

    def gpt(compiled: bool = False) -> Callable[[], Tensor]:
        if packed:
            raise RuntimeError("it takes no mask of documents")
        theirs = GPT(shape, length).train()
        return peer(theirs, theirs, compiled)

    eager = {"lumi": lumi, "hf": hf, "litgpt": litgpt, "gpt": gpt}
    chosen = {name: eager[name] for name in names}
    for name in names if case == COMPILED and dtype == fastest_dtype() else ():
        if name != "lumi":
            chosen[f"{name} compiled"] = lambda make=eager[name]: make(compiled=True)
    return chosen


def check(case: str, dtype: torch.dtype, ops: Ops) -> None:
    """The first loss is transformers'. Raises RuntimeError where it is not."""
    made = steps(case, dtype, ops, ("lumi", "hf"))
    ours, theirs = (made[name]()().item() for name in ("lumi", "hf"))
    if abs(ours - theirs) > (1e-4 if dtype == torch.float32 else 2e-2):
        raise RuntimeError(f"{case}: Lumi's loss is {ours:.6f}, that of transformers {theirs:.6f}")


def best_seconds(call: Callable[[], object], calls: int = 20) -> float:
    """Of several calls: a rate of the machine is what it reaches undisturbed."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of torch's product of square matrices of 2,048, the best of ten."""
    a, b, c = (torch.randn(2048, 2048).to(dtype) for _ in range(3))
    return 2 * 2048**3 / best_seconds(lambda: torch.mm(a, b, out=c), 10)


def peak_megabytes(case: str, dtype: torch.dtype, name: str) -> float:
    """What a step needs beyond the model, gradients and optimizer states, in a process of its own."""
    command = [sys.executable, __file__, "--peak", case, str(dtype).removeprefix("torch."), name]
    printed = subprocess.run(command, capture_output=True, text=True)
    if printed.returncode:
        raise RuntimeError(printed.stderr.strip().splitlines()[-1])
    return float(printed.stdout.split()[-1])


def print_peak(case: str, dtype: torch.dtype, name: str) -> None:
    """The most memory that the process has had during two steps, less what it had before."""
    step = steps(case, dtype, select("auto", "cpu", 64, dtype), (name,))[name]()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(2):
        step()
    print(memory("VmHWM") - before)


def memory(field: str) -> float:
    """A field of this process's status, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) / 1024


def run(results: Results) -> None:
    shape = replace(shipped_config("tiny"), tied_embeddings=True)
    dtypes = dict.fromkeys((torch.float32, fastest_dtype()))
    for dtype in dtypes:
        ops, short = select("auto", "cpu", shape.head_dim, dtype), str(dtype).removeprefix("torch.")
        for case, (length, _) in CASES.items():
            with results.case(f"{short}, {case}"):
                check(case, dtype, ops)
                flops = shape.flops_per_token(DOCUMENT if case == "packed" else length) * TOKENS
                times = results.time(
                    f"{short}, {case}",
                    {name: (lambda make=make: [make()]) for name, make in steps(case, dtype, ops).items()},
                    flops=flops,
                )
                rate = gemm_rate(dtype)  # now: it drifts by a factor of two within minutes
                results.note(**{f"{short}, {case}: GEMM GFLOP/s": round(rate / 1e9, 1)})
                results.compare(f"{short}, {case}", at_least=OVER_PEERS[case])
                share = flops / times["lumi"] / rate
                results.claim(
                    f"{short}, {case}: share of the GEMM rate",
                    share
                    if share <= 1
                    else None,  # above 1 the machine was slower when the product was timed
                    at_least=RATE_SHARE,
                )
    with results.case("memory"):
        ours, theirs = (peak_megabytes(COMPILED, torch.float32, name) for name in ("lumi", "hf"))
        results.note(**{"peak MB of a step, lumi": ours, "peak MB of a step, hf": theirs})
        text = f"float32, {COMPILED}: peak memory of a step, over transformers'"
        results.claim(text, ours / theirs, at_most=MEMORY_SHARE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], getattr(torch, sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main("cpu_training", __doc__, run, device_type="cpu", rounds=2))
