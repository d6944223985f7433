import math

import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.add_rms_norm import (
    _add_rms_norm_backward_op,
    _add_rms_norm_op,
    add_rms_norm,
    add_rms_norm_reference,
)
from lumi.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5


def truth(x, residual, weight):
    total = x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total  # no casts


def reference(x, residual, weight):
    return add_rms_norm_reference(x, residual, weight, EPS)


def ours(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def run(function, x, residual, weight, dy, dtotal):
    inputs = [t.detach().requires_grad_() for t in (x, residual, weight)]
    y, total = function(*inputs)
    return y, total, *torch.autograd.grad((y, total), inputs, (dy, dtotal))


def assert_all_parity(*cases):
    """Parity of everything over all (x, residual, weight, dy, dtotal) together: the rounding of a handful of
    numbers is luck."""
    exact = [run(truth, *(t.double() for t in case)) for case in cases]
    same_dtype, actual = ([run(function, *case) for case in cases] for function in (reference, ours))
    for index, name in enumerate(("y", "total", "dx", "dresidual", "dweight")):
        assert_parity(
            name,
            *(torch.stack([result[index] for result in results]) for results in (actual, same_dtype, exact)),
        )


def draw(shape, device, dtype=torch.float32):
    x, residual, dy, dtotal = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    return x, residual, torch.randn(shape[-1], device=device).to(dtype), dy, dtotal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize("D", [1, 96, 1000])
def test_parity(rows, D, dtype, device):
    torch.manual_seed(0)
    draws = max(64 // D if rows == 1 else 8 // D, 1)
    cases = []
    for _ in range(draws):
        x, residual, weight, dy, dtotal = draw((rows, D), device, dtype)
        # The norm's dx is a difference of equals divided by |total|: near zero, one total would decide all.
        if D == 1:
            x, residual = x + 4 * x.sign(), residual.abs() * x.sign()
        cases.append((x, residual, weight, dy, dtotal))
    assert_all_parity(*cases)


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (2, 8192), (5, 9000)], ids=str)
def test_parity_of_more_dimensions_and_of_wide_rows(shape, device):
    torch.manual_seed(0)
    assert_all_parity(draw(shape, device))


def test_parity_with_a_float32_weight(device):
    torch.manual_seed(0)
    x, residual, weight, dy, dtotal = draw((9, 96), device, torch.float16)
    assert_all_parity((x, residual, weight.float(), dy, dtotal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_torchs_and_the_norm_is_that_of_the_sum_as_stored(dtype, device):
    torch.manual_seed(0)
    x, residual, weight, _, _ = draw((33, 96), device, dtype)
    y, total = add_rms_norm(x, residual * 30, weight)
    assert torch.equal(total, x + residual * 30)
    assert torch.equal(y, rms_norm(total, weight))
    expected_y, expected_total = add_rms_norm_reference(x, residual, weight)
    assert torch.equal(expected_total, x + residual)
    assert torch.equal(expected_y, rms_norm_reference(x + residual, weight))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 16:112],  # rows of a wider matrix
        lambda t: t[::3, :96],  # every third row
        lambda t: t[:, :40].T,  # columns
        lambda t: t[:1].expand(6, -1),  # one row, six times
        lambda t: t.view(24, 4, 32)[:, 1:3].transpose(
            0, 1
        ),  # leading dimensions that no single stride can walk
    ],
    ids=["slice", "rows", "transposed", "stride-0-rows", "permuted"],
)
def test_strides_are_respected(view, device):
    torch.manual_seed(0)
    draws = []
    for index in range(8):
        tensors = [view(torch.randn(24, 128, device=device)) for _ in range(4)]
        if index % 2:
            tensors[1] = tensors[1].contiguous()  # one stride for x, another for residual
        x, residual, dy, dtotal = tensors
        draws.append((x, residual, torch.randn(2 * x.shape[-1], device=device)[::2], dy, dtotal))
    assert not draws[0][0].is_contiguous()
    assert_all_parity(*draws)


@pytest.mark.parametrize("used", ["y", "total"])
def test_one_output_alone(used, device):
    """The gradient of the other is then None, not zeros."""
    torch.manual_seed(0)
    x, residual, weight, dy, dtotal = draw((5, 96), device)
    results = []
    for function, dtype in ((truth, torch.float64), (reference, torch.float32), (ours, torch.float32)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual, weight)]
        y, total = function(*inputs)
        output, gradient = (y, dy) if used == "y" else (total, dtotal)
        results.append(torch.autograd.grad(output, inputs, gradient.to(dtype), allow_unused=True))
    exact, same_dtype, actual = results
    for name, one, other, expected in zip(
        ("dx", "dresidual", "dweight"), actual, same_dtype, exact, strict=True
    ):
        if expected is None:
            assert one is None
        else:
            assert_parity(name, one, other, expected)


def test_the_shared_gradient_is_added_to_by_nobody(device):
    """x and residual get one tensor: what is added to either, in place or through a second use, must not
    reach the other."""
    torch.manual_seed(0)
    x, residual, weight, dy, dtotal = draw((5, 96), device)

    def losses(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual, weight)]
        y, total = function(*leaves)
        y_again, total_again = function(total, leaves[0], leaves[2])  # total and x are used twice
        torch.autograd.backward((y, y_again, total_again), [g.to(dtype) for g in (dy, dy, dtotal)])
        leaves[0].grad.add_(1)
        (2 * leaves[1]).sum().backward()  # accumulates into residual's
        return [leaf.grad for leaf in leaves]

    exact, same_dtype, actual = (
        losses(truth, torch.float64),
        losses(reference, torch.float32),
        losses(ours, torch.float32),
    )
    for name, *tensors in zip(("dx", "dresidual", "dweight"), actual, same_dtype, exact, strict=True):
        assert_parity(name, *tensors)


