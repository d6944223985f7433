"""Products with few rows in C++, beside torch's."""

import pytest
import torch
from parity import assert_parity

from lumi import _csrc
from lumi.kernels import linear
from lumi.kernels.linear import FEW_ROWS, linear_native, linear_reference

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
