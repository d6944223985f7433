"""Joined weights beside the same model without them."""

import copy

import pytest
import torch
from parity import assert_parity
from torch.utils._python_dispatch import TorchDispatchMode

from lumi.kernels.bundle import REFERENCE
from lumi.model.lora import LoraConfig, add_lora, merge_lora
from lumi.model.transformer import ModelConfig, Transformer
from lumi.training.optimizer import Optimizer
from lumi.training.optimizer_config import OptimizerConfig

SIZES = {"vocab_size": 97, "num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}
SHAPES = {
    "plain": {},
    "tied, biases": {"tied_embeddings": True, "qkv_bias": True},
    "qk-norm": {"qk_norm": True},
    "no rope": {"no_rope_layer_interval": 2},
}
BF16 = torch.bfloat16


def build(dtype, joined=True, seed=0, **shape):
    model = Transformer(ModelConfig(**SIZES | shape), REFERENCE, compute_dtype=dtype).init_weights(seed)
    model = model.double() if dtype == torch.float64 else model
    return model.join_weights() if joined else model


def batch(seed):
    tokens = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return tokens[:, :-1], tokens[:, 1:]


def backward(model, seed=0):
    loss = model(*batch(seed), expected_dloss=1 / 128)
    (loss / 128).backward()
    return loss.detach()


def step(model, optimizer, seed):
    backward(model, seed)
    optimizer.step(0.002, optimizer.measure_gradients())
    optimizer.zero_grad()


def copies(model):
    return list(model.compute_weights.copies().values())


def assert_copied(model):
    assert copies(model)
    for each in copies(model):
        assert each.is_fresh()
        assert torch.equal(each.rows, each.master.to(BF16))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_loss_is_the_same_and_gradients_are_at_least_as_exact(shape):
    """Each sum of a product runs over the same numbers as before. Only x's gradient is rounded less often."""
    models = build(torch.float64, False, **shape), build(BF16, False, **shape), build(BF16, **shape)
    exact, same_dtype, actual = (backward(model) for model in models)
    assert_parity("loss", actual, same_dtype, exact)
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in models]
    for name, gradient in gradients[2].items():
        assert gradient.dtype == torch.float32
        assert_parity(name, gradient, gradients[1][name], gradients[0][name])
    for name in ("layers.1.mlp.down_proj.weight", "final_norm.weight", "lm_head.weight"):  # before any sum
        if name in gradients[2]:
            assert torch.equal(gradients[1][name], gradients[2][name])


KINDS = {
    "adamw": {"kind": "adamw", "head_lr_ratio": 0.5},
    "muon": {"kind": "muon"},
    "normuon": {"kind": "muon", "muon_beta2": 0.9},
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_is_as_near_to_float64_as_without_them(kind):
    curves = []
    for dtype, joined in ((torch.float64, False), (BF16, False), (BF16, True)):
        model = build(dtype, joined)
        optimizer, losses = Optimizer(model, OptimizerConfig(kind=kind)), []
        for number in range(20):
            losses.append(backward(model, 2 * number) / 128)
            step(model, optimizer, 2 * number + 1)  # with the gradients of both
        curves.append(torch.stack(losses).double())
    exact, before, now = curves
    assert exact[-1] < exact[0] - 0.9
    assert (now - exact).abs().max() <= 2 * (before - exact).abs().max()


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.casts = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.names.append(function._schema.name)
        if function._schema.name in ("aten::_to_copy", "aten::copy_"):
            self.casts += result.dtype == BF16 and result.ndim == 2
        return result


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_layer_is_four_products_and_no_weight_is_cast(settings):
    model = build(BF16)
    optimizer = Optimizer(model, OptimizerConfig(**settings))
    step(model, optimizer, 0)
    backward(model)
    optimizer.step(0.002, optimizer.measure_gradients())
    assert_copied(model)
    with Counted() as forward:
        model.hidden(batch(0)[0])
    assert forward.names.count("aten::mm") == 4 * 2
    assert forward.casts == 0
    assert "aten::_foreach_copy_" not in forward.names


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_skipped_step_leaves_masters_and_copies(settings):
    model = build(BF16)
    optimizer = Optimizer(model, OptimizerConfig(**settings))
    step(model, optimizer, 0)
    before = [(each.master.detach().clone(), each.rows.clone()) for each in copies(model)]
    backward(model)
    model.lm_head.weight.grad[0, 0] = torch.inf
    optimizer.step(0.002, optimizer.measure_gradients())
    for each, (master, rows) in zip(copies(model), before, strict=True):
        assert torch.equal(each.master, master)
        assert torch.equal(each.rows, rows)
    # The device alone may know of it: the host then calls the operator, which writes nothing.
    for inner in optimizer.optimizers if settings["kind"] == "adamw" else ():
        with torch.no_grad():
            model.lm_head.weight.add_(1)  # what nobody has read yet must not pass for copied
        inner.step(norm=torch.tensor(torch.nan, dtype=torch.float64))
        assert torch.equal(model.lm_head.weight.detach(), before[-1][0] + 1)
        assert_copied(model)


def other_weights(model):
    return build(BF16, False, seed=1, tied_embeddings=model.lm_head is None).state_dict()


def test_whatever_writes_a_master_is_seen_by_the_next_pass():
    def edit(model):
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3] = 7.0

    def replace(model):
        model.layers[0].attention.k_proj.weight.data = torch.ones(32, 64)

    def step_without_gradients(model):
        optimizer = Optimizer(model, OptimizerConfig())
        edit(model)
        model.layers[1].mlp.up_proj.weight.grad = None
        model.final_norm.weight.grad = torch.ones(64)
        optimizer.step(0.1)

    for write in (
        lambda model: model.load_state_dict(other_weights(model)),
        lambda model: model.load_state_dict(other_weights(model), assign=True),
        lambda model: model.init_weights(2),
        edit,
        replace,
        step_without_gradients,
    ):
        model = build(BF16)
        backward(model)
        model.zero_grad()
        write(model)
        plain = build(BF16, False)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(backward(model), backward(plain))
        assert_copied(model)


