import itertools
import math

import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.attention import _attention_backward_op, _attention_op, attention, attention_reference
from lumi.kernels.attention_plan import attention_plan, attention_plan_reference
from lumi.kernels.attention_tiles import architecture, table


def naive(q, k, v, cu_seqlens, window=None):
    """Document by document, head by head, token by token, in float64. Shares nothing with the code under
    test."""
    B, T, H, K = q.shape
    G = k.shape[2]
    q, k, v = (t.reshape(B * T, -1, K) for t in (q, k, v))
    rows = [[torch.zeros(K, dtype=q.dtype)] * H for _ in range(B * T)]
    for start, end in itertools.pairwise(cu_seqlens):
        for t, h in itertools.product(range(start, end), range(H)):
            g = h * G // H
            first = start if window is None else max(start, t - window + 1)
            scores = torch.stack([q[t, h].dot(k[s, g]) / math.sqrt(K) for s in range(first, t + 1)])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            rows[t][h] = sum(weight * v[first + i, g] for i, weight in enumerate(weights))
    return torch.stack([torch.stack(row) for row in rows]).view(B, T, H, K)


def run(function, q, k, v, dy):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    y = function(q, k, v)
    return y, *torch.autograd.grad(y, (q, k, v), dy)


def inputs(B, T, H, G, K, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, K, dtype=dtype) for heads in (H, G, G, H)]


