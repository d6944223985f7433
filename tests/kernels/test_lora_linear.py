import pytest
import torch
from parity import assert_parity

from lumi.kernels.lora_linear import (
    _lora_linear_backward_op,
    _lora_linear_op,
    lora_linear,
    lora_linear_reference,
)

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
]  # all of it is torch's, so bfloat16 is right on the CPU as well
THREE = (40, 24, 24)  # output features, as of q, k and v


def truth(x, weights, As, Bs, scales):
    return [
        x @ (weight + scale * B @ A).T for weight, A, B, scale in zip(weights, As, Bs, scales, strict=True)
    ]  # the merged matrices


def draw(rows, width, outputs, device, dtype=torch.float32, ranks=None, adapters=None):
    """x, weights, As, Bs, scales and the gradients of the outputs; `rows` is a number or a shape."""
    lead = (rows,) if isinstance(rows, int) else rows
    ranks = ranks or [4] * len(outputs)
    x = torch.randn(*lead, width, device=device).to(dtype)
    weights = [(torch.randn(size, width, device=device) / width**0.5).to(dtype) for size in outputs]
    As = [(torch.randn(rank, width, device=device) / width**0.5).to(adapters or dtype) for rank in ranks]
    Bs = [
        (0.3 * torch.randn(size, rank, device=device)).to(adapters or dtype)
        for size, rank in zip(outputs, ranks, strict=True)
    ]
    dys = [torch.randn(*lead, size, device=device).to(dtype) for size in outputs]
    return x, weights, As, Bs, [1.7, 2.0, 0.3][: len(outputs)], dys


def run(function, x, weights, As, Bs, scales, dys, dtype=None):
    """Outputs and gradients, flat, by name."""
    cast = lambda tensors: [(t if dtype is None else t.to(dtype)).detach() for t in tensors]
    weights, dys = cast(weights), cast(dys)
    leaves = [t.requires_grad_() for t in cast([x, *As, *Bs])]
    x, As, Bs = leaves[0], leaves[1 : 1 + len(As)], leaves[1 + len(As) :]
    ys = function(x, weights, As, Bs, scales)
    gradients = torch.autograd.grad(ys, leaves, dys)
    count = range(len(ys))
    names = [f"y{i}" for i in count] + ["dx"] + [f"dA{i}" for i in count] + [f"dB{i}" for i in count]
    return dict(zip(names, [*ys, *gradients], strict=True))


