import contextlib
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lumi.config import UserError
from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, add_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training.muon import Muon
from lumi.training.optimizer import AdamW, Clip, Optimizer
from lumi.training.optimizer_config import OptimizerConfig

MODEL = ModelConfig(vocab_size=17, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24)


# What `build` makes optimizers of.
KINDS = {
    "adamw": {"kind": "adamw"},
    "muon": {"kind": "muon"},
    "normuon": {"kind": "muon", "muon_beta2": 0.9},
}


def build(shape=MODEL, **changes):
    model = Transformer(shape, REFERENCE).init_weights(0)
    return model, Optimizer(model, OptimizerConfig(**changes))


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def load_states(optimizer, values):
    states = optimizer.state_tensors()
    assert states.keys() == values.keys()
    for name, state in states.items():
        state.copy_(values[name])


def test_weight_decay_reaches_matrices_only():
    for kind in ("adamw", "muon"):
        model, optimizer = build(replace(MODEL, qkv_bias=True), kind=kind, weight_decay=0.5)
        for layer in model.layers:
            torch.nn.init.ones_(layer.attention.q_proj.bias)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(0.1)
        for name, parameter in model.named_parameters():
            expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
            torch.testing.assert_close(
                parameter.detach(), expected, rtol=1e-6, atol=1e-7, msg=f"{kind} {name}"
            )


def test_adamw_step_by_hand():
    model, optimizer = build(weight_decay=0.0, beta1=0.5, beta2=0.75, eps=1e-3, peak_lr=1.0)
    norm = model.final_norm.weight
    fill_gradients(model, 1)
    first = norm.grad.clone().double()
    optimizer.step(0.1)
    expected = 1 - 0.1 * first / (first.abs() + 1e-3)
    torch.testing.assert_close(norm.detach().double(), expected, rtol=1e-6, atol=1e-6)
    fill_gradients(model, 2)
    second = norm.grad.clone().double()
    optimizer.step(0.1)
    mean = (0.25 * first + 0.5 * second) / (1 - 0.25)
    square = (0.75 * 0.25 * first**2 + 0.25 * second**2) / (1 - 0.75**2)
    torch.testing.assert_close(
        norm.detach().double(), expected - 0.1 * mean / (square.sqrt() + 1e-3), rtol=1e-5, atol=1e-6
    )


def test_muon_takes_the_matrices_of_the_layers_and_makes_them_orthogonal():
    model, optimizer = build(replace(MODEL, qkv_bias=True), kind="muon", weight_decay=0.0, muon_momentum=0.9)
    states = optimizer.state_tensors
    before = model.layers[0].attention.q_proj.weight.detach().clone()
    fill_gradients(model, 1)
    optimizer.step(1.0)
    kinds = {
        name: {key.split("/")[1] for key in states() if key.startswith(name + "/")}
        for name in optimizer.named
    }
    for name, found in kinds.items():
        muon = name.startswith("layers.") and name.endswith("proj.weight")
        assert found == ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}), name
    singular = torch.linalg.svdvals(before - model.layers[0].attention.q_proj.weight.detach()) / (
        0.2 * math.sqrt(16)
    )
    assert singular.min() > 0.5  # five Newton-Schulz steps bring them to about 0.7 - 1.2
    assert singular.max() < 1.3


RATIOS = {"embedding_lr_ratio": 4.0, "head_lr_ratio": 0.5, "norm_lr_ratio": 0.25}


