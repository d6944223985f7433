"""The operators for CPUs (csrc/cpu), under each set of instructions that this processor has.

The truth is the reference in float64, and the bound twice the reference's own error in the dtype under test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from parity import assert_parity

from lumi import _csrc
from lumi.kernels.add_rms_norm import _add_rms_norm_backward_op, _add_rms_norm_op
from lumi.kernels.attention import _attention_backward_op, _attention_op
from lumi.kernels.bundle import NATIVE, REFERENCE, TRITON
from lumi.kernels.decode_attention import _decode_attention_op
from lumi.kernels.linear_cross_entropy import (
    NATIVE_LOGITS,
    NATIVE_MIN_ROWS,
    _linear_cross_entropy_op,
    native_chunk_rows,
)
from lumi.kernels.rms_norm import _rms_norm_backward_op, _rms_norm_op
from lumi.kernels.rope import _rope_op, rope_table
from lumi.kernels.swiglu import _swiglu_backward_op, _swiglu_op

pytestmark = [
    pytest.mark.skipif(not _csrc.cpu_targets, reason="Lumi was built without csrc/cpu"),
    pytest.mark.usefixtures("cpu_target"),
]
DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Case:
    """An operator of a bundle as a function of its differentiable inputs, and the shapes of these."""

    call: Callable
    shapes: list[tuple[int, ...]]
    scale: float = 1.0

    def inputs(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [self.scale * torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes]

    def results(self, ops, inputs, incoming=None):
        """Outputs and the gradients of all inputs."""
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = self.call(ops, *leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if incoming is None:
            generator = torch.Generator().manual_seed(9)
            incoming = [torch.randn(t.shape, generator=generator).to(inputs[0].dtype) for t in outputs]
        incoming = [d.to(t.dtype) for d, t in zip(incoming, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def norm(*shape):
    return Case(lambda ops, x, weight: ops.rms_norm(x, weight), [shape, shape[-1:]])


def add_norm(*shape):
    return Case(lambda ops, *tensors: ops.add_rms_norm(*tensors), [shape, shape, shape[-1:]])


def gated(*shape, scale=3.0):
    return Case(lambda ops, gate, up: ops.swiglu(gate, up), [shape, shape], scale)


def rotated(B, T, H, G, K):
    tables = rope_table(torch.randint(0, 5000, (B, T), generator=torch.Generator().manual_seed(1)), K, 1e4)
    return Case(lambda ops, q, k: ops.rope(q, k, *tables), [(B, T, H, K), (B, T, G, K)])


def attended(B, T, H, G, K, offsets=None, window=None):
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    plans = {ops: ops.attention_plan(cu_seqlens, B, T, "cpu", window) for ops in (NATIVE, REFERENCE)}
    return Case(
        lambda ops, *heads: ops.attention(*heads, plans[ops]), [(B, T, H, K), (B, T, G, K), (B, T, G, K)]
    )


def loss(N, D, V, ignored=3, z_loss=0.0, expected_dloss=1.0):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    targets[:: ignored or N + 1] = -100
    call = lambda ops, hidden, weight: ops.linear_cross_entropy(
        hidden, weight, targets, z_loss, expected_dloss
    )
    return Case(call, [(N, D), (V, D)])


Case.__hash__ = object.__hash__
CASES = {
    "norm": norm(7, 33),
    "norm of many rows": norm(3, 90, 256),
    "norm of one column": norm(5, 1),
    "norm of heads": norm(2, 5, 3, 16),
    "sum and norm": add_norm(130, 100),
    "sum and norm of a wide row": add_norm(3, 16_384),
    "swiglu": gated(9, 257),
    "swiglu of many rows": gated(70, 512),
    "swiglu far from one": gated(4, 64, scale=60.0),
    "swiglu near zero": gated(4, 64, scale=1e-4),
    "rope": rotated(2, 17, 4, 2, 64),
    "rope of odd halves": rotated(1, 5, 3, 1, 6),
    "attention": attended(2, 70, 2, 2, 64),
    "attention of few tokens": attended(3, 2, 2, 1, 8),
    "attention to documents": attended(1, 200, 4, 2, 32, [0, 3, 70, 70, 71, 200]),
    "attention with a window": attended(2, 130, 4, 4, 36, None, 20),
    "attention to documents with a window": attended(2, 96, 2, 1, 128, [0, 50, 96, 100, 192], 33),
    "attention to blocks of queries": attended(1, 1100, 1, 1, 16),
    "loss": loss(37, 24, 100),
    "loss of several chunks": loss(2 * NATIVE_MIN_ROWS + 5, 8, NATIVE_LOGITS[4] // NATIVE_MIN_ROWS, 0),
    "loss with its options": loss(20, 16, 333, 2, 1e-2, 0.25),
    "loss of one word": loss(5, 4, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, dtype):
    case = CASES[name]
    inputs = case.inputs(dtype)
    exact = case.results(REFERENCE, [t.double() for t in inputs])
    same_dtype, actual = (case.results(ops, inputs) for ops in (REFERENCE, NATIVE))
    for index, results in enumerate(zip(actual, same_dtype, exact, strict=True)):
        assert_parity(f"{name}, result {index}", *results)


ONE_OF_EACH = ["norm", "sum and norm", "swiglu", "rope", "attention to documents", "loss"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_strides_are_respected(name, dtype):
    case = CASES[name]
    inputs = case.inputs(dtype)
    incoming = [torch.randn_like(t) for t in case.results(NATIVE, inputs)[: -len(inputs)]]
    views = [
        lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        lambda t: torch.cat((t, torch.full_like(t, torch.nan)), dim=-1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    ]
    plain = case.results(NATIVE, inputs, incoming)
    for view in views:
        strided = case.results(
            NATIVE, [view(t) for t in inputs], [view(t) if t.ndim else t for t in incoming]
        )
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "norm of many rows", "attention to blocks of queries"])
def test_the_number_of_threads_changes_no_bit(name, dtype):
    case = CASES[name]
    inputs = case.inputs(dtype)
    one = case.results(NATIVE, inputs)
    try:
        torch.set_num_threads(2)
        two = case.results(NATIVE, inputs)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_inputs_and_incoming_gradients_are_left_alone(name):
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    incoming = [torch.randn_like(t) for t in case.results(NATIVE, inputs)[: -len(inputs)]]
    before = [t.clone() for t in (*inputs, *incoming)]
    case.results(NATIVE, inputs, incoming)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, *incoming), before, strict=True))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_without_gradients_it_is_the_same(name):
    """Then the operators are called past torch's dispatcher."""
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    with torch.inference_mode():
        direct = case.call(NATIVE, *inputs)
    direct = direct if isinstance(direct, tuple) else (direct,)
    assert all(torch.equal(a, b) for a, b in zip(direct, case.results(NATIVE, inputs), strict=False))


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda call: lambda *args: torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False),
        lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
    ],
    ids=["checkpointed", "compiled"],
)
def test_checkpointed_and_compiled_it_is_the_same(wrap, name):
    torch.compiler.reset()
    case = CASES[name]
    inputs = case.inputs(torch.float32)
    other = Case(lambda ops, *args: wrap(lambda *args: case.call(ops, *args))(*args), case.shapes)
    pairs = zip(other.results(NATIVE, inputs), case.results(NATIVE, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_operators_are_registered_whole():
    """Schema, fake tensors, autograd and AOT dispatch agree with what the operators do."""
    check = torch.library.opcheck
    x, y = (torch.randn(2, 3, 40, requires_grad=True) for _ in range(2))
    weight, rstd = torch.randn(40, requires_grad=True), torch.rand(6)
    check(_rms_norm_op.opaque, (x, weight, 1e-5, True))
    check(_add_rms_norm_op.opaque, (x, y, weight, 1e-5, True))
    check(_swiglu_op.opaque, (x, y, True))
    q, k = torch.randn(2, 9, 4, 16, requires_grad=True), torch.randn(2, 9, 2, 16, requires_grad=True)
    check(_rope_op.opaque, (q, k, *rope_table(torch.arange(9).expand(2, 9), 16, 1e4), 1, True))
    plan = NATIVE.attention_plan(None, 2, 9, "cpu")
    plan = (plan.first_key, plan.last_query, plan.query_order, plan.key_order)
    check(_attention_op.opaque, (q, k, k.detach().clone().requires_grad_(), *plan, True))
    targets = torch.tensor([3, -100, 0, 5, 1, 1])
    case = (x.flatten(0, 1), y.flatten(0, 1), targets, 0.0, 1.0, True, True, True)
    # The rest is left to the test under torch.compile, as in test_linear_cross_entropy.py.
    check(_linear_cross_entropy_op, case, test_utils=("test_schema", "test_faketensor"))
    plain = [t.detach() for t in (x, y, weight, q, k)]
    x, y, weight, q, k = plain
    check(_rms_norm_backward_op.opaque, (y, x, weight, rstd, True))
    check(_add_rms_norm_backward_op.opaque, (y, y, x, weight, rstd, True))
    check(_swiglu_backward_op.opaque, (x, x, y, True))
    lse = torch.zeros(4, 18)
    check(_attention_backward_op.opaque, (q, q, k, k, q, lse, *plan, True))
    check(_decode_attention_op.opaque, (q, k, k, torch.arange(9).expand(2, 9), None, 4, True))


@pytest.mark.parametrize("name", ["norm", "sum and norm", "swiglu", "rope", "attention", "loss"])
def test_no_rows(name):
    case = CASES[name]
    empty = Case(
        {
            "rope": lambda ops, q, k: ops.rope(q, k, *(torch.zeros(0, 17, 64) for _ in range(2))),
            "attention": lambda ops, *heads: ops.attention(*heads, ops.attention_plan(None, 0, 70, "cpu")),
            "loss": lambda ops, h, w: ops.linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.int64)),
        }.get(name, case.call),
        [(0, *shape[1:]) if len(shape) > 1 and (name, index) != ("loss", 1) else shape
         for index, shape in enumerate(case.shapes)],
    )  # fmt: skip
    inputs = empty.inputs(torch.float32)
    for actual, expected in zip(empty.results(NATIVE, inputs), empty.results(REFERENCE, inputs), strict=True):
        assert torch.equal(actual, expected)


