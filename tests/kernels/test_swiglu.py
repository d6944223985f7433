import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.swiglu import _swiglu_backward_op, _swiglu_op, swiglu, swiglu_reference


def written_out(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def test_is_the_formula():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 3, 50, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu_reference(gate, up), written_out(gate, up), rtol=1e-13, atol=0)


def test_gradient():
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 1000).to(dtype)
    actual = swiglu_reference(gate, up)
    exact = written_out(gate.double(), up.double())
    half_ulp = torch.finfo(dtype).eps / 2
    float32 = 4 * torch.finfo(torch.float32).eps  # the four float32 roundings before the last one
    tiny = (
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )  # subnormal results are rounded to this
    assert ((actual.double() - exact).abs() <= exact.abs() * (half_ulp + float32) + tiny / 2).all()


def test_extremes_do_not_overflow():
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0])
    assert torch.equal(swiglu_reference(gate, torch.ones(4)), torch.tensor([0.0, 0.0, 0.0, 200.0]))


# --- the Triton kernels ---


def run(function, gate, up, dy):
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    y = function(gate, up)
    return y, *torch.autograd.grad(y, (gate, up), dy)


def assert_all_parity(*cases):
    """Parity of y, dgate and dup over all (gate, up, dy) together."""
    exact = [run(written_out, *(t.double() for t in case)) for case in cases]
    same_dtype, actual = ([run(function, *case) for case in cases] for function in (swiglu_reference, swiglu))
    for index, name in enumerate(("y", "dgate", "dup")):
        assert_parity(
            name,
            *(torch.stack([result[index] for result in results]) for results in (actual, same_dtype, exact)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize(
    "width", [1, 96, 1500, *(pytest.param(n, marks=pytest.mark.soak) for n in (8, 1000))]
)
def test_parity(rows, width, dtype, device):
    torch.manual_seed(0)
    draws = max(64 // (rows * width), 1)
    assert_all_parity(
        *((3 * torch.randn(3, rows, width, device=device)).to(dtype).unbind() for _ in range(draws))
    )


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # the interpreter's numpy; infinity is what the kernel counts on
@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_parity_far_from_unit_scale(scale, device):
    """Gates so large that exp overflows to infinity, and so small that the sigmoid is a half."""
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 9, 64, device=device)
    assert_all_parity((gate * scale, up, dy))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 16:112],  # rows of a wider matrix, as of one projection to gate and up together
        lambda t: t[::3, :96],
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(6, -1),
        lambda t: t[:, :1].expand(-1, 24),
        lambda t: t.view(24, 4, 32)[:, 1:3].transpose(0, 1),
    ],
    ids=["slice", "rows", "transposed", "columns", "stride-0-rows", "stride-0-columns", "permuted"],
)
def test_strides_are_respected(view, device):
    torch.manual_seed(0)
    gate, up, dy = (view(torch.randn(24, 128, device=device)) for _ in range(3))
    assert not gate.is_contiguous()
    assert_all_parity((gate, up.contiguous(), dy))
    assert_all_parity((gate.contiguous(), up, dy.contiguous()))


def test_inputs_and_incoming_gradient_are_left_alone(device):
    tensors = [torch.randn(4, 64, device=device) for _ in range(3)]
    before = [t.clone() for t in tensors]
    run(swiglu, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_no_rows(device):
    gate, up = (torch.zeros(0, 16, device=device, requires_grad=True) for _ in range(2))
    swiglu(gate, up).sum().backward()
    assert gate.grad.shape == up.grad.shape == (0, 16)


def test_operator_is_registered_whole(device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the kernel does."""
    gate, up = (torch.randn(2, 3, 40, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(_swiglu_op.opaque, (gate, up))
    torch.library.opcheck(
        _swiglu_backward_op.opaque, (torch.randn(2, 3, 40, device=device), gate.detach(), up.detach())
    )


def test_fake_tensors_have_the_real_shapes(device):
    gate, up = torch.randn(2, 2, 5, 128, device=device)[..., :96]
    real = swiglu(gate, up)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = swiglu(mode.from_tensor(gate), mode.from_tensor(up))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
        real.shape,
        real.stride(),
        real.dtype,
        real.device,
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gate, up: torch.utils.checkpoint.checkpoint(swiglu, gate, up, use_reentrant=False),
        torch.compile(swiglu, fullgraph=True, backend="aot_eager"),
    ],
    ids=["checkpointed", "compiled"],
)
def test_checkpointed_and_compiled_it_is_the_same(wrap, device):
    torch.manual_seed(0)
    case = torch.randn(3, 7, 32, device=device).unbind()
    assert all(torch.equal(a, b) for a, b in zip(run(wrap, *case), run(swiglu, *case), strict=True))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (
            torch.zeros(4, 8),
            torch.zeros(4, 9),
            r"up must have shape, dtype and device of gate, \(4, 8\), .*, got \(4, 9\)",
        ),
        (torch.zeros(4, 8), torch.zeros(4, 8).half(), r"up must have .* torch\.float32, .* torch\.float16"),
        (torch.zeros(4, 8), torch.zeros(4, 8, device="meta"), "up must have .* cpu, got .* meta"),
        (
            torch.zeros(4, 8).double(),
            torch.zeros(4, 8).double(),
            r"gate must be float32, bfloat16 or float16, got torch\.float64",
        ),
        (
            torch.zeros(4, 0),
            torch.zeros(4, 0),
            r"gate must have a last dimension of at least 1, got shape \(4, 0\)",
        ),
        (torch.zeros(()), torch.zeros(()), "a last dimension of at least 1"),
    ],
    ids=["shape", "dtype", "device", "float64", "no columns", "scalar"],
)
def test_refuses(gate, up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements():
    """Addresses of the last rows do not fit 32 bits."""
    gate = torch.zeros(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    gate[-1] = 100
    assert torch.equal(
        swiglu(gate, gate)[-1], torch.full((1024,), 10_000.0, device="cuda", dtype=torch.bfloat16)
    )
