import math

import pytest
import torch

from lumi import _csrc
from lumi.kernels.global_norm import global_norm, global_norm_reference


@pytest.fixture(params=[global_norm, global_norm_reference], ids=["native", "reference"])
def norm(request):
    return request.param


def truth(tensors):
    """Exactly rounded: fsum of the squares in float64, which float32 values have without error."""
    return math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist()))


def assert_close(actual, expected, count):
    """A sum of `count` doubles in any order is off by at most count * 2^-53, relatively."""
    assert abs(actual.item() - expected) <= expected * max(count, 8) * 2**-53


@pytest.mark.parametrize("shapes", [[(1,)], [()], [(17, 5), (3,)], [(255,), (256,), (257,)], [(65_536,)], [(65_537,), (2, 3, 4)]], ids=str)
def test_matches_an_exact_sum(shapes, norm):
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    actual = norm(tensors)
    assert actual.shape == ()
    assert actual.dtype == torch.float64
    assert_close(actual, truth(tensors), sum(t.numel() for t in tensors))


def test_nothing(norm):
    assert norm([]) == 0
    assert norm([torch.empty(0), torch.empty(3, 0)]) == 0
    assert norm([torch.empty(0), torch.tensor([3.0, 4.0])]) == 5
    assert norm(iter([torch.tensor([3.0]), torch.tensor([4.0])])) == 5


def test_native_path_is_taken_for_plain_float32_only(monkeypatch):
    calls = []
    real = _csrc.global_norm
    monkeypatch.setattr(_csrc, "global_norm", lambda *args: calls.append(args) or real(*args))
    plain = torch.ones(4, 4)
    assert global_norm([plain]) == 4
    assert global_norm([torch.nn.Parameter(plain)]) == 4
    assert len(calls) == 2
    subclass = plain.as_subclass(type("Subclass", (torch.Tensor,), {}))
    for other, expected in ((plain.double(), 4), (plain.bfloat16(), 4), (plain[:, :1], 2), (subclass, 4)):
        assert global_norm([plain * 0, other]) == expected
    assert len(calls) == 2


def test_non_contiguous(norm):
    torch.manual_seed(0)
    tensor = torch.randn(40, 30)
    for view in (tensor.T, tensor[:, ::3], tensor[5:9, 2:7], torch.randn(1, 5).expand(4, 5)):
        assert_close(norm([view]), truth([view]), view.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 15, 16, 70_000])
def test_nan_and_inf_propagate(value, position, norm):
    tensor = torch.ones(70_001)
    tensor[position] = value
    actual = norm([torch.ones(3), tensor]).item()
    assert math.isnan(actual) if math.isnan(value) else actual == math.inf


@pytest.mark.parametrize("magnitude", [1e30, 3e38, 1e-30, 1e-44])
def test_magnitudes_whose_squares_float32_cannot_hold(magnitude, norm):
    tensors = [torch.full((100, 100), magnitude), torch.full((7,), -magnitude)]
    assert_close(norm(tensors), tensors[0][0, 0].item() * math.sqrt(10_007), 10_007)


def test_many_elements_of_which_each_is_small(norm):
    """A float32 sum of ones stops growing at 2^24."""
    ones = torch.ones(2**24 + 2**20)
    assert norm([ones]) == math.sqrt(ones.numel())


def test_many_tensors(norm):
    assert_close(norm([torch.ones(3) for _ in range(3000)]), math.sqrt(9000), 9000)


def test_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    tensors = [torch.randn(n) * scale for n, scale in ((3_000_001, 1.0), (7, 1e6), (2_000_000, 1e-3))]
    pointers, sizes = [t.data_ptr() for t in tensors], [t.numel() for t in tensors]
    norms = {_csrc.global_norm(pointers, sizes, threads) for threads in (1, 2, 3, 4, 7, 16) for _ in range(5)}
    assert len(norms) == 1
    assert_close(torch.tensor(norms.pop(), dtype=torch.float64), global_norm_reference(tensors).item(), 5_000_008)


def test_inputs_are_left_alone_and_gradients_not_tracked(norm):
    tensor = torch.randn(10, requires_grad=True)
    before = tensor.detach().clone()
    assert not norm([tensor]).requires_grad
    assert torch.equal(tensor.detach(), before)


@pytest.mark.parametrize(
    ("bad", "got"),
    [(torch.ones(3, dtype=torch.int64), "torch.int64"), (1.0, "float"), (torch.ones(2, dtype=torch.complex64), "torch.complex64")],
)
def test_rejects(bad, got):
    with pytest.raises(ValueError, match=rf"tensors\[1\] must be a floating-point tensor, got {got}"):
        global_norm([torch.ones(2), bad])
