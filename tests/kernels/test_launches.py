"""Every launch of every Triton operator as a GPU would get it, at the sizes of tests and benchmarks and past
2^31 elements."""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")
import launches_without_gpu
import triton
import triton.language as tl
from launches_without_gpu import Launches
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from triton.tools.tensor_descriptor import TensorDescriptor

from lumi.kernels.attention import attention
from lumi.kernels.attention_plan import attention_plan
from lumi.kernels.decode_attention import decode_attention
from lumi.kernels.linear_cross_entropy import linear_cross_entropy
from lumi.kernels.token_losses import token_losses

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU launches itself")
FOLDER = Path(__file__).parents[2] / "benchmarks"
BFLOAT16 = torch.bfloat16


@pytest.fixture
def launches(monkeypatch):
    """Launches on fake tensors, which have a size and no contents."""
    monkeypatch.syspath_prepend(str(FOLDER))
    launches = Launches()
    launches.install(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield launches


def module(name):
    return importlib.import_module(name)


def forward_and_backward(function, *shapes, dtype=BFLOAT16):
    inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])


def run_rows(name, shape):
    row_kernels = module("row_kernels")
    operator = row_kernels.OPERATORS[name]
    module("measure").results_and_gradients(
        operator.ours, operator.make(shape, BFLOAT16, torch.device("cpu"))
    )


def run_attention(shape):
    B, T, H, G, K = shape
    plan = attention_plan(None, B, T, "cpu")
    forward_and_backward(partial(attention, plan=plan), (B, T, H, K), (B, T, G, K), (B, T, G, K))