# --- what is true of one operator ---


def test_a_gate_far_from_zero_does_not_overflow():
    gate = torch.tensor([-torch.inf, -1e4, -200.0, -90.0, 0.0, 200.0, 1e30, torch.nan])
    expected = REFERENCE.swiglu(gate, torch.ones(8))
    actual = NATIVE.swiglu(gate, torch.ones(8))
    assert torch.equal(actual[[1, 2, 4, 5, 6]], torch.tensor([0.0, 0.0, 0.0, 200.0, 1e30]))
    assert actual.isnan().tolist() == expected.isnan().tolist()


def test_exp_is_that_of_float64():
    """Through the sigmoid of SwiGLU, whose error is that of exp where exp is small: within 2 ulp."""
    x = torch.linspace(0, 85, 40_001)
    actual = NATIVE.swiglu(-x, torch.full_like(x, -1) / x.clamp(min=1e-3))[1:].double()
    exact = torch.sigmoid(-x.double())[1:] * (x / x.clamp(min=1e-3))[1:].double()
    assert ((actual / exact - 1).abs() < 4 * torch.finfo(torch.float32).eps).all()


def test_tiles_of_other_documents_are_not_touched():
    """NaN in one document reaches no other, forward or backward."""
    case = attended(1, 256, 2, 1, 32, [0, 64, 192, 256])
    q, k, v = case.inputs(torch.float32)
    for t in (q, k, v):
        t[:, 64:192] = torch.nan
    others = [*range(64), *range(192, 256)]
    assert all(t[:, others].isfinite().all() for t in case.results(NATIVE, [q, k, v]))