@pytest.mark.parametrize("kind", ["adamw", "muon", "torch's adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_have_rates_and_decay_of_their_own(kind, tied, monkeypatch):
    """Against float64. Of Muon those that AdamW trains; they alone have rates of their own."""
    if kind == "torch's adamw":
        monkeypatch.setattr("lumi.kernels.native.has_native", lambda device: False)
    ratios = {key: value for key, value in RATIOS.items() if not (tied and key == "head_lr_ratio")}
    settings = {"weight_decay": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 1e-3, "decay_embedding": False}
    shape = replace(MODEL, qkv_bias=True, tied_embeddings=tied)
    model, optimizer = build(shape, kind=kind.removeprefix("torch's "), **settings, **ratios)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    means, squares = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step, lr in ((1, 0.1), (2, 0.03)):
        fill_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.double()
            ratio, decay = 1.0, 0.5
            if "norm" in name or name.endswith("bias"):
                ratio, decay = 0.25, 0.0
            elif "embedding" in name:
                ratio, decay = 4.0, 0.0
            elif name == "lm_head.weight":
                ratio = 0.5
            means[name] = 0.5 * means[name] + 0.5 * gradient
            squares[name] = 0.75 * squares[name] + 0.25 * gradient**2
            mean, square = means[name] / (1 - 0.5**step), squares[name] / (1 - 0.75**step)
            update = mean / (square.sqrt() + 1e-3) + decay * weights[name]
            weights[name] = weights[name] - lr * ratio * update
        optimizer.step(lr)
    for name, parameter in model.named_parameters():
        if kind != "muon" or "proj.weight" not in name:
            torch.testing.assert_close(
                parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6, msg=name
            )


def test_a_rate_for_what_is_not_trained_is_refused():
    with pytest.raises(UserError, match=r"^optimizer.head_lr_ratio must be 1 where no head is trained, got"):
        build(replace(MODEL, tied_embeddings=True), head_lr_ratio=0.5)
    model = Transformer(MODEL, REFERENCE).init_weights(0)
    add_lora(model, LoraConfig(rank=2))
    for changes in ({"embedding_lr_ratio": 2.0}, {"norm_lr_ratio": 2.0}, {"decay_embedding": False}):
        with pytest.raises(UserError, match=rf"^optimizer.{next(iter(changes))} must be .* is trained, got "):
            Optimizer(model, OptimizerConfig(kind="muon", **changes))


def gradient_norm(model):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))


def step_on(kind, gradients, clip=None, **changes):
    """The model after one step on these gradients; `clip` is the loss scale to clip with, if any."""
    model, optimizer = build(kind=kind, **changes)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step(0.1, None if clip is None else optimizer.measure_gradients(clip))
    return model


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("max_norm", "loss_scale"), [(0.5, 1.0), (0.5, 8.0), (1e9, 8.0), (1e9, 1.0)])
def test_clipping_equals_a_step_on_scaled_gradients(kind, max_norm, loss_scale):
    model, optimizer = build(kind=kind)
    fill_gradients(model, 3)
    gradients, exact = [p.grad for p in model.parameters()], gradient_norm(model)
    before = [gradient.clone() for gradient in gradients]
    assert optimizer.measure_gradients(loss_scale).norm.item() == pytest.approx(exact / loss_scale, rel=1e-6)
    assert all(map(torch.equal, gradients, before))
    factor = min(1.0, max_norm / (exact / loss_scale)) / loss_scale
    settings = {
        "max_grad_norm": max_norm,
        "eps": 0.1,
    }  # with a large eps the update depends on the gradients' size
    actual = step_on(kind, gradients, loss_scale, **settings)
    expected = step_on(kind, [gradient * factor for gradient in gradients], **settings)
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_is_for_the_step_that_gets_it(kind):
    """What was measured must not scale the gradients of later steps."""
    model, optimizer = build(kind=kind, max_grad_norm=0.5, eps=0.1)
    fill_gradients(model, 1, scale=100.0)
    optimizer.step(0.0, optimizer.measure_gradients())
    fill_gradients(model, 2)
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.measure_gradients()
    optimizer.step(0.1)
    assert all(map(torch.equal, (p.grad for p in model.parameters()), expected))


def test_the_clip_factor_is_a_tensor():
    """By hand; a norm of zero, as of no gradients, changes nothing but the loss scale."""
    cases = [(8.0, 2.0, 1.0, 0.125), (8.0, 2.0, 100.0, 0.5), (0.0, 4.0, 1.0, 0.25)]
    for scaled_norm, loss_scale, max_norm, expected in cases:
        norm = torch.tensor(scaled_norm, dtype=torch.float64)
        factor = Clip(norm, loss_scale).factor(max_norm)
        assert (factor.dtype, factor.shape, factor.item()) == (torch.float32, (), expected)