def test_names_and_values_of_a_state_are_the_masters():
    for dtype in (BF16, torch.float32):
        plain, joined = build(dtype, False), build(dtype)
        assert list(plain.state_dict()) == list(joined.state_dict())
        for name, value in plain.state_dict().items():
            assert torch.equal(joined.state_dict()[name], value)
            assert joined.get_parameter(name).is_contiguous()


def test_masters_of_the_compute_dtype_move_together():
    model = build(torch.float32)
    weight = lambda name: model.get_parameter(f"layers.1.{name}_proj.weight")
    assert weight("attention.k").data_ptr() == weight("attention.q").data_ptr() + 4 * 64 * 64
    assert weight("mlp.up").untyped_storage().data_ptr() == weight("mlp.gate").untyped_storage().data_ptr()
    assert copies(model) == []
    optimizer, plain = Optimizer(model, OptimizerConfig()), build(torch.float32, False)
    plain_optimizer = Optimizer(plain, OptimizerConfig())
    for number in range(3):
        step(model, optimizer, number)
        step(plain, plain_optimizer, number)
    torch.testing.assert_close(backward(model), backward(plain), rtol=1e-6, atol=0)
    with Counted() as forward:
        model.hidden(batch(0)[0])
    assert forward.names.count("aten::mm") == 4 * 2


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["copied", "other dtype", "moved"])
def test_masters_that_went_elsewhere_are_joined_again(dtype, how):
    model = build(dtype)
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "other dtype":
        model = model.to(BF16)
        model.compute_dtype = BF16
    else:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        expected = build(model.compute_dtype, False)
        for mine, other in zip(expected.parameters(), model.parameters(), strict=True):
            mine.data = other.data.clone()
        assert torch.equal(model.hidden(batch(0)[0]), expected.hidden(batch(0)[0]))
    (attention,) = (layer.attention for layer in model.layers[:1])
    assert attention.q_proj.joined.holds([attention.q_proj, attention.k_proj, attention.v_proj])
    assert attention.q_proj.joined.copies == (how != "other dtype" and dtype == BF16)


def test_a_model_that_was_joined_without_gradients_trains():
    model = build(BF16, False)
    with torch.inference_mode():
        model.join_weights()
    assert not copies(model)[0].rows.is_inference()
    step(model, Optimizer(model, OptimizerConfig()), 0)
    assert_copied(model)


def test_frozen_masters_and_float16_are_cast_at_every_use():
    assert copies(build(torch.float16)) == []
    assert build(torch.float16).layers[0].mlp.gate_proj.joined is None
    model = build(BF16, False)
    add_lora(model, LoraConfig(rank=2, targets="q_proj"))
    assert copies(model.join_weights()) == []
    model = build(torch.float32, False)
    add_lora(model, LoraConfig(rank=2, targets="q_proj"))
    model.join_weights()
    assert model.layers[0].attention.k_proj.joined is None
    assert model.layers[0].mlp.up_proj.joined is not None  # frozen, and of the compute dtype
    before = model.hidden(batch(0)[0])
    backward(model)
    assert model.layers[0].mlp.up_proj.weight.grad is None
    merge_lora(model)
    torch.testing.assert_close(model.hidden(batch(0)[0]), before)
