"""Products with few rows in C++, beside torch's."""

import pytest
import torch
from parity import assert_parity
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lumi import _csrc
from lumi.kernels import linear
from lumi.kernels.linear import FEW_ROWS, joined_linear, linear_native, linear_reference

pytestmark = [
    pytest.mark.skipif(not _csrc.cpu_targets, reason="Lumi was built without csrc/cpu"),
    pytest.mark.usefixtures("cpu_target"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def calls(monkeypatch):
    """Notes each product that C++ takes."""
    noted, real = [], linear.native_linear
    monkeypatch.setattr(linear, "native_linear", lambda *args: noted.append(args) or real(*args))
    return noted


class Operators(TorchDispatchMode):
    """Notes the names of torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(f"{function._schema.name}.{function._overloadname}")
        return function(*args, **kwargs or {})


def operands(rows, inputs, outputs, dtype):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(288, 130), (33, 7), (1, 1), (17, 64)])
def test_parity(inputs, outputs, dtype, calls):
    most = FEW_ROWS[dtype.itemsize]
    for rows in range(1, most + 1):
        x, weight = operands(rows, inputs, outputs, dtype)
        with torch.inference_mode():
            results = linear_native(x, weight), linear_reference(x, weight)
        assert_parity(f"{rows} rows", *results, x.double() @ weight.double().T)
    assert len(calls) == most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_parity_with_a_bias(rows, dtype, calls):
    x, weight = operands(rows, 33, 70, dtype)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(0))  # a float32 master
    with torch.inference_mode():
        actual, same_dtype = linear_native(x, weight, bias), x @ weight.T + bias.to(dtype)
    assert_parity(f"{rows} rows", actual, same_dtype, x.double() @ weight.double().T + bias.double())
    assert len(calls) == (1 if rows <= FEW_ROWS[dtype.itemsize] else 0)
    leaf = bias.clone().requires_grad_()
    linear_native(x, weight, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((70,), float(rows)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(dtype):
    x, weight = operands(FEW_ROWS[dtype.itemsize], 100, 200, dtype)
    with torch.no_grad():
        together = linear_native(x, weight)
        for row in range(len(x)):
            assert torch.equal(linear_native(x[row : row + 1], weight)[0], together[row])
        try:
            torch.set_num_threads(2)
            assert torch.equal(linear_native(x, weight), together)
        finally:
            torch.set_num_threads(1)


def test_leading_dims_and_strides(calls):
    x, weight = operands(6, 20, 9, torch.float32)
    with torch.no_grad():
        expected = linear_native(x, weight)
        assert torch.equal(linear_native(x.view(3, 2, 20), weight), expected.view(3, 2, 9))
        strided = x.repeat_interleave(2, dim=1)[:, ::2]
        assert torch.equal(linear_native(strided, weight), expected)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.repeat(40, 1), w),
        lambda x, w: (x[:0], w),
        lambda x, w: (x, w.double()),
        lambda x, w: (x, w.T.contiguous().T),
    ],
    ids=["many rows", "no rows", "another dtype", "not contiguous"],
)
def test_the_rest_is_torch_s(change, calls):
    x, weight = change(*operands(2, 20, 9, torch.float32))
    with torch.no_grad():
        assert torch.equal(linear_native(x, weight), linear_reference(x, weight))
    assert calls == []


def test_gradients_are_torch_s(calls):
    x, weight = (t.requires_grad_() for t in operands(2, 20, 9, torch.float32))
    linear_native(x, weight).sum().backward()
    assert calls == []
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 20))


def joined_case(dtype, sizes, biased):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator)
    x = random(2, 5, 16).to(dtype).requires_grad_()
    weights = [random(size, 16).to(dtype).float().requires_grad_() for size in sizes]
    bias = random(sum(sizes)).to(dtype).requires_grad_() if biased else None
    return x, weights, bias, [random(2, 5, size).to(dtype) for size in sizes]


def run_joined(dtype, sizes, biased, join):
    """Outputs and gradients of several linears, each computed in `dtype`."""
    x, weights, bias, dys = joined_case(torch.bfloat16, sizes, biased)
    leaves = [x, *weights] + ([] if bias is None else [bias])
    leaves = [leaf.detach().to(dtype if leaf.dtype == torch.bfloat16 else torch.float32) for leaf in leaves]
    if dtype == torch.float64:
        leaves = [leaf.double() for leaf in leaves]
    x, *weights = (leaf.requires_grad_() for leaf in leaves)
    bias = weights.pop() if biased else None
    if join:
        ys = joined_linear(x, torch.cat([w.detach().to(dtype) for w in weights]), weights, bias)
    else:
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        ys = [linear_reference(x, *each) for each in zip(weights, biases, strict=True)]
    torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
    return [*ys, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("sizes", [[12], [8, 8], [24, 8, 16]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined_parity(dtype, sizes, biased):
    exact = run_joined(torch.float64, sizes, biased, False)
    results = zip(
        run_joined(dtype, sizes, biased, True), run_joined(dtype, sizes, biased, False), strict=True
    )
    for index, ((actual, same_dtype), truth) in enumerate(zip(results, exact, strict=True)):
        assert actual.dtype == same_dtype.dtype
        assert_parity(str(index), actual, same_dtype, truth)


def test_joined_without_gradients_is_the_bundle_s_product(calls):
    x, weights, bias, _ = joined_case(torch.float32, [24, 8, 16], True)
    joined = torch.cat([weight.detach() for weight in weights])
    with torch.no_grad():
        ys = joined_linear(x, joined, weights, bias, linear_native)
        expected = [linear_native(x, w, b) for w, b in zip(weights, bias.split([24, 8, 16]), strict=True)]
    assert len(calls) == 1 + 3
    assert all(torch.equal(y, other) for y, other in zip(ys, expected, strict=True))


def test_gradients_that_lie_side_by_side_are_not_copied(monkeypatch):
    """As SwiGLU's do; others are joined."""
    joins, real = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **rest: joins.append(args) or real(*args, **rest))
    whole = torch.randn(2, 3, 10)
    for parts, count in (
        (whole.split([4, 6], dim=-1), 0),
        (whole[..., 2:].split([4, 4], dim=-1), 1),
        (whole.split([4, 6], dim=-1)[::-1], 1),
        ((whole[..., :5], whole[..., :5]), 1),
        ((whole[..., :4], whole.clone()[..., 4:]), 1),
    ):
        joins.clear()
        together = linear._side_by_side(parts)
        assert len(joins) == count
        assert torch.equal(together, real(list(parts), dim=-1))
        assert (together is whole) == (count == 0)


def test_on_cuda_the_gradient_of_a_float32_weight_is_never_narrow():
    with FakeTensorMode():
        dy, x = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((6, 9), (9, 4)))
        with Operators() as called:
            product = linear._wide_product(dy, x, torch.float32)
    assert (product.dtype, tuple(product.shape)) == (torch.float32, (6, 4))
    assert called.names == ["aten::mm.dtype"]
