import pytest
import torch

from lumi.kernels.swiglu import swiglu_reference


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
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal results are rounded to this
    assert ((actual.double() - exact).abs() <= exact.abs() * (half_ulp + float32) + tiny / 2).all()


def test_extremes_do_not_overflow():
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0])
    assert torch.equal(swiglu_reference(gate, torch.ones(4)), torch.tensor([0.0, 0.0, 0.0, 200.0]))
