"""Finds the fastest tiles of the attention kernels on the GPU at hand and writes them into a table.

    python benchmarks/tune_attention.py [--head-dim 64 128] [--kernel fwd dkdv dq]
                                        [--table kernels/attention_tiles.json]
                                        [--nearest 6] [--only-check]

bfloat16, causal rows of 4096 tokens. Every candidate that compiles and fits is first checked against float64.
Then all of them are timed in turn; backward is timed whole, with one of its kernels changing. Afterwards run
`inspect_kernels.py` to see that no tile spills. `--nearest` takes the candidates most like the present tile
alone; `--only-check` compiles and checks them, which leaves them in Triton's cache, and times nothing.
"""

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import measure
import torch
from measure import Operands
from torch import Tensor

from lumi.kernels import attention_tiles
from lumi.kernels.attention import attention, attention_reference
from lumi.kernels.attention_plan import attention_plan, attention_plan_reference

Shape = tuple[int, int, int, int]  # B, T, H, G
SHAPE: Shape = (4, 4096, 16, 16)
CHECKED: Shape = (1, 300, 2, 1)
KERNELS = ("fwd", "dkdv", "dq")
LIMITS = {
    4: 168,
    8: 128,
}  # registers a thread, by warps: three blocks of 4 or two of 8 share a multiprocessor


def candidates(arch: int, K: int) -> list[attention_tiles.Row]:
    """Every tile worth compiling; with descriptors if the architecture has the bulk tensor copy engine. At
    head dim 64, where tiles want little more than a third or a half of the registers, also with a limit."""
    grid = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), (arch >= 90,))
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "DESCRIPTORS")
    rows = [dict(zip(names, values, strict=True)) for values in grid]
    if K > 64:
        return rows
    tall = [row for row in rows if (row["BLOCK_M"], row["BLOCK_N"]) == (128, 64)]
    return [*rows, *({**row, "maxnreg": LIMITS[row["num_warps"]]} for row in tall)]


def nearest(
    rows: Sequence[attention_tiles.Row], present: attention_tiles.Row, count: int
) -> list[attention_tiles.Row]:
    """The `count` rows that differ least from the present one, in how many of its values."""
    others = [row for row in rows if row != present]
    return sorted(others, key=lambda row: sum(row.get(name) != present.get(name) for name in row | present))[
        :count
    ]


def operands(shape: Shape, K: int, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random q, k, v and dy."""
    B, T, H, G = shape
    draw = lambda heads: torch.randn(B, T, heads, K, device=device, dtype=dtype)
    return Operands(tuple(draw(heads).requires_grad_() for heads in (H, G, G)), (draw(H),))


def ours(shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The operator with a plan that is made once."""
    plan = attention_plan(None, *shape[:2], device)
    return lambda q, k, v: attention(q, k, v, plan)


def check(K: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError where the tiles that are now in the table compute something else."""
    given = operands(CHECKED, K, dtype, device)
    plan = attention_plan_reference(None, *CHECKED[:2], device)
    reference = lambda q, k, v: attention_reference(q, k, v, plan)
    exact, same_dtype = (
        measure.results_and_gradients(reference, o) for o in (given.to(torch.float64), given)
    )
    measure.check(f"K={K}", measure.results_and_gradients(ours(CHECKED, device), given), same_dtype, exact)


def tune(
    kernel: str,
    K: int,
    rows: Sequence[attention_tiles.Row],
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    rounds: int,
) -> attention_tiles.Row:
    """Put the fastest of `rows` and of the present row into the table of this process, and return it.

    Rows that do not run are named and left out. `rounds` 0: they are checked, and nothing is timed or
    changed.
    """
    table = attention_tiles.table()
    arch = attention_tiles.architecture(device)
    if str(arch) not in table:
        table[str(arch)] = copy.deepcopy(table[attention_tiles.rows_of(arch)])
    kernels = table[str(arch)]["64" if K <= 64 else "128"]
    before, function = kernels[kernel], ours(shape, device)
    direction = "forward" if kernel == "fwd" else "backward"
    ready, named = {}, {}
    for row in [before, *(row for row in rows if row != before)]:
        name = " ".join(str(value) for value in row.values())
        kernels[kernel] = row
        try:
            check(K, dtype, device)
            if not rounds:
                continue
            sets = measure.buffer_sets(lambda: operands(shape, K, dtype, device), 2**27, device)
            ready[name] = measure.prepared(measure.DIRECTIONS[direction](function, sets), device, graph=True)
            named[name] = row
        except Exception as error:  # whatever a compiler may say to a tile that is too large for it
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            print(f"{kernel} K={K} {name}: left out, {reason}", flush=True)
    kernels[kernel] = before
    if not rounds:
        return before
    if not named:
        raise RuntimeError(f"{kernel} K={K}: no tile runs")
    samples = measure.interleaved(ready, device, rounds)
    for name, sample in sorted(samples.items(), key=lambda item: item[1].seconds)[:5]:
        print(f"{kernel} K={K} {name}: {direction} {sample.seconds * 1e6:.1f} us", flush=True)
    best = min(samples, key=lambda name: samples[name].seconds)
    kernels[kernel] = named[best]
    return named[best]


def write(path: Path) -> None:
    """The table of this process, a line for each row."""
    line = lambda kernels: ",\n".join(f'      "{name}": {json.dumps(row)}' for name, row in kernels.items())
    block = lambda widths: ",\n".join(
        f'    "{width}": {{\n{line(kernels)}\n    }}' for width, kernels in widths.items()
    )
    table = sorted(attention_tiles.table().items(), key=lambda item: int(item[0]))
    text = ",\n".join(f'  "{arch}": {{\n{block(widths)}\n  }}' for arch, widths in table)
    path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128), default=(64, 128))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument(
        "--table", type=Path, default=attention_tiles.TABLE, help="where the table is written"
    )
    parser.add_argument("--nearest", type=int, metavar="COUNT", help="try so many candidates; all by default")
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("benchmarks/tune_attention.py needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    dtype, shape = (torch.float16, CHECKED) if args.rehearse else (torch.bfloat16, SHAPE)
    with measure.ready(device):
        for K, kernel in itertools.product(args.head_dim, args.kernel):
            rows = candidates(attention_tiles.architecture(device), K)
            if args.nearest:
                arch = attention_tiles.rows_of(attention_tiles.architecture(device))
                present = attention_tiles.table()[arch]["64" if K <= 64 else "128"][kernel]
                rows = nearest(rows, present, args.nearest)
            rounds = 0 if args.only_check else 7
            found = tune(kernel, K, rows, device, dtype, shape, rounds)
            if args.only_check:
                continue
            print(f"{kernel} K={K}: {found}", flush=True)
            write(args.table)  # after each, so that an end in the middle loses nothing
    return 0


if __name__ == "__main__":
    sys.exit(main())