def test_a_tensor_added_to_itself(device):
    torch.manual_seed(0)
    x, _, weight, dy, dtotal = draw((5, 96), device)
    gradients = []
    for function, dtype in ((truth, torch.float64), (reference, torch.float32), (ours, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        gradients += torch.autograd.grad(
            function(leaf, leaf, weight.to(dtype)), leaf, (dy.to(dtype), dtotal.to(dtype))
        )
    exact, same_dtype, actual = gradients
    assert_parity("dx", actual, same_dtype, exact)


def test_inputs_and_incoming_gradients_are_left_alone(device):
    tensors = draw((4, 64), device)
    before = [t.clone() for t in tensors]
    run(add_rms_norm, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_backward_of_expanded_gradients(device):
    """`sum().backward()` passes gradients of strides 0."""
    torch.manual_seed(0)
    x, residual, weight, _, _ = draw((5, 8), device)
    one = torch.ones((), device=device).expand(5, 8)
    assert_all_parity((x, residual, weight, one, one))


def test_backward_is_deterministic(device):
    torch.manual_seed(0)
    case = draw((300, 96), device)
    first, second = (run(add_rms_norm, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(device):
    x, residual = (torch.zeros(0, 16, device=device, requires_grad=True) for _ in range(2))
    weight = torch.ones(16, device=device, requires_grad=True)
    y, total = add_rms_norm(x, residual, weight)
    (y + total).sum().backward()
    assert x.grad.shape == residual.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros(16, device=device))


def test_only_the_needed_gradient(device):
    x, residual, weight = (
        torch.randn(3, 8, device=device),
        torch.randn(3, 8, device=device, requires_grad=True),
        torch.ones(8, device=device),
    )
    y, total = add_rms_norm(x, residual, weight)
    (y + total).sum().backward()
    assert x.grad is weight.grad is None
    assert residual.grad is not None


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8), torch.float32), ((2, 3, 40), torch.float16)], ids=str)
def test_operator_is_registered_whole(shape, dtype, device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the kernel does."""
    x, residual = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    torch.library.opcheck(_add_rms_norm_op.opaque, (x, residual, weight, EPS))
    rstd = torch.rand(math.prod(shape[:-1]), device=device)
    dy, dtotal = (torch.randn_like(x) for _ in range(2))
    torch.library.opcheck(
        _add_rms_norm_backward_op.opaque, (dy.detach(), dtotal.detach(), x.detach(), weight.detach(), rstd)
    )


def test_fake_tensors_have_the_real_shapes(device):
    x = torch.randn(2, 5, 128, device=device)[..., :96]
    weight = torch.ones(96, device=device)
    real = add_rms_norm(x, x, weight)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = add_rms_norm(mode.from_tensor(x), mode.from_tensor(x), mode.from_tensor(weight))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_activation_checkpointing_gives_the_same_gradient(device):
    torch.manual_seed(0)
    case = draw((7, 32), device)
    checkpointed = lambda *inputs: torch.utils.checkpoint.checkpoint(
        add_rms_norm, *inputs, use_reentrant=False
    )
    for a, b in zip(run(checkpointed, *case), run(add_rms_norm, *case), strict=True):
        assert torch.equal(a, b)


def test_compiles_without_a_graph_break(device):
    torch.manual_seed(0)
    case = draw((7, 32), device)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, *case), run(add_rms_norm, *case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_rejects_other_dtypes(dtype, device):
    x = torch.zeros(4, 64, device=device, dtype=dtype)
    with pytest.raises(ValueError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
        add_rms_norm(x, x, torch.ones(64, device=device))


def test_rejects_what_does_not_fit_x(device):
    x, weight = torch.zeros(4, 64, device=device), torch.ones(64, device=device)
    with pytest.raises(
        ValueError,
        match=r"residual must have shape, dtype and device of x, \(4, 64\), torch.float32, .*, got \(1, 64\)",
    ):
        add_rms_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match=r"residual must have .*, got \(4, 64\), torch.float16"):
        add_rms_norm(x, x.half(), weight)
    with pytest.raises(ValueError, match=r"residual must have .*, got \(4, 64\), torch.float32, meta"):
        add_rms_norm(x, x.to("meta"), weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\) to match x \(4, 64\), got \(32,\)"):
        add_rms_norm(x, x, weight[:32])
    with pytest.raises(ValueError, match="weight must be on the device of x, meta, got"):
        add_rms_norm(x.to("meta"), x.to("meta"), weight)


@pytest.mark.parametrize("D", [0, 16_385])
def test_rejects_impossible_widths(D, device):
    x = torch.zeros(2, D, device=device)
    with pytest.raises(ValueError, match=f"must be between 1 and 16384 .*, got {D}"):
        add_rms_norm(x, x, torch.ones(D, device=device))


def test_reference_keeps_float64():
    x, residual, weight = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (3, 8), (8,))
    )
    for a, b in zip(reference(x, residual, weight), truth(x, residual, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(reference, (x, residual, weight))
