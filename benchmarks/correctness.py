"""Every operator on the GPU at the sizes that its tiles depend on, against float64, twice for equality.

    python benchmarks/correctness.py [--small | --production] [--operators rms_norm swiglu ...]
                                     [--dtypes bfloat16 ...] [--part 1/3] [--device cuda]

The tests of tests/kernels probe edges at small sizes. This walks widths and options, from one choice of tile
and warps to the next, in every dtype. Values and gradients of an operator may be at most twice as far from
float64 as those of the plain formula in the same dtype. An operator must leave its inputs alone and give the
same bits again. `--small` is for compute-sanitizer (`sanitize.py`): it takes the riskiest of the small cases,
and the references run on the CPU, so that few kernels run beside those under test. `--production` takes one
case of each operator, of the size of a real model. `--part K/N` is every N-th case from the K-th on, counted
from 0. With `--device cpu` Triton's interpreter runs the kernels (TRITON_INTERPRET=1).
"""

import argparse
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import measure
import torch
from measure import Operands
from torch import Tensor

from lumi.kernels.adamw import adamw, adamw_reference
from lumi.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from lumi.kernels.attention import attention, attention_reference
from lumi.kernels.attention_plan import attention_plan, attention_plan_reference
from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy
from lumi.kernels.decode_attention import decode_attention, decode_attention_reference
from lumi.kernels.global_norm import global_norm, global_norm_reference
from lumi.kernels.linear_cross_entropy import linear_cross_entropy
from lumi.kernels.lora_linear import lora_linear, lora_linear_reference
from lumi.kernels.rms_norm import rms_norm, rms_norm_reference
from lumi.kernels.rope import rope, rope_reference, rope_table
from lumi.kernels.swiglu import swiglu, swiglu_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call. `make(dtype)` draws the inputs on the CPU; the functions hold what else a call needs.

    `terms` is that of `measure.check`.
    """

    name: str
    ours: Callable
    reference: Callable
    make: Callable[[torch.dtype], Operands]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    terms: int = 1
    small: bool = False
    production: bool = False


def _draw(*shape: int, scale: float = 1.0) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (scale * torch.randn(shape)).to(dtype).requires_grad_()


def _operands(inputs: list[Callable], incoming: list[Callable]) -> Callable[[torch.dtype], Operands]:
    return lambda dtype: Operands(
        tuple(draw(dtype) for draw in inputs), tuple(draw(dtype).detach() for draw in incoming)
    )


def _master(draw: Callable[[torch.dtype], Tensor]) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: draw(torch.float32)


def _rms_norm() -> Iterator[Case]:
    sizes = [(517, D) for D in (64, 128, 256, 512, 768, 2048, 4096, 8192, 12_288, 16_384)]
    small, large = [(67, 96), (19, 12_288), (5, 16_384)], [(8192, 768)]
    for rows, D in sizes + small + large:
        make = _operands([_draw(rows, D), _master(_draw(D))], [_draw(rows, D)])
        kinds = {"small": (rows, D) in small, "production": (rows, D) in large}
        yield Case(f"rms_norm rows={rows} D={D}", rms_norm, rms_norm_reference, make, **kinds)


def _add_rms_norm() -> Iterator[Case]:
    sizes = [(517, D) for D in (64, 256, 768, 2048, 4096, 8192, 16_384)]
    small, large = [(67, 96), (19, 12_288), (5, 16_384)], [(8192, 768)]
    for rows, D in sizes + small + large:
        make = _operands(
            [_draw(rows, D), _draw(rows, D), _master(_draw(D))], [_draw(rows, D), _draw(rows, D)]
        )
        yield Case(
            f"add_rms_norm rows={rows} D={D}",
            add_rms_norm,
            add_rms_norm_reference,
            make,
            small=(rows, D) in small,
            production=(rows, D) in large,
        )


def _swiglu() -> Iterator[Case]:
    sizes, small = [(517, F) for F in (64, 96, 1024, 1536, 11_008)], [(67, 96), (3, 11_008)]
    large = [(8192, 2048)]
    for rows, F in sizes + small + large:
        make = _operands([_draw(rows, F), _draw(rows, F)], [_draw(rows, F)])
        kinds = {"small": (rows, F) in small, "production": (rows, F) in large}
        yield Case(f"swiglu rows={rows} F={F}", swiglu, swiglu_reference, make, **kinds)


def _rope() -> Iterator[Case]:
    sizes = list(itertools.product((173,), (32, 64, 96, 128, 256), ((4, 4), (12, 3))))
    small, large = [(19, 96, (12, 3)), (19, 256, (4, 4))], [(2048, 64, (12, 12))]
    for T, K, (H, G) in sizes + small + large:
        table = rope_table(torch.arange(T).expand(3, T), K, 10_000.0)
        make = _operands([_draw(3, T, H, K), _draw(3, T, G, K)], [_draw(3, T, H, K), _draw(3, T, G, K)])
        with_table = lambda function, table=table: (
            lambda q, k: function(q, k, *(t.to(q.device) for t in table))
        )
        name, size = f"rope T={T} K={K} H={H} G={G}", (T, K, (H, G))
        kinds = {"small": size in small, "production": size in large}
        yield Case(name, with_table(rope), with_table(rope_reference), make, **kinds)


def _attention() -> Iterator[Case]:
    documents = torch.tensor([0, 1, 70, 70, 399, 400, 517, 800], dtype=torch.int32)  # two rows of 400
    few = torch.tensor([0, 1, 40, 40, 97], dtype=torch.int32)  # a row of 97
    variants: list[tuple[int, int, int, int, Tensor | None, int | None]] = [
        (1, 130, 2, 2, None, None),
        (2, 400, 4, 4, None, None),
        (2, 400, 6, 2, documents, None),
        (2, 400, 6, 2, documents, 100),
        (2, 400, 6, 2, None, 100),
    ]
    small = [(96, (1, 97, 4, 2, few, 30)), (64, (1, 97, 2, 1, few, 30))]
    many = torch.tensor([0, 1, 900, 2048, 2049, 4096], dtype=torch.int32)  # two rows of 2048
    large = [*itertools.product((64, 128), [(2, 2048, 8, 4, many, None)])]
    for K, (B, T, H, G, cu_seqlens, window) in [
        *itertools.product((64, 96, 128), variants),
        *small,
        *large,
    ]:
        plan = lambda q, make, c=cu_seqlens, w=window: make(c, *q.shape[:2], q.device, w)
        ours = lambda q, k, v, plan=plan: attention(q, k, v, plan(q, attention_plan))
        reference = lambda q, k, v, plan=plan: attention_reference(q, k, v, plan(q, attention_plan_reference))
        make = _operands([_draw(B, T, heads, K) for heads in (H, G, G)], [_draw(B, T, H, K)])
        what = "causal" if cu_seqlens is None else "documents"
        name = f"attention B={B} T={T} K={K} H={H} G={G} {what} window={window}"
        kinds = {"small": cu_seqlens is few, "production": cu_seqlens is many}
        yield Case(name, ours, reference, make, **kinds)


def _decode_attention() -> Iterator[Case]:
    sizes = [
        (*size, None, None)
        for size in itertools.product((64, 128, 96), ((1, 700), (17, 129)), ((4, 4), (8, 2)))
    ]
    small = [
        (96, (1, 260), (4, 4), None, None),
        (128, (3, 320), (8, 2), 64, None),
        (64, (1, 160), (6, 3), 16, 70),
    ]
    for K, (T, S), (H, G), page_size, window in [
        *sizes,
        (128, (1, 4096), (32, 8), 64, None),
        (256, (17, 512), (8, 2), 16, None),
        (128, (1, 4096), (32, 8), 64, 1000),
        (128, (300, 700), (8, 2), None, 100),
        *small,
    ]:
        positions = torch.arange(T) + torch.tensor([[S - T], [0], [S // 2 - T]])
        num_pages = 0 if page_size is None else 3 * S // page_size
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        table = None if page_size is None else order.to(torch.int32).view(3, -1)
        cache = (3, S, G, K) if page_size is None else (num_pages, page_size, G, K)
        make = _operands(
            [lambda dtype, s=s: _draw(*s)(dtype).detach() for s in ((3, T, H, K), cache, cache)], []
        )
        bind = lambda f, p=positions, t=table, w=window: (
            lambda q, k, v: f(q, k, v, p.to(q.device), None if t is None else t.to(q.device), w)
        )
        yield Case(
            f"decode_attention K={K} T={T} S={S} H={H} G={G} page_size={page_size} window={window}",
            *map(bind, (decode_attention, decode_attention_reference)),
            make,
            small=(K, (T, S), (H, G), page_size, window) in small,
            production=S == 4096,
        )


def _linear_cross_entropy() -> Iterator[Case]:
    plain, master = _draw, lambda *shape, scale: _master(_draw(*shape, scale=scale))
    sizes: list[tuple[tuple[int, int, int], float, Callable]] = [
        ((70, 64, 333), 0.0, plain),
        ((515, 128, 16_384), 0.0, plain),
        ((515, 128, 32_768), 0.0, plain),
        ((2500, 128, 32_769), 1e-4, plain),
        ((515, 256, 128_256), 0.0, plain),
        ((5000, 64, 128_256), 0.0, plain),  # two chunks, in float32 three
        ((5000, 64, 128_256), 1e-4, master),
    ]
    small = [((70, 64, 333), 1e-4, plain), ((5, 64, 32_769), 0.0, master)]
    large = [((8192, 768, 32_768), 0.0, master)]
    for (N, D, V), z_loss, draw in sizes + small + large:
        targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
        targets[::7] = -100
        bind = lambda f, t=targets, z=z_loss: lambda h, w: f(h, w, t.to(h.device), z)
        weight = " float32 weight" if draw is master else ""
        make = _operands([_draw(N, D), draw(V, D, scale=0.1)], [lambda dtype: torch.ones(())])
        yield Case(
            f"linear_cross_entropy N={N} D={D} V={V} z_loss={z_loss}{weight}",
            *map(bind, (linear_cross_entropy, chunked_cross_entropy)),  # whole logits in float64 may not fit
            make,
            terms=N,
            small=((N, D, V), z_loss, draw) in small,
            production=((N, D, V), z_loss, draw) in large,
        )


def _lora_linear() -> Iterator[Case]:
    sizes, small = [(517, 64, 96, 8), (517, 1024, 768, 16)], [(67, 64, 96, 8), (33, 256, 64, 16)]
    large = [(8192, 1024, 1024, 16)]
    for rows, D, width, rank in sizes + small + large:
        weights = [
            torch.randn(width, D, generator=torch.Generator().manual_seed(index)) / D**0.5
            for index in range(2)
        ]
        bind = lambda f, ws=weights: (
            lambda x, *ab: f(x, [w.to(x.device, x.dtype) for w in ws], ab[:2], ab[2:], [2.0, 0.5])
        )
        adapters = [_master(_draw(rank, D, scale=D**-0.5))] * 2 + [_master(_draw(width, rank))] * 2
        make = _operands([_draw(rows, D), *adapters], [_draw(rows, width)] * 2)
        name, size = f"lora_linear rows={rows} D={D} O={width} R={rank}", (rows, D, width, rank)
        kinds = {"small": size in small, "production": size in large}
        yield Case(name, bind(lora_linear), bind(lora_linear_reference), make, **kinds)


def _adamw() -> Iterator[Case]:
    shapes = [(17,), (768, 256), (1,), (8193,), (50_000,), (3, 5)]
    numbers = {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "max_norm": 1.0,
        "weight_decays": [0.1] * len(shapes),
    }

    def bind(norm: Callable, update: Callable) -> Callable:
        def step(*tensors: Tensor) -> list[Tensor]:
            params, grads, means, squares = ([t.clone() for t in tensors[i::4]] for i in range(4))
            total = norm(grads)
            copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
            steps = [torch.full((), 2.0, device=p.device) for p in params]
            update(params, grads, means, squares, steps, norm=total, copies=copies, **numbers)
            return [total.float(), *params, *means, *squares, *copies, *steps]

        return step

    def make(dtype: torch.dtype) -> Operands:
        return Operands(tuple(torch.rand(shape) for shape in shapes for _ in range(4)), ())

    yield Case(
        "adamw",
        bind(global_norm, adamw),
        bind(global_norm_reference, adamw_reference),
        make,
        dtypes=(torch.float32,),
        small=True,
        production=True,
    )


OPERATORS: dict[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "attention": _attention,
    "decode_attention": _decode_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_linear": _lora_linear,
    "adamw": _adamw,
}


def check(case: Case, dtype: torch.dtype, device: torch.device, reference_device: torch.device) -> None:
    """Raises RuntimeError where the case is wrong, differs from run to run, or changes its inputs."""
    torch.manual_seed(0)
    operands = case.make(dtype)
    ours, again = operands.to(device), operands.to(device)
    actual = measure.results_and_gradients(case.ours, ours)
    for before, after in zip((*again.inputs, *again.incoming), (*ours.inputs, *ours.incoming), strict=True):
        if not torch.equal(before, after):
            raise RuntimeError(f"{case.name} {dtype}: an input was changed")
    if not all(map(torch.equal, actual, measure.results_and_gradients(case.ours, again))):
        raise RuntimeError(f"{case.name} {dtype}: a second run gave other bits")
    exact = measure.results_and_gradients(case.reference, operands.to(reference_device, torch.float64))
    same_dtype = measure.results_and_gradients(case.reference, operands.to(reference_device))
    measure.check(f"{case.name} {dtype}", actual, same_dtype, exact, terms=case.terms)


def run(
    operator: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    small: bool = False,
    production: bool = False,
    part: tuple[int, int] = (0, 1),
) -> int:
    """Every case of an operator in these dtypes, or the small ones, or that of a real model's size; of them
    those of `part`. Returns how many are wrong.

    What exists in one dtype alone is a production case whatever the dtypes.
    """
    cases = [case for case in OPERATORS[operator]() if case.small or not small]
    cases = [case for case in cases if case.production or not production][part[0] :: part[1]]
    pairs = [
        (case, dtype)
        for case in cases
        for dtype in (case.dtypes if production and len(case.dtypes) == 1 else dtypes)
        if dtype in case.dtypes
    ]
    wrong = 0
    for case, dtype in pairs:
        try:
            check(case, dtype, device, torch.device("cpu") if small else device)
        except Exception:  # whatever it is, it is one wrong case, and the others are wanted too
            traceback.print_exc()
            wrong += 1
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    print(f"{operator}, {names}: {len(pairs) - wrong} of {len(pairs)} right, the same bits twice", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--small", action="store_true")
    kind.add_argument("--production", action="store_true")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--part", metavar="K/N")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/correctness.py needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    device = (
        torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    )
    dtypes = [getattr(torch, name) for name in args.dtypes]
    if args.small or args.production or args.part:
        first, count = map(int, (args.part or "0/1").split("/"))
        kinds = {"small": args.small, "production": args.production, "part": (first, count)}
        wrong = sum(run(operator, dtypes, device, **kinds) for operator in args.operators)
    else:  # most of the time goes into compiling, so every operator and dtype is a process of its own
        jobs = list(itertools.product(args.operators, dtypes))
        with ProcessPoolExecutor(
            max_workers=min(8, os.cpu_count() or 1), mp_context=get_context("spawn")
        ) as pool:
            wrong = sum(
                future.result()
                for future in [pool.submit(run, name, (dtype,), device) for name, dtype in jobs]
            )
    print("all right" if wrong == 0 else f"{wrong} cases are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
