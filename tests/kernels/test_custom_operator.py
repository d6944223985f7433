"""An operator is called itself where nothing watches, and by torch where something does."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lumi.kernels.custom_operator import CustomOperator, custom_operator, runs_directly
from lumi.kernels.rms_norm import rms_norm_native
from lumi.kernels.swiglu import swiglu_native


@pytest.fixture(scope="module")
def double() -> CustomOperator:
    @custom_operator("lumi_test::double")
    def double(x: Tensor) -> Tensor:
        return 2 * x.clone()

    double.register_fake(lambda x: x.new_empty(x.shape))
    double.register_autograd(lambda ctx, dy: 2 * dy)
    return double


def seen(function, *inputs):
    """The operators that torch was asked for."""
    with torch.profiler.profile() as profile:
        function(*inputs)
    return {event.key for event in profile.key_averages()}


def test_without_gradients_the_function_is_called(double):
    x = torch.ones(3)
    with torch.no_grad():
        assert torch.equal(double(x), torch.full((3,), 2.0))
        assert "lumi_test::double" not in seen(double, x)
    assert "lumi_test::double" in seen(double, x)


def test_gradients_pass(double):
    x = torch.ones(3, requires_grad=True)
    double(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_modes_and_other_tensors_see_the_operator(double):
    with torch.no_grad():
        with FakeTensorMode():
            assert not runs_directly(torch.ones(3))
            assert double(torch.ones(3)).shape == (3,)
        with FlopCounterMode(display=False):
            assert "lumi_test::double" in seen(double, torch.ones(3))
        assert runs_directly(torch.ones(3), torch.nn.Parameter(torch.ones(3)))
        assert not runs_directly(torch.ones(3), torch.nn.Buffer(torch.ones(3)).as_subclass(Subclass))


class Subclass(Tensor):
    pass


def test_compiled_code_has_the_operator(double):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(lambda x: double(x) + 1, backend=keep, fullgraph=True)
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert ["lumi_test.double" in code for code in graphs] == [True]


@pytest.mark.parametrize("apply", [lambda x, w: rms_norm_native(x, w), lambda x, w: swiglu_native(x, x * w)])
def test_backward_calls_the_function_and_gets_the_same_bits(apply):
    torch.manual_seed(0)

    def gradients():
        x, weight = (t.clone().requires_grad_() for t in (values, weights))
        y = apply(x, weight)
        return seen(y.backward, dy), x.grad, weight.grad

    values, weights, dy = torch.randn(5, 16), torch.randn(16), torch.randn(5, 16)
    names, *direct = gradients()
    assert not any("backward" in name for name in names if name.startswith("lumi::"))
    with FlopCounterMode(display=False):
        names, *watched = gradients()
    assert any("backward" in name for name in names if name.startswith("lumi::"))
    assert all(map(torch.equal, direct, watched))