class Reads(TorchDispatchMode):
    """Fails where the host asks for a value."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function.overloadpacket)
        assert name not in ("aten._local_scalar_dense", "aten.item", "aten.nonzero"), name
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("kind", [*KINDS, "torch's adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_step_on_what_is_not_finite_does_nothing(bad, kind, monkeypatch):
    """A gradient, or the loss. The host does not ask: the same holds of the steps that follow."""
    if kind == "torch's adamw":
        monkeypatch.setattr("lumi.kernels.native.has_native", lambda device: False)
    settings = KINDS[kind.removeprefix("torch's ")]
    (model, optimizer), (other, other_optimizer) = build(**settings), build(**settings)
    for seed in (3, 4, 5):
        fill_gradients(model, seed)
        fill_gradients(other, seed)
        if seed == 4 and bad is not None:
            model.final_norm.weight.grad[2] = bad
        before = {k: v.clone() for k, v in {**model.state_dict(), **optimizer.state_tensors()}.items()}
        # torch's own reads the count of its steps on a CPU, but not on a GPU
        with Reads() if kind != "torch's adamw" else contextlib.nullcontext():
            clip = optimizer.measure_gradients(2.0).only_if(torch.tensor(seed != 4 or bad is not None))
            optimizer.step(0.1, clip)
        assert bool(clip.accepted) == (seed != 4)
        if seed == 4:
            after = {**model.state_dict(), **optimizer.state_tensors()}
            assert all(torch.equal(after[key], value) for key, value in before.items())
        else:
            other_optimizer.step(0.1, other_optimizer.measure_gradients(2.0))
    after = {**other.state_dict(), **other_optimizer.state_tensors()}
    for name, value in {**model.state_dict(), **optimizer.state_tensors()}.items():
        assert torch.equal(value, after[name]), name


def test_a_parameter_without_a_gradient_keeps_its_own_count():
    model, optimizer = build()
    frozen = model.final_norm.weight
    before = frozen.detach().clone()
    for seed in range(3):
        fill_gradients(model, seed)
        if seed == 1:
            frozen.grad = None
            before = frozen.detach().clone()
        optimizer.step(0.1, optimizer.measure_gradients())
        if seed == 1:
            assert torch.equal(frozen.detach(), before)
    assert optimizer.state_tensors()["final_norm.weight/step"] == 2
    assert optimizer.state_tensors()["lm_head.weight/step"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_on_a_gpu_as_on_the_cpu(kind):
    model, optimizer = build(kind=kind)
    other = build()[0].cuda()
    other_optimizer = Optimizer(other, OptimizerConfig(kind=kind))
    for seed in range(4):
        fill_gradients(model, seed)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            b.grad = a.grad.cuda()
        if seed == 2:
            load_states(other_optimizer, {k: v.cpu() for k, v in other_optimizer.state_tensors().items()})
        clips = [o.measure_gradients(4.0) for o in (optimizer, other_optimizer)]
        assert clips[1].norm.item() == pytest.approx(clips[0].norm.item(), rel=1e-12)
        for o, clip in zip((optimizer, other_optimizer), clips, strict=True):
            o.step(0.01, clip)
    tolerance = 1e-5 if kind == "adamw" else 1e-2  # Muon computes in bfloat16
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=tolerance, atol=tolerance)


def test_no_gradients_no_step():
    model, optimizer = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    clip = optimizer.measure_gradients()
    assert clip.norm == 0
    optimizer.step(0.1, clip)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(state.any() for state in optimizer.state_tensors().values())


def test_states_and_updates_are_those_of_torch():
    """A checkpoint of one resumes in the other: names, shapes, dtypes, and numbers but for rounding."""
    model, optimizer = build(weight_decay=0.1)
    other, other_optimizer = build(weight_decay=0.1)
    config = other_optimizer.config
    groups = [
        {key: group[key] for key in ("params", "weight_decay")}
        for group in other_optimizer.optimizers[0].param_groups
    ]
    betas = (config.beta1, config.beta2)
    other_optimizer.optimizers = [torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps, fused=True)]
    for seed in range(4):
        if seed == 2:  # each goes on from the other's state
            ours, theirs = (
                {k: v.clone() for k, v in o.state_tensors().items()} for o in (optimizer, other_optimizer)
            )
            assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
                k: (v.shape, v.dtype) for k, v in theirs.items()
            }
            load_states(optimizer, theirs)
            load_states(other_optimizer, ours)
        for m, o in ((model, optimizer), (other, other_optimizer)):
            fill_gradients(m, seed)
            o.step(0.01, o.measure_gradients(loss_scale=4.0))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_native_code_for_the_device_torch_updates(monkeypatch):
    monkeypatch.setattr("lumi.kernels.native.has_native", lambda device: False)
    model, optimizer = build(max_grad_norm=0.5)
    assert type(optimizer.optimizers[0]) is torch.optim.AdamW
    fill_gradients(model, 3)
    optimizer.step(0.1, optimizer.measure_gradients())
    assert gradient_norm(model) == pytest.approx(0.5, rel=1e-5)


def test_other_dtypes_are_updated_by_torch():
    model = Transformer(MODEL, REFERENCE).init_weights(0)
    model.final_norm.double()
    assert type(Optimizer(model, OptimizerConfig()).optimizers[0]) is torch.optim.AdamW
    model.final_norm.float()
    assert type(Optimizer(model, OptimizerConfig()).optimizers[0]) is AdamW


@pytest.fixture
def mesh():
    """One process that is all of a device mesh."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_parameters_are_clipped_and_updated_as_whole_ones(mesh):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    settings = {
        "max_grad_norm": 0.5,
        "eps": 0.1,
    }  # with a large eps the update depends on the gradients' size
    model, optimizer = build(**settings)
    sharded = build()[0]
    shard = lambda t: distribute_tensor(t.detach(), mesh, [Shard(0)])

    def shard_parameters(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, torch.nn.Parameter(shard(parameter)))

    distribute_module(sharded, mesh, shard_parameters)
    sharded_optimizer = Optimizer(sharded, OptimizerConfig(**settings))
    assert type(sharded_optimizer.optimizers[0]) is AdamW
    for seed in range(2):
        fill_gradients(model, seed)
        for a, b in zip(model.parameters(), sharded.parameters(), strict=True):
            b.grad = shard(a.grad)
        clips = [o.measure_gradients(4.0) for o in (optimizer, sharded_optimizer)]
        assert clips[1].norm.item() == pytest.approx(clips[0].norm.item(), rel=1e-12)
        for o, clip in zip((optimizer, sharded_optimizer), clips, strict=True):
            o.step(0.1, clip)
    for a, b in zip(model.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(a, b.full_tensor(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adapters_alone(kind):
    """Every trained parameter is a matrix of the layers: with Muon nothing is left for AdamW."""
    model = Transformer(MODEL, REFERENCE).init_weights(0)
    add_lora(model, LoraConfig(rank=2))
    optimizer = Optimizer(model, OptimizerConfig(kind=kind))
    assert [type(o) for o in optimizer.optimizers] == [Muon if kind == "muon" else AdamW]
    before = {name: p.detach().clone() for name, p in optimizer.named.items()}
    for parameter in optimizer.named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1, optimizer.measure_gradients())
    assert not [name for name, p in optimizer.named.items() if torch.equal(p, before[name])]
    again = Optimizer(model, OptimizerConfig(kind=kind))
    load_states(again, optimizer.state_tensors())
    assert again.state_tensors().keys() == optimizer.state_tensors().keys()


def test_a_model_without_trained_parameters_is_refused():
    model = Transformer(MODEL, REFERENCE).init_weights(0).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model must have parameters that require gradients, got none$"):
        Optimizer(model, OptimizerConfig())


def test_no_norm_outlives_its_step():
    model, optimizer = build()
    fill_gradients(model, 3)
    clip = optimizer.measure_gradients()
    norm = weakref.ref(clip.scaled_norm)
    optimizer.step(0.1, clip)
    del clip
    assert norm() is None


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_state_round_trip_continues_bit_for_bit(settings):
    def run(model, optimizer, seeds):
        for seed in seeds:
            fill_gradients(model, seed)
            optimizer.step(0.01)

    model, optimizer = build(**settings)
    run(model, optimizer, range(3))
    weights, states = (
        {k: v.clone() for k, v in d.items()} for d in (model.state_dict(), optimizer.state_tensors())
    )
    run(model, optimizer, range(3, 6))
    resumed, resumed_optimizer = build(**settings)
    resumed.load_state_dict(weights)
    for state in resumed_optimizer.state_tensors().values():
        state.fill_(7.0)  # all that goes on has to come from the other's states
    load_states(resumed_optimizer, states)
    run(resumed, resumed_optimizer, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_are_there_from_the_start():
    """A checkpoint of step 0 has what one of any step has, and loading it changes nothing."""
    model, optimizer = build(kind="muon")
    before = {name: state.clone() for name, state in optimizer.state_tensors().items()}
    assert all((state == 0).all() for state in before.values())
    fill_gradients(model, 0)
    optimizer.step(0.1)
    after = optimizer.state_tensors()
    assert {name: state.shape for name, state in after.items()} == {
        name: state.shape for name, state in before.items()
    }
    assert all((state != 0).any() for state in after.values())
