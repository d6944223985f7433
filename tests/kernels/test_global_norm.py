import math

import pytest
import torch

from lumi import _csrc
from lumi.kernels.global_norm import global_norm, global_norm_reference
from lumi.kernels.native import has_native


@pytest.fixture(params=[global_norm, global_norm_reference], ids=["native", "reference"])
def norm(request):
    return request.param


def truth(tensors):
    """Exactly rounded: fsum of the squares in float64, which float32 values have without error."""
    return math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist()))


def assert_close(actual, expected, count):
    """A sum of `count` doubles in any order is off by at most count * 2^-53, relatively."""
    assert abs(actual.item() - expected) <= expected * max(count, 8) * 2**-53


@pytest.mark.parametrize(
    "shapes",
    [[(1,)], [()], [(17, 5), (3,)], [(255,), (256,), (257,)], [(65_536,)], [(65_537,), (2, 3, 4)]],
    ids=str,
)
def test_matches_an_exact_sum(shapes, norm, device):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(device) for shape in shapes]
    actual = norm(tensors)
    assert actual.shape == ()
    assert actual.device.type == device
    assert actual.dtype == torch.float64
    assert_close(actual, truth(tensors), sum(t.numel() for t in tensors))


def test_nothing(norm, device):
    nothing, three, four = (torch.tensor(values, device=device) for values in ([], [3.0], [4.0]))
    assert norm([]) == 0
    assert norm([nothing, nothing.view(3, 0)]) == 0
    assert norm([nothing, torch.cat([three, four])]) == 5
    assert norm(iter([three, four])) == 5


def test_native_path_is_taken_for_plain_float32_only(monkeypatch, device):
    if not has_native(torch.device(device)):
        pytest.skip("Lumi was installed without an nvcc: there is no CUDA code to test")
    name, calls = ("global_norm_cuda" if device == "cuda" else "global_norm"), []
    real = getattr(_csrc, name)
    monkeypatch.setattr(_csrc, name, lambda *args: calls.append(args) or real(*args))
    plain = torch.ones(4, 4, device=device)
    assert global_norm([plain]) == 4
    assert global_norm([torch.nn.Parameter(plain)]) == 4
    assert len(calls) == 2
    subclass = plain.as_subclass(type("Subclass", (torch.Tensor,), {}))
    for other, expected in ((plain.double(), 4), (plain.bfloat16(), 4), (plain[:, :1], 2), (subclass, 4)):
        assert global_norm([plain * 0, other]) == expected
    assert len(calls) == 2


def test_non_contiguous(norm, device):
    torch.manual_seed(0)
    tensor = torch.randn(40, 30).to(device)
    for view in (tensor.T, tensor[:, ::3], tensor[5:9, 2:7], torch.randn(1, 5).to(device).expand(4, 5)):
        assert_close(norm([view]), truth([view]), view.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 15, 16, 70_000])
def test_nan_and_inf_propagate(value, position, norm, device):
    tensor = torch.ones(70_001, device=device)
    tensor[position] = value
    actual = norm([torch.ones(3, device=device), tensor]).item()
    assert math.isnan(actual) if math.isnan(value) else actual == math.inf


@pytest.mark.parametrize("magnitude", [1e30, 3e38, 1e-30, 1e-44])
def test_magnitudes_whose_squares_float32_cannot_hold(magnitude, norm, device):
    tensors = [torch.full((100, 100), magnitude, device=device), torch.full((7,), -magnitude, device=device)]
    assert_close(norm(tensors), tensors[0][0, 0].item() * math.sqrt(10_007), 10_007)


def test_many_elements_of_which_each_is_small(norm, device):
    """A float32 sum of ones stops growing at 2^24."""
    ones = torch.ones(2**24 + 2**20, device=device)
    assert norm([ones]) == math.sqrt(ones.numel())


def test_many_tensors(norm, device):
    assert_close(norm([torch.ones(3, device=device) for _ in range(3000)]), math.sqrt(9000), 9000)


def test_many_tensors_of_one_and_of_several_chunks(norm, device):
    """More than the 1,024 that one launch on a GPU holds, with empty ones among them."""
    generator, several_chunks = torch.Generator().manual_seed(0), (16_384, 16_385, 40_000, 3, 50_001)
    sizes = [several_chunks[index % 5] if index % 50 < 5 else index % 5 for index in range(2500)]
    values = torch.randint(-9, 10, (sum(sizes),), generator=generator)
    tensors = [part.clone() for part in values.float().to(device).split(sizes)]
    assert_close(norm(tensors), math.sqrt(values.square().sum().item()), sum(sizes))


def test_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    tensors = [torch.randn(n) * scale for n, scale in ((3_000_001, 1.0), (7, 1e6), (2_000_000, 1e-3))]
    pointers, sizes = [t.data_ptr() for t in tensors], [t.numel() for t in tensors]
    norms = {_csrc.global_norm(pointers, sizes, threads) for threads in (1, 2, 3, 4, 7, 16) for _ in range(5)}
    assert len(norms) == 1
    assert_close(
        torch.tensor(norms.pop(), dtype=torch.float64), global_norm_reference(tensors).item(), 5_000_008
    )


def test_inputs_are_left_alone_and_gradients_not_tracked(norm, device):
    tensor = torch.randn(10, device=device, requires_grad=True)
    before = tensor.detach().clone()
    assert not norm([tensor]).requires_grad
    assert torch.equal(tensor.detach(), before)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (torch.ones(3, dtype=torch.int64), "torch.int64"),
        (1.0, "float"),
        (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_rejects(bad, got):
    with pytest.raises(ValueError, match=rf"tensors\[1\] must be a floating-point tensor, got {got}"):
        global_norm([torch.ones(2), bad])


@pytest.mark.parametrize("offset", range(4))
def test_does_not_depend_on_where_the_tensors_lie(offset, device):
    torch.manual_seed(0)
    values = torch.randn(40_003).to(device)
    memory = torch.full((40_010,), math.nan, device=device)
    view = memory[offset : offset + len(values)]
    view.copy_(values)
    assert torch.equal(global_norm([view, values]), global_norm([values, values]))


def test_twice_the_same(device):
    torch.manual_seed(0)
    tensors = [torch.randn(size).to(device) for size in (1, 17, 63, 64, 65, 129, 100_003)]
    assert torch.equal(global_norm(tensors), global_norm(tensors))


@pytest.mark.gpu
def test_nobody_waits_for_the_device(device):
    tensors = [torch.ones(9, device=device), torch.ones(70_000, device=device)]
    global_norm(tensors)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    norm = global_norm(tensors)
    assert not torch.cuda.current_stream().query(), "the norm came back only after the device was done"
    assert norm == math.sqrt(70_009)


@pytest.mark.gpu
def test_tensors_of_two_devices_go_to_the_reference(device):
    assert global_norm([torch.tensor([3.0], device=device), torch.tensor([4.0])]) == 5