DOCUMENTS = {
    "one document a row": [0, 9, 18],
    "several": [0, 4, 9, 12, 18],
    "length one": [0, 1, 2, 8, 9, 17, 18],
    "empty": [0, 0, 4, 4, 4, 9, 9, 18, 18],
    "each token alone": list(range(19)),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["gqa1", "gqa2", "gqa4"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_matches_a_loop_over_documents(documents, heads):
    q, k, v, dy = inputs(2, 9, *heads, 4)
    plan = attention_plan_reference(torch.tensor(documents, dtype=torch.int32), 2, 9, "cpu")
    actual = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    expected = run(lambda q, k, v: naive(q, k, v, documents), q, k, v, dy)
    for name, a, e in zip(("y", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("documents", [None, [0, 4, 9, 12, 18]], ids=["rows", "several"])
def test_windows_match_the_loop(documents, window):
    q, k, v, dy = inputs(2, 9, 4, 2, 4)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    plan = attention_plan_reference(cu_seqlens, 2, 9, "cpu", window)
    actual = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    expected = run(lambda q, k, v: naive(q, k, v, documents or [0, 9, 18], window), q, k, v, dy)
    for name, a, e in zip(("y", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=["gqa1", "gqa4"])
def test_no_documents_means_causal_rows(heads):
    q, k, v, dy = inputs(2, 9, *heads, 4)
    results = []
    for cu_seqlens in (None, torch.tensor([0, 9, 18], dtype=torch.int32)):
        plan = attention_plan_reference(cu_seqlens, 2, 9, "cpu")
        results.append(run(lambda q, k, v, plan=plan: attention_reference(q, k, v, plan), q, k, v, dy))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0][0], naive(q, k, v, [0, 9, 18]), rtol=1e-12, atol=1e-14)


def test_packed_equals_separate():
    """Three documents in one row give what each gives in a row of its own, gradients too."""
    q, k, v, dy = inputs(1, 30, 4, 2, 8)
    offsets = [0, 11, 12, 30]
    plan = attention_plan_reference(torch.tensor(offsets, dtype=torch.int32), 1, 30, "cpu")
    packed = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    pieces = []
    for start, end in itertools.pairwise(offsets):
        alone = attention_plan_reference(None, 1, end - start, "cpu")
        tensors = (t[:, start:end] for t in (q, k, v, dy))
        pieces.append(run(lambda q, k, v, alone=alone: attention_reference(q, k, v, alone), *tensors))
    for a, b in zip(packed, (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_another_document_cannot_be_felt():
    """Not even as NaN's neighbour: a finite change of one document leaves the others' bits alone."""
    q, k, v, _ = inputs(1, 12, 2, 2, 4, torch.float32)
    plan = attention_plan_reference(torch.tensor([0, 5, 12], dtype=torch.int32), 1, 12, "cpu")
    before = attention_reference(q, k, v, plan)
    k[:, :5] += 100
    v[:, :5] -= 100
    assert torch.equal(attention_reference(q, k, v, plan)[:, 5:], before[:, 5:])
    assert not torch.equal(attention_reference(q, k, v, plan)[:, :5], before[:, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_good_as_plain_torch(dtype):
    """Softmax is float32 inside: no worse than twice the same formula written out in the dtype."""
    q, k, v, dy = (t.to(dtype) for t in inputs(2, 33, 4, 2, 16))
    causal = torch.ones(33, 33, dtype=torch.bool).tril()

    def written_out(q, k, v):
        k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
        scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
        return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~causal, -torch.inf).softmax(-1), v)

    plan = attention_plan_reference(None, 2, 33, "cpu")
    actual = run(lambda q, k, v: attention_reference(q, k, v, plan), q, k, v, dy)
    same_dtype = run(written_out, q, k, v, dy)
    exact = run(written_out, q.double(), k.double(), v.double(), dy.double())
    for name, a, s, e in zip(("y", "dq", "dk", "dv"), actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


def test_rejects_shapes_that_do_not_fit():
    q, k, v, _ = inputs(2, 9, 4, 3, 4)
    plan = attention_plan_reference(None, 2, 9, "cpu")
    with pytest.raises(ValueError, match="query heads must be a multiple of kv heads, got 4 and 3"):
        attention_reference(q, k, v, plan)
    with pytest.raises(ValueError, match="k and v must have shape"):
        attention_reference(q, k, v[:, :8], plan)
    with pytest.raises(ValueError, match=r"plan's batch and length \(2, 9\), got \(2, 8\)"):
        attention_reference(q[:, :8], k[:, :8], v[:, :8], plan)


# --- the Triton kernels ---

NAMES = ("y", "dq", "dk", "dv")


def written_out(q, k, v, dy, seen):
    """The equations of the module's docstring over all tokens at once, (N, heads, K) each; `seen` (N, N).

    It rounds as the kernels do, in q's dtype: products of that dtype are exact in float32, p and dz are
    rounded to it. In float64 it is the truth.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group, root = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[2])
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    product = lambda equation, *tensors: torch.einsum(equation, *(t.to(q.dtype).to(wide) for t in tensors))
    z = product("thk,shk->hts", q, k) * root
    lse = z.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
    p = (z - lse).exp().masked_fill(~seen, 0)
    y = product("hts,shk->thk", p, v)
    delta = (dy.to(wide) * y.to(q.dtype)).sum(-1).T[..., None]
    dz = p * (product("thk,shk->hts", dy, v) - delta) * root
    dq, dk = product("hts,shk->thk", dz, k), product("hts,thk->shk", dz, q)
    dv = product("hts,thk->shk", p, dy)
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    return [t.to(q.dtype) for t in (y, dq, dk, dv)]


def visible(offsets, window):
    """(N, N) bool from a list of offsets."""
    position = torch.arange(offsets[-1])
    document = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(itertools.pairwise(offsets))])
    distance = position[:, None] - position
    return (document[:, None] == document) & (distance >= 0) & (distance < (window or offsets[-1]))


def assert_all_parity(dtype, device, B, T, H, G, K, offsets=None, window=None, view=lambda t: t, names=NAMES):
    torch.manual_seed(0)
    tensors = [view(torch.randn(B, T, heads, K, device=device).to(dtype)) for heads in (H, G, G, H)]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device)
    plan = attention_plan(cu_seqlens, B, T, device, window)
    before = [t.clone() for t in tensors]
    actual = run(lambda q, k, v: attention(q, k, v, plan), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    seen = visible(offsets or list(range(0, B * T + 1, T)), window).to(device)
    same_dtype, exact = (
        written_out(*(t.flatten(0, 1).to(wide) for t in tensors), seen) for wide in (dtype, torch.float64)
    )
    for name, a, s, e in zip(NAMES, actual, same_dtype, exact, strict=True):
        if name in names:
            assert_parity(name, a.detach().flatten(0, 1), s, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 96, 128])
@pytest.mark.parametrize(
    ("T", "group"),
    [
        (17, 4),
        (65, 2),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in ((63, 4), (64, 1), (129, 4))),
    ],
)
def test_parity(T, group, K, dtype, device):
    assert_all_parity(dtype, device, 1, T, group, 1, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 96, 128])
def test_one_token_attends_to_itself(K, dtype, device):
    """Its weight is 1 whatever its score; dz is the difference of two equal sums of K products, each summed
    in an order of its own."""
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 1, 1, 1, K, device=device).to(dtype)
    y, dq, dk, dv = run(lambda q, k, v: attention(q, k, v, attention_plan(None, 1, 1, device)), q, k, v, dy)
    # In 16 bits the weight, 1 but for its last bits, is 1.
    ulps = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
    assert ((y - v).abs() <= ulps * v.abs()).all()
    assert ((dv - dy).abs() <= ulps * dy.abs()).all()
    dz = 2 * K * torch.finfo(torch.float32).eps * (dy * v).double().abs().sum() / math.sqrt(K)
    assert (dq.abs() <= dz * k.abs()).all()
    assert (dk.abs() <= dz * q.abs()).all()


SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "DESCRIPTORS": False}
SMALL_TILES = {
    "square": SMALL,
    "wide": {**SMALL, "BLOCK_N": 32},
    "tall": {**SMALL, "BLOCK_M": 64},
    "descriptors": {**SMALL, "BLOCK_M": 32, "DESCRIPTORS": True},
}


@pytest.fixture(params=["wide", "tall", "descriptors", pytest.param("square", marks=pytest.mark.soak)])
def small_tiles(request, monkeypatch):
    """Tiles so small that a short text has full ones, diagonal ones, and ones that a document or a window
    begins or ends in."""
    chosen = {"BLOCK_K": 16, **SMALL_TILES[request.param]}
    delta = {"BLOCK_M": 32, "BLOCK_K": 16, "num_warps": 4}
    monkeypatch.setattr(
        "lumi.kernels.attention.tile", lambda kernel, *_: dict(delta if kernel == "delta" else chosen)
    )


MANY = {
    "documents": (2, 40, [0, 1, 1, 25, 40, 79, 80], None),
    "many tokens alone": (1, 40, [*range(20), 40], None),
    "window and documents": (1, 90, [0, 0, 70, 71, 90, 90], 40),
    "rows": (2, 50, None, None),
    "short window": (1, 60, None, 5),
    "window of everything": (1, 40, None, 1000),
}


# Together the first three have every kind of tile.
@pytest.mark.parametrize(
    "case",
    [*list(MANY)[:3], *(pytest.param(name, marks=pytest.mark.soak) for name in list(MANY)[3:])],
)
def test_parity_over_many_tiles(case, small_tiles, device):
    B, T, offsets, window = MANY[case]
    assert_all_parity(torch.float32, device, B, T, 2, 1, 16, offsets, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param([0, 0, 140, 140], id="one and empty", marks=pytest.mark.soak),
        pytest.param([0, 63, 64, 65, 129, 140], id="many"),
    ],
)
def test_parity_of_documents(offsets, dtype, device):
    assert_all_parity(dtype, device, 1, 140, 2, 1, 64, offsets)


@pytest.mark.parametrize("K", [1, 8, 24, 80])
def test_other_head_dims(K, device):
    assert_all_parity(torch.float32, device, 1, 33, 2, 2, K)


# The interpreter's numpy warns; a mask then chooses zero.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_large_scores_do_not_overflow(device):
    """Scores of some hundreds, whose powers no float holds: only differences within a row are raised.
    (Backward takes them from the saved sum of the row, whose own rounding grows with the scores.)"""
    assert_all_parity(torch.float32, device, 1, 65, 1, 1, 64, view=lambda t: 6 * t, names=("y",))
    assert_all_parity(torch.float32, device, 1, 65, 1, 1, 64, view=lambda t: 2 * t)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # heads outermost
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],  # a slice of a wider projection
        lambda t: t.mT.contiguous().mT,  # no unit stride
        lambda t: t[:, :1].expand(t.shape),
        lambda t: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t),  # not 16-byte aligned
    ],
    ids=["heads first", "slice", "transposed", "stride 0", "unaligned"],
)
def test_strides_are_respected(view, device):
    assert_all_parity(torch.float16, device, 2, 70, 2, 1, 64, view=view)


def test_a_document_is_what_it_is_alone(device):
    """Bit for bit the same wherever it stands in a tile, as long as no tile boundary moves in it."""
    q, k, v, dy = (t.to(device) for t in inputs(1, 256, 1, 1, 64, torch.float16))
    together = attention_plan(torch.tensor([0, 128, 256], dtype=torch.int32), 1, 256, device)
    alone = attention_plan(None, 1, 128, device)
    packed = run(lambda q, k, v: attention(q, k, v, together), q, k, v, dy)
    for start in (0, 128):
        tensors = (t[:, start : start + 128] for t in (q, k, v, dy))
        for a, b in zip(packed, run(lambda q, k, v: attention(q, k, v, alone), *tensors), strict=True):
            assert torch.equal(a[:, start : start + 128], b)


def test_twice_the_same(device):
    q, k, v, dy = (t.to(device) for t in inputs(2, 100, 4, 2, 64, torch.float16))
    plan = attention_plan(torch.tensor([0, 30, 100, 200], dtype=torch.int32, device=device), 2, 100, device)
    first, second = (run(lambda q, k, v: attention(q, k, v, plan), q, k, v, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("T", [1, 127, 128, 129])
def test_what_is_kept_of_a_row_is_padded_with_numbers(T, device):
    """The kernels read the padding and drop it; a NaN would not be dropped from a product with zero."""
    q, k, v, _ = (t.to(device) for t in inputs(1, T, 2, 1, 16, torch.float32))
    plan = attention_plan(None, 1, T, device)
    _, lse = _attention_op(q, k, v, plan.first_key, plan.last_query, plan.query_order, plan.key_order)
    assert lse.shape == (2, 256 if T == 129 else 128)
    assert lse.isfinite().all()
    scores = torch.einsum("thk,shk->hts", q.double()[0], k.double()[0].expand(-1, 2, -1)) / math.sqrt(16)
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(lse[:, :T], expected.float(), rtol=1e-5, atol=1e-5)


def operator_inputs(device, requires_grad):
    plan = attention_plan(None, 2, 9, device, 4)
    q, k, v, _ = (t.to(device).requires_grad_(requires_grad) for t in inputs(2, 9, 2, 1, 16, torch.float32))
    return q, k, v, plan.first_key, plan.last_query, plan.query_order, plan.key_order


def test_operator_is_registered_whole(device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the kernels do."""
    torch.library.opcheck(_attention_op.opaque, operator_inputs(device, True))
    q, k, v, *plan = operator_inputs(device, False)
    y, lse = _attention_op(q, k, v, *plan)
    torch.library.opcheck(_attention_backward_op.opaque, (torch.randn_like(y), q, k, v, y, lse, *plan))


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_checkpointed_and_compiled_it_is_the_same(how, device):
    q, k, v, dy = (t.to(device) for t in inputs(1, 40, 2, 1, 16, torch.float32))
    plan = attention_plan(torch.tensor([0, 13, 40], dtype=torch.int32), 1, 40, device)
    plain = lambda q, k, v: attention(q, k, v, plan)
    wrapped = {
        "checkpointed": lambda q, k, v: torch.utils.checkpoint.checkpoint(
            plain, q, k, v, use_reentrant=False
        ),
        "compiled": torch.compile(plain, fullgraph=True, backend="aot_eager"),
    }[how]
    assert all(
        torch.equal(a, b) for a, b in zip(run(wrapped, q, k, v, dy), run(plain, q, k, v, dy), strict=True)
    )


def test_no_tokens(device):
    q, k, v = (torch.zeros(0, 5, heads, 16, device=device, requires_grad=True) for heads in (2, 1, 1))
    attention(q, k, v, attention_plan(None, 0, 5, device)).sum().backward()
    assert q.grad.shape == (0, 5, 2, 16)


def test_refuses(device):
    q, k, v = (torch.zeros(1, 8, 2, 16, device=device) for _ in range(3))
    plan = attention_plan(None, 1, 8, device)
    for bad, message in (
        (
            (q.double(), k.double(), v.double()),
            "q, k and v must all be float32, bfloat16 or float16, got torch.float64, torch.float64",
        ),
        ((q, k.half(), v), "q, k and v must all be .* got torch.float32, torch.float16 and torch.float32"),
        ((q, k, v.to("meta")), "v must be on the device of q, .*, got meta"),
        (
            (torch.zeros(1, 8, 2, 136, device=device),) * 3,
            'head_dim must be at most 128 for this kernel, got 136; "kernels": "reference"',
        ),
        ((q[:, :7], k[:, :7], v[:, :7]), r"plan's batch and length \(1, 8\), got \(1, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*bad, plan)
    for bad in ((q[0], k, v), (q, k[0], v)):
        with pytest.raises(
            ValueError, match=r"q and k must have shapes \(B, T, H, K\) and \(B, T, G, K\), got"
        ):
            attention(*bad, plan)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "arch",
    [
        arch
        for arch in table()
        if torch.cuda.is_available() and int(arch) <= architecture(torch.device("cuda"))
    ],
)
@pytest.mark.parametrize("K", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_shipped_tile(arch, K, dtype, device, monkeypatch):
    """Of this architecture and those before it; long enough that each kind of tile is there; twice for
    equality."""
    monkeypatch.setattr("lumi.kernels.attention.architecture", lambda _: int(arch))
    for offsets, window in (([0, 1, 700, 1500], None), (None, 300)):
        assert_all_parity(dtype, device, 1, 1500, 4, 2, K, offsets, window)
        q, k, v, dy = (torch.randn(1, 1500, heads, K, device=device).to(dtype) for heads in (4, 2, 2, 4))
        plan = attention_plan(None, 1, 1500, device, window)
        first, second = (
            run(lambda q, k, v, plan=plan: attention(q, k, v, plan), q, k, v, dy) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_tokens_past_two_to_the_31_elements():
    """Addresses of the last tokens do not fit 32 bits."""
    T, count = 1024, 1030
    q, k, v, dy = (torch.zeros(count, T, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    v[-1, -1], dy[-1, -1] = 1024, 1024
    assert v.numel() > 2**31
    y, dq, dk, dv = run(
        lambda q, k, v: attention(q, k, v, attention_plan(None, count, T, "cuda")), q, k, v, dy
    )
    assert torch.equal(y[-1, -1], torch.ones_like(y[-1, -1]))
    assert torch.equal(
        dv[-1], torch.ones_like(dv[-1])
    )  # all keys of the last row share the last query's gradient
    assert not any(t[:-1].any() for t in (y, dv))
    assert not dq.any()
    assert not dk.any()
