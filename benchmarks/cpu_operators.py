"""Forward and backward of each operator on a CPU, against plain torch, eager and compiled.

    python benchmarks/cpu_operators.py [--output-dir benchmarks/results] [--rounds 5]

Shapes are those of the five sizes (`configs/pretrain`), 2,048 tokens in rows of 512; the loss is measured
at the smallest and at "small", with 1,024 rows. "Compiled" is measured at "tiny" alone, because compiling
takes long. Before it is timed, an operator must be at most twice as far from float64 as plain torch is. An
operator that does not beat eager torch at a size is named in the table.
"""

import sys
from collections.abc import Callable

import torch
from cpu_training import fastest_dtype
from measure import Operands, check, results_and_gradients, step_calls
from results import Results, main
from torch import Tensor
from training_step import shipped_config

from lumi.kernels.bundle import NATIVE, REFERENCE, Ops
from lumi.kernels.rope import rope_table
from lumi.model.transformer import ModelConfig

SIZES = ("micro", "tiny", "small", "medium", "base")
LENGTH, ROWS, LOSS_ROWS, DOCUMENT = 512, 4, 1024, 128
OVER_EAGER = 1.5
LOSSES, COMPILED = ("micro", "small"), "tiny"


def operators(shape: ModelConfig) -> dict[str, tuple[list[tuple[int, ...]], Callable[[Ops], Callable]]]:
    """For each operator the shapes of its inputs, and what a bundle computes of them."""
    tokens, D, F, H, K = (LENGTH * ROWS, shape.model_dim, shape.mlp_dim, shape.num_heads, shape.head_dim)
    heads = (ROWS, LENGTH, H, K)
    tables = rope_table(torch.arange(LENGTH).expand(ROWS, LENGTH), K, 1e4)
    offsets = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32)
    targets = torch.randint(shape.vocab_size, (LOSS_ROWS,), generator=torch.Generator().manual_seed(0))

    def attention(cu_seqlens: Tensor | None) -> Callable[[Ops], Callable]:
        def of(ops: Ops) -> Callable:
            plan = ops.attention_plan(cu_seqlens, ROWS, LENGTH, "cpu")
            return lambda q, k, v: ops.attention(q, k, v, plan)

        return of

    return {
        "rms_norm": ([(tokens, D), (D,)], lambda ops: ops.rms_norm),
        "add_rms_norm": ([(tokens, D), (tokens, D), (D,)], lambda ops: ops.add_rms_norm),
        "rope": ([heads, heads], lambda ops: lambda q, k: ops.rope(q, k, *tables)),
        "swiglu": ([(tokens, F), (tokens, F)], lambda ops: ops.swiglu),
        "attention": ([heads] * 3, attention(None)),
        "attention, packed": ([heads] * 3, attention(offsets)),
        "loss": (
            [(LOSS_ROWS, D), (shape.vocab_size, D)],
            lambda ops: lambda hidden, weight: ops.linear_cross_entropy(hidden, weight, targets),
        ),
    }


def run(results: Results) -> None:
    dtypes = dict.fromkeys((torch.float32, fastest_dtype()))
    for dtype in dtypes:
        for size in SIZES:
            for name, (shapes, of) in operators(shipped_config(size)).items():
                if name == "loss" and size not in LOSSES:
                    continue
                case = f"{str(dtype).removeprefix('torch.')}, {size}: {name}"
                with results.case(case):
                    measure_one(
                        results,
                        case,
                        dtype,
                        shapes,
                        of,
                        compiled=size == COMPILED and dtype == fastest_dtype(),
                    )


def measure_one(
    results: Results,
    case: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    of: Callable[[Ops], Callable],
    compiled: bool,
) -> None:
    inputs = tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    outputs = of(REFERENCE)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    operands = Operands(inputs, tuple(torch.randn_like(y) for y in outputs))
    exact = results_and_gradients(of(REFERENCE), operands.to(torch.float64))
    same_dtype, actual = (results_and_gradients(of(ops), operands) for ops in (REFERENCE, NATIVE))
    check(case, actual, same_dtype, exact, terms=shapes[0][0])
    functions = {"lumi": of(NATIVE), "eager": of(REFERENCE)}
    if compiled:
        functions["compiled"] = torch.compile(of(REFERENCE), dynamic=False)
    results.time(case, {name: lambda f=f: step_calls(f, [operands]) for name, f in functions.items()})
    results.compare(case, at_least=OVER_EAGER, peers=("eager",))


if __name__ == "__main__":
    sys.exit(main("cpu_operators", __doc__, run, device_type="cpu", rounds=5))