def test_a_plan_without_documents_is_one_of_rows():
    q, k, v = attended(3, 40, 2, 2, 16).inputs(torch.float32)
    whole = NATIVE.attention(q, k, v, NATIVE.attention_plan(None, 3, 40, "cpu"))
    for row in range(3):
        alone = NATIVE.attention(
            *(t[row : row + 1] for t in (q, k, v)), NATIVE.attention_plan(None, 1, 40, "cpu")
        )
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("ignored", [-100, 0], ids=["all", "none"])
def test_rows_without_a_target_cost_nothing_and_have_no_gradient(ignored):
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.full((30,), ignored)
    loss = NATIVE.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert (loss == 0, hidden.grad.any().item(), weight.grad.any().item()) == ((True,) + (False,) * 2
        if ignored else (False, True, True))  # fmt: skip


@pytest.mark.parametrize("target_id", [-1, 50, 2**40])
def test_a_target_out_of_range_is_refused(target_id):
    with pytest.raises(IndexError, match="targets must be below 50 or -100, got"):
        NATIVE.linear_cross_entropy(torch.randn(3, 8), torch.randn(50, 8), torch.tensor([0, target_id, -100]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_make_the_loss_nan(value):
    hidden = torch.randn(3, 8)
    hidden[1, 2] = value
    assert NATIVE.linear_cross_entropy(hidden, torch.randn(50, 8), torch.tensor([0, 1, 2])).isnan()


def test_logits_far_apart():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[-3e38], [3e38], [0.0]])
    assert NATIVE.linear_cross_entropy(hidden, weight, torch.tensor([1])) == 0
    assert NATIVE.linear_cross_entropy(hidden, weight, torch.tensor([0])).item() > 3e38


