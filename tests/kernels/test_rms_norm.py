import math

import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.rms_norm import (
    _rms_norm_backward_op,
    _rms_norm_op,
    backward_config,
    rms_norm,
    rms_norm_bwd,
    rms_norm_reference,
)

EPS = 1e-5


def truth(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight  # no casts


def run(function, x, weight, dy):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = function(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), dy)


def assert_all_parity(*cases):
    """Parity of y, dx and dweight over all (x, weight, dy) together: the rounding error of a handful of
    numbers is luck, not a budget."""
    exact, same_dtype, actual = [], [], []
    for x, weight, dy in cases:
        exact.append(run(truth, x.double(), weight.double(), dy.double()))
        same_dtype.append(run(lambda x, w: rms_norm_reference(x, w, EPS), x, weight, dy))
        actual.append(run(lambda x, w: rms_norm(x, w, EPS), x, weight, dy))
    for index, name in enumerate(("y", "dx", "dweight")):
        assert_parity(
            name,
            *(torch.stack([result[index] for result in results]) for results in (actual, same_dtype, exact)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize("D", [1, 96, 1000, pytest.param(8, marks=pytest.mark.soak)])
def test_parity(rows, D, dtype, device):
    torch.manual_seed(0)
    draws = max(64 // D if rows == 1 else 8 // D, 1)
    cases = []
    for _ in range(draws):
        x, weight, dy = (torch.randn(shape, device=device) for shape in ((rows, D), (D,), (rows, D)))
        if D == 1:
            x += (
                x.sign()
            )  # dx is a difference of equals divided by |x|: near zero a single x would decide the test
        cases.append(tuple(t.to(dtype) for t in (x, weight, dy)))
    assert_all_parity(*cases)


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (2, 8192), (5, 9000), (4, 16_384)], ids=str)
def test_parity_of_heads_and_of_wide_rows(shape, device):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    assert_all_parity((x, torch.randn(shape[-1], device=device), dy))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_parity_far_from_unit_scale(scale, device):
    """At 1e-4, eps outweighs the mean square; at 1e4, float16 squares would overflow if statistics were not
    float32."""
    torch.manual_seed(0)
    x = (torch.randn(5, 64, device=device) * scale).clamp(-6e4, 6e4).to(torch.float16)
    assert_all_parity((x, torch.randn(64, device=device).half(), torch.randn(5, 64, device=device).half()))


def test_parity_with_a_float32_weight(device):
    torch.manual_seed(0)
    x, dy = (torch.randn(9, 96, device=device).half() for _ in range(2))
    assert_all_parity((x, torch.randn(96, device=device), dy))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 16:112],  # rows of a wider matrix
        lambda t: t[::3, :96],  # every third row
        lambda t: t.T,  # columns
        lambda t: t[:, ::2],  # a stride inside the row
        lambda t: t[:1].expand(6, -1),  # one row, six times
        lambda t: t[:, :1].expand(-1, 24),  # one number across the row
        lambda t: t.view(24, 4, 32)[:, 1:3].transpose(
            0, 1
        ),  # leading dimensions that no single stride can walk
    ],
    ids=["slice", "rows", "transposed", "columns", "stride-0-rows", "stride-0-columns", "permuted"],
)
def test_strides_are_respected(view, device):
    torch.manual_seed(0)
    draws = []
    for _ in range(8):
        x, dy = (view(torch.randn(24, 128, device=device)) for _ in range(2))
        draws.append((x, torch.randn(2 * x.shape[-1], device=device)[::2], dy))
    assert not x.is_contiguous()
    assert_all_parity(*draws)
    assert_all_parity(*((x, weight, dy.contiguous()) for x, weight, dy in draws))


def test_inputs_and_incoming_gradient_are_left_alone(device):
    x, dy = (torch.randn(4, 64, device=device) for _ in range(2))
    weight = torch.randn(64, device=device)
    before = [t.clone() for t in (x, weight, dy)]
    run(rms_norm, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, dy), before, strict=True))


def test_backward_of_an_expanded_gradient(device):
    """`y.sum().backward()` passes a gradient of strides 0."""
    x = torch.randn(5, 8, device=device)
    exact = run(
        truth, x.double(), torch.ones(8, device=device).double(), torch.ones(5, 8, device=device).double()
    )
    leaf = x.requires_grad_()
    rms_norm(leaf, torch.ones(8, device=device), EPS).sum().backward()
    same = run(
        lambda x, w: rms_norm_reference(x, w, EPS),
        x,
        torch.ones(8, device=device),
        torch.ones(5, 8, device=device),
    )
    assert_parity("dx", leaf.grad, same[1], exact[1])


def test_backward_is_deterministic(device):
    torch.manual_seed(0)
    x, dy = (torch.randn(300, 96, device=device) for _ in range(2))
    weight = torch.randn(96, device=device)
    first, second = (run(rms_norm, x, weight, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows(device):
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros(16, device=device))


def test_only_the_needed_gradient(device):
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.ones(8, device=device)
    rms_norm(x, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8), torch.float32), ((2, 3, 40), torch.float16)], ids=str)