def assert_all_parity(*cases):
    """Parity of everything over all cases together: the rounding error of a handful of numbers is luck, not a
    budget."""
    exact = [run(truth, *case, dtype=torch.float64) for case in cases]
    same_dtype, actual = (
        [run(function, *case) for case in cases] for function in (lora_linear_reference, lora_linear)
    )
    for name in exact[0]:
        assert_parity(
            name,
            *(torch.stack([result[name] for result in results]) for results in (actual, same_dtype, exact)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize(
    ("width", "outputs", "ranks"),
    [(32, THREE, None), (17, (5,), [3]), (65, (33, 33), [16, 1])],
    ids=["qkv", "one", "two"],
)
def test_parity(rows, width, outputs, ranks, dtype, device):
    torch.manual_seed(0)
    assert_all_parity(
        *(draw(rows, width, outputs, device, dtype, ranks) for _ in range(8 if rows == 1 else 3))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_get_float32_gradients(dtype, device):
    torch.manual_seed(0)
    case = draw((3, 21), 32, THREE, device, dtype, adapters=torch.float32)
    assert_all_parity(case)
    result = run(lora_linear, *case)
    assert {name: t.dtype for name, t in result.items() if name[0] == "y" or name == "dx"} == dict.fromkeys(
        ("y0", "y1", "y2", "dx"), dtype
    )
    assert all(t.dtype == torch.float32 for name, t in result.items() if name.startswith(("dA", "dB")))


@pytest.mark.parametrize(
    ("dtype", "base"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_weights_of_another_dtype_are_cast(dtype, base, device):
    torch.manual_seed(0)
    x, weights, *rest = draw(33, 32, THREE, device, dtype)
    rounded = [weight.to(base).to(dtype) for weight in weights]
    ours, expected = (
        run(lora_linear, x, [w.to(base) for w in weights], *rest),
        run(lora_linear, x, rounded, *rest),
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 3:19],  # rows of a wider matrix
        lambda t: t[::3, :16],  # every third row
        lambda t: t[:, :16].T,  # columns
        lambda t: t[:1, :16].expand(6, -1),  # one row, six times
        lambda t: t.view(24, 2, 16)[:, 1:].transpose(
            0, 1
        ),  # leading dimensions that no single stride can walk
    ],
    ids=["slice", "rows", "transposed", "stride-0-rows", "permuted"],
)
def test_strides_are_respected(view, device):
    torch.manual_seed(0)
    x = view(torch.randn(24, 32, device=device))
    assert not x.is_contiguous()
    _, weights, As, Bs, scales, _ = draw(1, x.shape[-1], (x.shape[-1],) * 2, device)
    dys = [view(torch.randn(24, 32, device=device)) for _ in range(2)]
    assert_all_parity(
        (x, weights, As, Bs, scales, dys),
        (
            x,
            [weight.T for weight in weights],
            [A.T.contiguous().T for A in As],
            [B.T.contiguous().T for B in Bs],
            scales,
            dys,
        ),
    )


def test_inputs_and_incoming_gradients_are_left_alone(device):
    x, weights, As, Bs, scales, dys = draw((2, 9), 32, THREE, device)
    tensors = [x, *weights, *As, *Bs, *dys]
    before = [t.clone() for t in tensors]
    run(lora_linear, x, weights, As, Bs, scales, dys)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_only_the_input_and_the_low_rank_product_are_kept(device):
    """Besides the matrices, for which nothing is copied where no cast is needed."""
    x, weights, As, Bs, scales, _ = draw((2, 9), 32, THREE, device)
    leaves = [t.requires_grad_() for t in (x, *As, *Bs)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weights, leaves[1:4], leaves[4:], scales)
    activations = [tuple(t.shape) for t in saved if t.shape[0] in (2, 18)]
    assert activations == [(2, 9, 32), (18, 12)]
    own = {t.data_ptr() for t in (x, *weights, *Bs)}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in own) == [
        (12, 32),
        (18, 12),
    ]  # the joined A's, and x A^T


def test_an_input_without_a_gradient_gets_none(device, monkeypatch):
    """The first trained layer: its input comes from frozen matrices, and the products of dx are not made."""
    torch.manual_seed(0)
    x, weights, As, Bs, scales, dys = draw(17, 32, THREE, device)
    expected = run(lora_linear, x, weights, As, Bs, scales, dys)
    results = []
    real = torch.ops.lumi.lora_linear_backward
    monkeypatch.setattr(
        "lumi.kernels.lora_linear._lora_linear_backward_op",
        lambda *args: results.append(real(*args)) or results[-1],
    )
    leaves = [t.requires_grad_() for t in (*As, *Bs)]
    gradients = torch.autograd.grad(lora_linear(x, weights, leaves[:3], leaves[3:], scales), leaves, dys)
    ((dx, _, _),) = results
    assert dx == []
    for name, gradient in zip(["dA0", "dA1", "dA2", "dB0", "dB1", "dB2"], gradients, strict=True):
        assert torch.equal(gradient, expected[name])


def test_an_output_that_nothing_uses(device):
    torch.manual_seed(0)
    x, weights, As, Bs, scales, dys = draw(17, 32, THREE, device)
    zeroed = [dys[0], torch.zeros_like(dys[1]), dys[2]]
    expected = run(lora_linear, x, weights, As, Bs, scales, zeroed)
    leaves = [t.requires_grad_() for t in (x, *As, *Bs)]
    ys = lora_linear(x, weights, As, Bs, scales)
    gradients = torch.autograd.grad((ys[0], ys[2]), leaves, (dys[0], dys[2]))
    for name, gradient in zip(["dx", "dA0", "dA1", "dA2", "dB0", "dB1", "dB2"], gradients, strict=True):
        assert torch.equal(gradient, expected[name])


def test_backward_of_expanded_gradients(device):
    """`sum().backward()` passes gradients of strides 0."""
    torch.manual_seed(0)
    x, weights, As, Bs, scales, _ = draw(9, 32, THREE, device)
    assert_all_parity(
        (x, weights, As, Bs, scales, [torch.ones((), device=device).expand(9, size) for size in THREE])
    )


def test_it_is_deterministic(device):
    torch.manual_seed(0)
    case = draw(300, 96, THREE, device)
    first, second = (run(lora_linear, *case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows(device):
    result = run(lora_linear, *draw((2, 0), 16, THREE, device))
    assert [tuple(result[name].shape) for name in ("y0", "y1", "dx")] == [(2, 0, 40), (2, 0, 24), (2, 0, 16)]
    assert not any(t.any() for name, t in result.items() if name.startswith(("dA", "dB")))
    assert all(t.isfinite().all() for t in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_dx", [True, False])
def test_operators_are_registered_whole(dtype, needs_dx, device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the operators do."""
    x, weights, As, Bs, scales, dys = draw((2, 5), 16, (8, 12), device, dtype)
    A = torch.cat(As).requires_grad_()
    Bs = [B.requires_grad_() for B in Bs]
    torch.library.opcheck(
        _lora_linear_op.opaque, (x.detach().requires_grad_(needs_dx), weights, A, Bs, scales)
    )
    xa = torch.randn(10, 8, device=device).to(dtype)
    torch.library.opcheck(
        _lora_linear_backward_op.opaque,
        (x, dys, xa, weights, A.detach(), [B.detach() for B in Bs], scales, needs_dx),
    )


def test_fake_tensors_have_the_real_shapes(device):
    x, weights, As, Bs, scales, _ = draw((2, 5), 32, THREE, device)
    x = torch.randn(2, 5, 64, device=device)[..., :32]
    real = lora_linear(x, weights, As, Bs, scales)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [[mode.from_tensor(t) for t in tensors] for tensors in (weights, As, Bs)]
        fake = lora_linear(mode.from_tensor(x), *faked, scales)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_activation_checkpointing_gives_the_same_gradient(adapters, device):
    torch.manual_seed(0)
    case = draw(17, 32, THREE, device, torch.bfloat16, adapters=adapters)
    checkpointed = lambda *inputs: torch.utils.checkpoint.checkpoint(
        lora_linear, *inputs, use_reentrant=False
    )
    ours, expected = run(checkpointed, *case), run(lora_linear, *case)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(adapters, device):
    torch.manual_seed(0)
    case = draw(17, 32, THREE, device, torch.bfloat16, adapters=adapters)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, *case), run(lora_linear, *case)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_rejects_other_dtypes(dtype, device):
    x, *rest, _ = draw(3, 8, (4,), device)
    with pytest.raises(ValueError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
        lora_linear(x.to(dtype), *rest)


def test_rejects_what_does_not_fit(device):
    x, weights, As, Bs, scales, _ = draw(3, 8, (4, 5), device)
    with pytest.raises(ValueError, match=r"x must have a last dimension of at least 1, got shape \(3, 0\)"):
        lora_linear(x[:, :0], weights, As, Bs, scales)
    with pytest.raises(ValueError, match=r"must be equally many, and at least one, got 2, 2, 2 and 1"):
        lora_linear(x, weights, As, Bs, scales[:1])
    with pytest.raises(ValueError, match=r"must be equally many, and at least one, got 0, 0, 0 and 0"):
        lora_linear(x, [], [], [], [])
    with pytest.raises(
        ValueError,
        match=r"weights\[1\] must have shape \(O, 8\), O at least 1, to match x \(3, 8\), got \(8, 5\)",
    ):
        lora_linear(x, [weights[0], weights[1].T], As, Bs, scales)
    with pytest.raises(
        ValueError, match=r"As\[0\] must have shape \(R, 8\), R at least 1, to match x \(3, 8\), got \(0, 8\)"
    ):
        lora_linear(x, weights, [As[0][:0], As[1]], [Bs[0][:, :0], Bs[1]], scales)
    with pytest.raises(
        ValueError, match=r"Bs\[1\] must have shape \(5, 4\) to match its weight and A, got \(4, 4\)"
    ):
        lora_linear(x, weights, As, [Bs[0], Bs[0]], scales)
    with pytest.raises(ValueError, match=r"As\[1\] must be on the device of x, .*, got meta"):
        lora_linear(x, weights, [As[0], As[1].to("meta")], Bs, scales)
    with pytest.raises(
        ValueError,
        match=r"As\[1\] and Bs\[1\] must have the dtype of As\[0\], torch.float32, "
        "got torch.float32 and .*16",
    ):
        lora_linear(x, weights, As, [Bs[0], Bs[1].half()], scales)
    with pytest.raises(ValueError, match=r"weights\[1\] must be frozen .*, got one that requires a gradient"):
        lora_linear(x, [weights[0], weights[1].requires_grad_()], As, Bs, scales)


def test_reference_keeps_float64():
    x, weights, As, Bs, scales, _ = draw(5, 8, (4, 6), "cpu", torch.float64)
    ours, exact = lora_linear_reference(x, weights, As, Bs, scales), truth(x, weights, As, Bs, scales)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    leaves = [t.requires_grad_() for t in (x, *As, *Bs)]
    assert torch.autograd.gradcheck(
        lambda x, *ab: lora_linear_reference(x, weights, ab[:2], ab[2:], scales), leaves
    )