def test_another_gradient_than_expected_is_right_too():
    case = loss(40, 16, 60)
    inputs = case.inputs(torch.float32)
    exact = case.results(REFERENCE, [t.double() for t in inputs], [torch.tensor(0.3)])
    same_dtype, actual = (case.results(ops, inputs, [torch.tensor(0.3)]) for ops in (REFERENCE, NATIVE))
    for results in zip(actual, same_dtype, exact, strict=True):
        assert_parity("loss", *results)


def test_a_frozen_matrix_has_no_gradient():
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8)
    NATIVE.linear_cross_entropy(hidden, weight, torch.arange(30)).backward()
    expected = hidden.grad.clone()
    hidden.grad = None
    REFERENCE.linear_cross_entropy(hidden, weight, torch.arange(30)).backward()
    torch.testing.assert_close(expected, hidden.grad)


def test_chunks_are_few_and_alike():
    assert native_chunk_rows(4096, 32_768, 4) == 512
    assert native_chunk_rows(4096, 32_768, 2) == 2048
    assert native_chunk_rows(1025, 32_768, 4) == 342  # three of one size, not two of 512 and one of 1
    assert native_chunk_rows(0, 32_768, 4) == 1


# --- decoding: no gradient ---

DECODING = {
    "one token": (3, 1, 200, 6, 2, 48),
    "one token of many heads": (2, 1, 70, 20, 2, 64),
    "a prompt": (2, 40, 150, 4, 2, 64),
    "a long prompt": (1, 150, 170, 2, 2, 20),
}


def decoding(name, dtype, seed=0):
    """q, k, v and positions; slots past a row's positions are NaN."""
    B, T, S, H, G, K = DECODING[name]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, *size, K, generator=generator) for size in ((T, H), (S, G), (S, G)))
    positions = torch.randint(S - T + 1, (B, 1), generator=generator) + torch.arange(T)
    unused = torch.arange(S) > positions[:, -1:]
    return [
        q.to(dtype),
        *(t.masked_fill(unused[..., None, None], torch.nan).to(dtype) for t in (k, v)),
        positions,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODING)
def test_decoding_parity(name, dtype):
    q, k, v, positions = decoding(name, dtype)
    finite = [t.nan_to_num() for t in (q, k, v)]
    exact = REFERENCE.decode_attention(*(t.double() for t in finite), positions)
    same_dtype = REFERENCE.decode_attention(*finite, positions)
    assert_parity(name, NATIVE.decode_attention(q, k, v, positions), same_dtype, exact)