def test_operator_is_registered_whole(shape, dtype, device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the kernel does."""
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    torch.library.opcheck(_rms_norm_op.opaque, (x, weight, EPS))
    rstd = torch.rand(math.prod(shape[:-1]), device=device)
    torch.library.opcheck(
        _rms_norm_backward_op.opaque, (torch.randn_like(x), x.detach(), weight.detach(), rstd)
    )


def test_fake_tensors_have_the_real_shapes(device):
    x = torch.randn(2, 5, 128, device=device)[..., :96]
    real = rms_norm(x, torch.ones(96, device=device))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = rms_norm(mode.from_tensor(x), torch.ones(96, device=device))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
        real.shape,
        real.stride(),
        real.dtype,
        real.device,
    )


def test_activation_checkpointing_gives_the_same_gradient(device):
    torch.manual_seed(0)
    x, dy, weight = (*torch.randn(2, 7, 32, device=device), torch.randn(32, device=device))
    checkpointed = lambda x, w: torch.utils.checkpoint.checkpoint(rms_norm, x, w, use_reentrant=False)
    for a, b in zip(run(checkpointed, x, weight, dy), run(rms_norm, x, weight, dy), strict=True):
        assert torch.equal(a, b)


def test_compiles_without_a_graph_break(device):
    torch.manual_seed(0)
    x, dy, weight = (*torch.randn(2, 7, 32, device=device), torch.randn(32, device=device))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, weight, dy), run(rms_norm, x, weight, dy), strict=True):
        assert torch.equal(a, b)


def test_more_programs_than_rows_and_more_rows_than_programs_agree(device, monkeypatch):
    """Each program walks several tiles, or one; dweight differs by rounding only, dx not at all."""
    torch.manual_seed(0)
    x, dy, weight = (*torch.randn(2, 200, 1024, device=device), torch.randn(1024, device=device))
    rstd = torch.rsqrt(x.square().mean(-1) + EPS)
    results = []
    for programs in (1, 1000):
        monkeypatch.setattr("lumi.kernels.rms_norm._max_programs", lambda *_, programs=programs: programs)
        results.append(rms_norm_bwd(dy, x, weight, rstd))
    (dx_one, dweight_one), (dx_many, dweight_many) = results
    assert torch.equal(dx_one, dx_many)
    exact = (dy.double() * x.double() * rstd.double()[:, None]).sum(0)
    same_dtype = (dy * x * rstd[:, None]).sum(0)
    assert_parity("dweight of many", dweight_many, same_dtype, exact)
    worst = (
        200 * torch.finfo(torch.float32).eps * (dy * x * rstd[:, None]).abs().sum(0).double()
    )  # of any order of summation
    assert ((dweight_one - exact).abs() <= worst).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_rejects_other_dtypes(dtype, device):
    with pytest.raises(ValueError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
        rms_norm(torch.zeros(4, 64, device=device, dtype=dtype), torch.ones(64, device=device))


def test_rejects_wrong_weight_shape(device):
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\) to match x \(4, 64\), got \(32,\)"):
        rms_norm(torch.zeros(4, 64, device=device), torch.ones(32, device=device))


@pytest.mark.parametrize("D", [0, 16_385])
def test_rejects_impossible_widths(D, device):
    with pytest.raises(ValueError, match=f"must be between 1 and 16384 .*, got {D}"):
        rms_norm(torch.zeros(2, D, device=device), torch.ones(D, device=device))


def test_rejects_another_device(device):
    with pytest.raises(ValueError, match="weight must be on the device of x, meta, got"):
        rms_norm(torch.zeros(2, 4, device="meta"), torch.ones(4, device=device))


def test_reference_keeps_float64():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), truth(x, weight), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_reference(x, w, EPS), (x, weight))


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements():
    """Addresses of the last rows do not fit 32 bits."""
    x = torch.zeros(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1
    y = rms_norm(x, torch.ones(1024, device="cuda"), 0.0)
    assert torch.equal(y[-1], torch.ones_like(y[-1]))


@pytest.mark.parametrize("D", [1, 64, 768, 1024, 4096, 4097, 8192, 8193, 16_384])
def test_a_program_of_the_backward_fits_a_multiprocessor(D):
    """8 elements a thread, at most 1,024 threads. What is copied ahead, two tiles of three float32 tensors,
    fits the least shared memory of all GPUs, that of sm_89."""
    config = backward_config(D)
    elements = config.get("BLOCK_N", 1) * config["BLOCK_D"]
    assert elements == 8 * 32 * config["num_warps"]
    assert config["num_warps"] <= 32
    assert (config.get("STAGES", 1) - 1) * 3 * 4 * elements <= 101_376
    assert D > 4096 or config["STAGES"] > 2  # one tile alone would be waited for as soon as it is asked for
