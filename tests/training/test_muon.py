"""Muon on whole matrices; `group_processes.py` runs it on parts, in several processes."""

from collections import Counter

import pytest
import torch
from case_server import run_case
from parity import assert_parity
from torch.utils._python_dispatch import TorchDispatchMode

from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training import muon, orthogonalization
from lumi.training.muon import Muon

SHAPES = (
    [(24, 24)] * 3
    + [(8, 24)] * 2
    + [(48, 24)] * 3
    + [(24, 48)] * 2
    + [(7, 10), (10, 7), (3, 5), (1, 7), (1, 1)]
)
SETTINGS = {"lr": 1.0, "weight_decay": 0.3, "momentum": 0.9}
VARIANTS = {
    "plain": {},
    "normuon": {"beta2": 0.8},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def torchs_muon(params):
    return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **SETTINGS)


def random_matrices(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def fresh_parameters(dtype=torch.float32):
    return [torch.nn.Parameter(matrix) for matrix in random_matrices(0, dtype)]


def run_steps(optimizer, params, steps):
    """Steps with learning rates that change. In step 2, one matrix has no gradient."""
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / step
        for index, (parameter, gradient) in enumerate(
            zip(params, random_matrices(step, params[0].dtype), strict=True)
        ):
            parameter.grad = None if (step, index) == (2, 1) else gradient
        optimizer.step()


def as_torch_steps_in(dtype, steps, beta2=None):
    """Weights after steps of Muon's definition, one matrix after the other, in one dtype throughout."""
    params = fresh_parameters(dtype)
    means = [torch.zeros_like(parameter) for parameter in params]
    squares = [torch.zeros(len(parameter), 1, dtype=dtype) for parameter in params]
    a, b, c = 3.4445, -4.7750, 2.0315
    for step in steps:
        lr = 0.1 / step
        for index, gradient in enumerate(random_matrices(step, dtype)):
            if (step, index) == (2, 1):
                continue
            means[index] = 0.9 * means[index] + 0.1 * gradient
            x = 0.1 * gradient + 0.9 * means[index]
            rows, columns = x.shape
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            if beta2 is not None:
                squares[index] = beta2 * squares[index] + (1 - beta2) * (x**2).mean(dim=1, keepdim=True)
                even = x / (squares[index].sqrt() + 1e-8)
                x = even * (x.norm() / even.norm())
            params[index].data = (
                params[index].data * (1 - lr * 0.3) - lr * 0.2 * max(rows, columns) ** 0.5 * x
            )
    return [parameter.detach() for parameter in params]


def test_in_bfloat16_it_is_torchs_muon():
    """Bit for bit: a batched product rounds as a single one does."""
    expected, actual = fresh_parameters(), fresh_parameters()
    run_steps(torchs_muon(expected), expected, range(1, 4))
    run_steps(Muon(actual, **SETTINGS, compute_dtype=torch.bfloat16), actual, range(1, 4))
    for shape, a, b in zip(SHAPES, actual, expected, strict=True):
        assert torch.equal(a, b), (shape, (a - b).abs().max())


@variants
def test_in_float32_it_is_as_exact_as_float32_can_be(variant):
    actual = fresh_parameters()
    run_steps(Muon(actual, **SETTINGS, **variant, compute_dtype=torch.float32), actual, range(1, 4))
    same_dtype, exact = (
        as_torch_steps_in(dtype, range(1, 4), **variant) for dtype in (torch.float32, torch.float64)
    )
    for index, shape in enumerate(SHAPES):
        assert_parity(f"{index}: {shape}", actual[index].detach(), same_dtype[index], exact[index])


def test_a_state_of_torchs_muon_goes_on():
    expected, actual = fresh_parameters(), fresh_parameters()
    before = torchs_muon(expected)
    run_steps(before, expected, range(1, 3))
    resumed = Muon(actual, **SETTINGS, compute_dtype=torch.bfloat16)
    for a, b in zip(actual, expected, strict=True):
        a.data.copy_(b)
        old, new = before.state[b], resumed.state[a]
        assert new.keys() == old.keys() == {"momentum_buffer"}
        assert (new["momentum_buffer"].shape, new["momentum_buffer"].dtype) == (b.shape, torch.float32)
        new["momentum_buffer"].copy_(old["momentum_buffer"])
    run_steps(before, expected, range(3, 5))
    run_steps(resumed, actual, range(3, 5))
    assert all(map(torch.equal, actual, expected))


@variants
def test_each_variant_changes_the_weights(variant):
    plain, actual = fresh_parameters(), fresh_parameters()
    run_steps(Muon(plain, **SETTINGS, compute_dtype=torch.bfloat16), plain, range(1, 4))
    run_steps(Muon(actual, **SETTINGS, **variant, compute_dtype=torch.bfloat16), actual, range(1, 4))
    for shape, a, b in zip(SHAPES, actual, plain, strict=True):
        if min(shape) > 1:  # a single row has no others to be evened out with
            assert torch.equal(a, b) == (not variant), shape


@variants
def test_large_matrices_make_several_stacks(variant, monkeypatch):
    settings = SETTINGS | variant
    expected, actual = fresh_parameters(), fresh_parameters()
    run_steps(Muon(expected, **settings, compute_dtype=torch.bfloat16), expected, range(1, 4))
    monkeypatch.setattr(
        orthogonalization, "_STACK_ELEMENTS", 1000
    )  # two of the smaller ones, none of the largest
    assert [len(stack) for stack in orthogonalization.stacks(actual)][:4] == [1, 1, 1, 2]
    run_steps(Muon(actual, **settings, compute_dtype=torch.bfloat16), actual, range(1, 4))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("fast", [True, False])
def test_the_compute_dtype_follows_the_device(fast, monkeypatch):
    monkeypatch.setattr(muon, "fast_bfloat16", lambda device: fast)
    assert Muon(fresh_parameters(), **SETTINGS).compute_dtype == (torch.bfloat16 if fast else torch.float32)


class Calls(TorchDispatchMode):
    """Counts operator calls but those that only make a view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if not function.is_view:
            self.counts[str(function.overloadpacket)] += 1
        return result


def test_a_step_makes_few_calls_and_never_waits():
    model = Transformer(
        ModelConfig(vocab_size=8, num_layers=6, model_dim=16, num_heads=2, mlp_dim=64), REFERENCE
    )
    params = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    assert len(params) == 42
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer = Muon(params, **SETTINGS, compute_dtype=torch.bfloat16)
    with Calls() as ours:
        optimizer.step()
    assert sum(ours.counts.values()) <= 71
    assert not {"aten._local_scalar_dense", "aten.item", "aten.nonzero"} & ours.counts.keys()
    with Calls() as theirs:
        torchs_muon(params).step()
    assert sum(theirs.counts.values()) > 900


def test_parts_are_updated_as_whole_matrices(tmp_path):
    """Tall, wide and uneven matrices on 2 and 4 processes: FSDP2, hybrid sharding, tensor parallelism."""
    run_case("group_processes", "muon", tmp_path, log=tmp_path / "log")