@pytest.mark.parametrize("name", DECODING)
def test_decoding_from_pages_and_strided_caches_is_the_same(name):
    q, k, v, positions = decoding(name, torch.float32)
    expected = NATIVE.decode_attention(q, k, v, positions)
    B, S = k.shape[:2]
    page_size, pages = 16, -(-S // 16)
    table = (
        torch.randperm(B * pages, generator=torch.Generator().manual_seed(3)).to(torch.int32).view(B, pages)
    )
    paged = []
    for cache in (k, v):
        cache = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, pages * page_size - S), value=torch.nan)
        holder = torch.empty(B * pages, page_size, *cache.shape[2:])
        holder[table.flatten().long()] = cache.unflatten(1, (pages, page_size)).flatten(0, 1)
        paged.append(holder)
    assert torch.equal(NATIVE.decode_attention(q, *paged, positions, table), expected)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(NATIVE.decode_attention(*swapped, positions.to(torch.int32)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 9, 64, 70, 400])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_parity_in_a_window(name, window, dtype):
    """Before the window of a row's first query is NaN."""
    q, k, v, positions = decoding(name, dtype)
    finite = [t.nan_to_num() for t in (q, k, v)]
    exact = REFERENCE.decode_attention(*(t.double() for t in finite), positions, None, window)
    same_dtype = REFERENCE.decode_attention(*finite, positions, None, window)
    before = torch.arange(k.shape[1]) <= positions[:, :1] - window
    k, v = (t.masked_fill(before[..., None, None], torch.nan) for t in (k, v))
    assert_parity(name, NATIVE.decode_attention(q, k, v, positions, None, window), same_dtype, exact)


def test_queries_of_one_row_may_have_windows_far_apart():
    q, k, v, _ = decoding("a prompt", torch.float32)
    k, v = k.nan_to_num(), v.nan_to_num()
    positions = torch.arange(40).expand(2, 40) * 3
    positions = torch.where(positions == 33, -1, positions)
    actual = NATIVE.decode_attention(q, k, v, positions, None, 10)
    expected = REFERENCE.decode_attention(q, k, v, positions, None, 10).nan_to_num()
    torch.testing.assert_close(actual, expected)
    assert not NATIVE.decode_attention(q, k, v, torch.full((2, 40), -5), None, 10).any()


def test_a_query_at_a_negative_position_sees_nothing():
    q, k, v, positions = decoding("a prompt", torch.float32)
    positions[0, :3] = -1
    assert not NATIVE.decode_attention(q, k, v, positions)[0, :3].any()
    assert not NATIVE.decode_attention(q[:, :1], k, v, torch.full((2, 1), -5)).any()


def test_a_prompt_is_attention():
    """Decoding all tokens of a row at once, under both."""
    q, k, v = attended(2, 90, 4, 2, 32).inputs(torch.float32)
    whole = NATIVE.attention(q, k, v, NATIVE.attention_plan(None, 2, 90, "cpu"))
    torch.testing.assert_close(NATIVE.decode_attention(q, k, v, torch.arange(90).expand(2, 90)), whole)


# --- what is refused ---


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 8).half(), torch.zeros(2, 8).double(), torch.zeros(2, 8, device="meta")], ids=str
)
def test_refuses_other_dtypes_and_devices(wrong):
    expected = "the operators for CPUs take tensors of float32 or of bfloat16 on the CPU, got"
    weight, heads = torch.zeros(8), wrong.view(1, 2, 1, 8)
    for call in (
        lambda: NATIVE.rms_norm(wrong, weight),
        lambda: NATIVE.add_rms_norm(wrong, wrong, weight),
        lambda: NATIVE.swiglu(wrong, wrong),
        lambda: NATIVE.rope(heads, heads, *rope_table(torch.zeros(1, 2, dtype=torch.int64), 8, 1e4)),
        lambda: NATIVE.attention(heads, heads, heads, NATIVE.attention_plan(None, 1, 2, "cpu")),
        lambda: NATIVE.decode_attention(heads, heads, heads, torch.zeros(1, 2, dtype=torch.int64)),
        lambda: NATIVE.linear_cross_entropy(wrong, torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_shapes_are_checked_as_those_of_the_other_operators():
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        NATIVE.rms_norm(torch.zeros(2, 8), torch.zeros(7))
    with pytest.raises(ValueError, match="residual must have shape"):
        NATIVE.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8))
    with pytest.raises(ValueError, match="up must have shape"):
        NATIVE.swiglu(torch.zeros(2, 8), torch.zeros(2, 9))
    with pytest.raises(ValueError, match="q must have the plan's batch and length"):
        NATIVE.attention(*[torch.zeros(1, 3, 1, 8)] * 3, NATIVE.attention_plan(None, 1, 2, "cpu"))


def test_the_bundles_share_what_is_one():
    assert NATIVE.attention_plan is TRITON.attention_plan
    assert NATIVE.lora_linear is TRITON.lora_linear