def run_decode(shape, page_size=None, tokens=1):
    B, S, H, G, K = shape
    q, positions = torch.empty(B, tokens, H, K, dtype=BFLOAT16), torch.empty(B, tokens, dtype=torch.int64)
    slots = (B, S) if page_size is None else (B * S // page_size, page_size)
    k_cache, v_cache = (torch.empty(*slots, G, K, dtype=BFLOAT16) for _ in range(2))
    table = None if page_size is None else torch.empty(B, S // page_size, dtype=torch.int32)
    decode_attention(q, k_cache, v_cache, positions, table)


def run_loss(shape, function=linear_cross_entropy, weight_dtype=BFLOAT16):
    N, D, V = shape
    hidden = torch.empty(N, D, dtype=BFLOAT16, requires_grad=True)
    weight = torch.empty(V, D, dtype=weight_dtype, requires_grad=True)
    loss = function(hidden, weight, torch.empty(N, dtype=torch.int64))
    torch.autograd.grad(loss, (hidden, weight), torch.empty_like(loss))


def run_one_chunk(shape):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumi.kernels.linear_cross_entropy.LOGITS_BYTES", 2**33)
        run_loss(shape)


def benchmarks():
    """The sizes of `make gpu-bench`, as calls by name."""
    row_kernels, losses = module("row_kernels"), module("linear_cross_entropy")
    calls = {}
    for name, operator in row_kernels.OPERATORS.items():
        calls |= {f"{name} {s}": partial(run_rows, name, s) for s in (*operator.large, *operator.small)}
    shapes = module("attention")
    for shape in dict.fromkeys((*shapes.CAUSAL, *shapes.GROUPED, *shapes.PACKED)):
        calls[f"attention {shape}"] = partial(run_attention, shape)
    shapes = module("decode_attention")
    for shape in dict.fromkeys((*shapes.SHAPES, *shapes.SMALL)):
        calls[f"decode {shape}"] = partial(run_decode, shape)
        calls[f"decode {shape} paged"] = partial(run_decode, shape, shapes.PAGE_SIZE)
    for shape in losses.SHAPES:
        calls[f"loss {shape}"] = partial(run_loss, shape)
        calls[f"loss {shape} float32 weight"] = partial(run_loss, shape, weight_dtype=torch.float32)
        calls[f"token losses {shape}"] = partial(run_loss, shape, token_losses)
    return calls


# Addresses past 2^31 elements, one by one: rows, columns, tokens, slots, logits.
MAXIMAL = {
    "rms_norm": lambda: run_rows("rms_norm", (2**21 + 3, 1024)),
    "rms_norm wide": lambda: run_rows("rms_norm", (2**18 + 3, 16_384)),
    "add_rms_norm": lambda: run_rows("add_rms_norm", (2**21 + 3, 1024)),
    "swiglu": lambda: run_rows("swiglu", (2**18 + 3, 11_008)),
    "rope": lambda: run_rows("rope", (1030, 1024, 16, 16, 128)),
    "attention": lambda: run_attention((1030, 1024, 16, 16, 128)),
    "attention, narrow": lambda: run_attention((2060, 1024, 16, 4, 64)),
    "decode": lambda: run_decode((65, 2**15, 32, 8, 128)),
    "decode paged": lambda: run_decode((65, 2**15, 32, 8, 128), 64),
    "prompt": lambda: run_decode((65, 2**15, 32, 8, 128), tokens=2**14),
    "logits": lambda: run_one_chunk((2**14 + 128, 16, 2**17)),
    "dweight": lambda: run_loss((2048, 8200, 262_144)),
}


# With that many processors a program has one tile, and the last program the last one.
@pytest.mark.parametrize("processors", [2**20, pytest.param(132, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", MAXIMAL)
def test_addresses_past_two_to_the_31_elements(name, processors, launches, monkeypatch):
    monkeypatch.setattr(launches_without_gpu.H200, "multi_processor_count", processors)
    MAXIMAL[name]()
    assert launches.made


@pytest.mark.soak
def test_benchmarks(launches):
    for name, call in benchmarks().items():
        launches.made.clear()
        call()
        assert launches.made, name


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
def test_correctness_cases(dtype, launches):
    correctness = module("correctness")
    for operator in set(correctness.OPERATORS) - {"adamw", "lora_linear"}:
        with unset_fake_temporarily():  # documents are read when the plan is made
            cases = list(correctness.OPERATORS[operator]())
        for case in cases:
            correctness.measure.results_and_gradients(case.ours, case.make(dtype))


# --- planted faults ---


@triton.jit
def rows_in_32_bits(x_ptr, stride, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + rows * stride, 0.0, mask=rows < N)


@triton.jit
def one_row_too_many(x_ptr, stride, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + rows * stride, 0.0, mask=rows <= N)


@triton.jit
def described(x_source, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(y_ptr + offsets, x_source.load([0, 0]))


def test_right_launches_pass(launches):
    x = torch.empty(1000, 64)
    one_row_too_many[(8,)](x, 64, 999, BLOCK=128, num_warps=4)
    described[(1,)](TensorDescriptor(x, [1000, 64], [64, 1], [16, 64]), x, ROWS=16, COLUMNS=64)
    assert launches.made == [("one_row_too_many", (8, 1, 1)), ("described", (1, 1, 1))]


def test_offsets_of_32_bits_overflow(launches):
    with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
        rows_in_32_bits[(2**15,)](torch.empty(2**22, 1024), 1024, 2**22, BLOCK=128)


def test_a_row_too_many_is_noticed_at_any_size(launches):
    N = 2**22 + 5
    with pytest.raises(Exception, match=r"program \(32768, 0, 0\): writes to x_ptr at byte 17179889664"):
        one_row_too_many[(2**15 + 1,)](torch.empty(N, 1024), 1024, N, BLOCK=128)


@pytest.mark.parametrize(
    ("grid", "arguments", "message"),
    [
        ((0,), {"N": 5}, r"grid \(0, 1, 1\)"),
        ((2**31,), {"N": 5}, r"grid \(2147483648, 1, 1\)"),
        ((1, 65_536), {"N": 5}, r"grid \(1, 65536, 1\)"),
        ((2**20, 2**12), {"N": 5}, "too many programs"),
        ((1,), {}, "missing"),
        ((1,), {"N": None}, "None|unsupported"),
        ((1,), {"N": 5, "num_wraps": 4}, "num_wraps was specified but unrecognised"),
        ((1,), {"N": 2**64}, "int|large"),
    ],
    ids=["no programs", "x", "y", "product", "unbound", "None", "unknown option", "too large"],
)
def test_what_a_gpu_would_refuse(grid, arguments, message, launches):
    with pytest.raises(Exception, match=message):
        one_row_too_many[grid](torch.empty(8, 64), 64, BLOCK=8, **arguments)


@pytest.mark.parametrize(
    ("shape", "strides", "box", "offset", "message"),
    [
        ((16, 64), (64, 1), [16, 4], 0, "inner box"),
        ((1024, 64), (64, 1), [512, 64], 0, r"box \[512, 64\]"),
        ((16, 64), (2**39, 1), [16, 64], 0, "strides"),
        ((16, 64), (0, 1), [16, 64], 0, "strides"),
        ((16, 64), (64, 1), [16, 64], 1, "the base is not aligned"),
    ],
    ids=["inner box", "box", "stride", "no stride", "base"],
)
def test_rules_of_descriptors(shape, strides, box, offset, message, launches):
    base = torch.empty(2048 * 64, dtype=BFLOAT16)[offset:]
    with pytest.raises(AssertionError, match=message):
        launches_without_gpu.check_descriptor("x", TensorDescriptor(base, list(shape), list(strides), box))


def test_every_launch_that_is_made_is_made_here(launches):
    """One small call of each operator launches all kernels that there are."""
    for name, shape in (("rms_norm", (9, 96)), ("rms_norm", (3, 9000)), ("add_rms_norm", (9, 96)),
                        ("swiglu", (9, 96)), ("rope", (1, 9, 4, 2, 64))):  # fmt: skip
        run_rows(name, shape)
    run_attention((1, 9, 4, 2, 64))
    run_decode((1, 4096, 8, 2, 64))
    run_loss((9, 64, 333))
    kernels = {
        value.__name__
        for name in ("rms_norm", "swiglu", "rope", "attention", "decode_attention", "linear_cross_entropy")
        for value in vars(module(f"lumi.kernels.{name}")).values()
        if getattr(value, "__name__", "").endswith("_kernel")
    }
    assert {name for name, _ in launches.made} == kernels
