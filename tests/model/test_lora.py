import copy
import dataclasses
import math
import pickle

import pytest
import torch
from crafted_models import LORA_KINDS
from parity import assert_parity

from lumi.config import UserError, from_dict
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.lora_linear import lora_linear
from lumi.model.lora import (
    LoraConfig,
    adapters,
    add_lora,
    apply_adapted,
    merge_lora,
    replace_token_matrices,
    trained_tensors,
    wrap,
)
from lumi.model.transformer import ModelConfig, Transformer, apply_each

SHAPE = ModelConfig(
    vocab_size=61, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, max_positions=64
)
TOKENS = torch.tensor([[1, 5, 9, 33, 60, 2, 7, 8], [3, 3, 3, 4, 5, 6, 7, 8]])
LINEARS = 7 * SHAPE.num_layers


def build(dtype=torch.float32, seed=3, ops=REFERENCE):
    return Transformer(SHAPE, ops, compute_dtype=dtype).init_weights(seed)


def adapted(config, dtype=torch.float32, trained=True, ops=REFERENCE, seed=3):
    """A model with adapters that do something, as after some training."""
    model = build(dtype, seed, ops)
    add_lora(model, config, seed=1)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, module in adapters(model):
                module.lora_B.copy_(0.3 * torch.randn(module.lora_B.shape, generator=generator))
                if module.lora_magnitude is not None:
                    module.lora_magnitude.mul_(
                        1 + 0.2 * torch.rand(module.lora_magnitude.shape, generator=generator)
                    )
    return model.eval()


def logits(model):
    hidden = model.hidden(TOKENS)
    return torch.nn.functional.linear(hidden, model.output_weight.to(hidden.dtype)).detach()


@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_it_begins_as_the_model_that_it_was_put_on(config):
    base, model = build(), build()
    add_lora(model, config)
    assert torch.allclose(logits(model), logits(base), rtol=0, atol=0 if not config.dora else 1e-6)
    for _, module in adapters(model):
        assert not module.lora_B.any()
        bound = 1 / math.sqrt(module.weight.shape[1])
        assert 0.5 * bound < module.lora_A.abs().max() <= bound
        assert module.lora_A.shape == (config.rank, module.weight.shape[1])


def test_one_linear_by_hand():
    model = adapted(LoraConfig(rank=2, alpha=6, targets=("o_proj",)))
    module = model.layers[0].attention.o_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = (
        x.double() @ module.weight.double().T
        + 6 / 2 * (x.double() @ module.lora_A.double().T) @ module.lora_B.double().T
    )
    assert_parity(
        "y",
        module(x).detach(),
        (x @ module.weight.T + 3 * x @ module.lora_A.T @ module.lora_B.T).detach(),
        expected.detach(),
    )
    assert LoraConfig(rank=4, alpha=6, rslora=True).scale == 3
    assert LoraConfig(rank=4, alpha=6).scale == 1.5


def test_dora_by_hand():
    module = adapted(LoraConfig(rank=2, alpha=6, dora=True)).layers[1].mlp.up_proj
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = module.weight.double() + 3 * module.lora_B.double() @ module.lora_A.double()
    expected = x @ (module.lora_magnitude.double()[:, None] * weight / weight.norm(dim=1, keepdim=True)).T
    assert torch.allclose(module(x), expected, rtol=1e-6, atol=1e-7)


def test_only_the_adapters_are_trained():
    model = adapted(LoraConfig(rank=4))
    names = list(trained_tensors(model))
    assert len(names) == 2 * LINEARS
    assert all(name.endswith((".lora_A", ".lora_B")) for name in names)
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("all-linear",), 14),
        (("q_proj", "v_proj"), 4),
        (("mlp.gate_proj",), 2),
        (("layers.1.attention.k_proj",), 1),
    ],
)
def test_targets(targets, count):
    model = build()
    add_lora(model, LoraConfig(targets=targets))
    assert sum(1 for _ in adapters(model)) == count
    assert all(
        any(target == "all-linear" or name.endswith(target) for target in targets)
        for name, _ in adapters(model)
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lm_head",), "got 'lm_head' .the loss is fused with it"),
        (
            ("q_proj", "query"),
            "names of linears .down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.*, got 'query'",
        ),
        (("proj",), "got 'proj'"),
    ],
)
def test_targets_that_are_none(targets, message):
    with pytest.raises(UserError, match=message):
        add_lora(build(), LoraConfig(targets=targets))


def test_one_target_may_stand_without_a_list():
    assert (
        from_dict(LoraConfig, {"targets": "all-linear"})
        == from_dict(LoraConfig, {"targets": ["all-linear"]})
        == LoraConfig()
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": []}, "targets must name linears"),
        ({"r": 8}, "unknown key"),
    ],
)
def test_refuses(data, message):
    with pytest.raises(UserError, match=message):
        from_dict(LoraConfig, data)


@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_merged_is_base_and_adapter(config):
    exact = logits(adapted(config, torch.float64))
    apart = adapted(config)
    same_dtype = logits(apart)
    assert (same_dtype - logits(build())).abs().max() > 0.01  # the adapter does something
    merge_lora(apart)
    assert not list(adapters(apart))
    assert apart.state_dict().keys() == build().state_dict().keys()
    assert_parity("logits", logits(apart), same_dtype, exact, slack=3.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_a_bias_is_added_as_it_is(config, dropout):
    """To what the adapted linear without it computes; DoRA's lengths do not stretch it. It is not trained."""
    model = Transformer(dataclasses.replace(SHAPE, qkv_bias=True), REFERENCE).init_weights(3)
    attention, biases = model.layers[0].attention, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        biases[name] = attention.get_submodule(name).bias
        torch.nn.init.normal_(biases[name])
    add_lora(model, dataclasses.replace(config, dropout=dropout))
    with torch.no_grad():
        for _, module in adapters(model):
            torch.nn.init.normal_(module.lora_B, std=0.1)
            if module.lora_magnitude is not None:
                module.lora_magnitude.mul_(1.5)
    x, linears = torch.randn(3, 16), [attention.q_proj, attention.k_proj, attention.v_proj]
    torch.manual_seed(0)
    with_bias = attention.project(x, *linears)
    for linear in linears:
        linear.bias = None
    torch.manual_seed(0)
    without = attention.project(x, *linears)
    for y, plain, linear, bias in zip(with_bias, without, linears, biases.values(), strict=True):
        torch.testing.assert_close(y, plain + bias)
        linear.bias = bias
    assert not any(bias.requires_grad for bias in biases.values())
    merge_lora(model)
    merged = {name: attention.get_submodule(name).bias for name in biases}
    assert all(
        torch.equal(merged[name], bias) and merged[name].requires_grad for name, bias in biases.items()
    )


@pytest.mark.parametrize("config", [LORA_KINDS[0], LORA_KINDS[3]], ids=["plain", "dora"])
def test_packed_loss_and_gradients_are_the_sum_over_conversations(config):
    lengths, untrained = [3, 1, 5], [0, 3, 4]
    tokens = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(2))
    targets[0, untrained] = -100
    packed, apart = adapted(config, torch.float64), adapted(config, torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    loss = packed(tokens, targets, positions, torch.tensor([0, 3, 4, 9], dtype=torch.int32))
    loss.backward()
    losses = [
        apart(t, y) for t, y in zip(tokens.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True)
    ]
    sum(losses).backward()
    assert torch.allclose(loss, sum(losses), rtol=1e-12)
    for name, parameter in trained_tensors(packed).items():
        assert torch.allclose(parameter.grad, trained_tensors(apart)[name].grad, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens_are_trained_and_no_others(tied):
    shape = dataclasses.replace(SHAPE, tied_embeddings=tied)
    model, base = (Transformer(shape, REFERENCE).init_weights(3) for _ in range(2))
    add_lora(model, LoraConfig(rank=4), token_ids=[7, 60])
    assert torch.equal(logits(model), logits(base))
    assert sum(name.endswith(".rows") for name in trained_tensors(model)) == (1 if tied else 2)
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=0.1, weight_decay=0.0)
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    optimizer.step()
    merge_lora(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    for name in ("token_embedding.weight",) if tied else ("token_embedding.weight", "lm_head.weight"):
        changed = (model.state_dict()[name] != base.state_dict()[name]).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [7, 60]


def test_gradient_checkpointing_changes_memory_not_numbers():
    """Dropout included: what is recomputed draws the same numbers again."""
    gradients = []
    for checkpointing in (False, True):
        model = adapted(LoraConfig(rank=4, dropout=0.3)).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        gradients.append([tensor.grad for tensor in trained_tensors(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_dropout_is_of_training_alone_and_follows_the_seed():
    model = adapted(LoraConfig(rank=4, dropout=0.5))
    still = logits(model)
    assert torch.equal(still, logits(adapted(LoraConfig(rank=4))))
    model.train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(logits(model))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], still)


def recorded(operator=REFERENCE.lora_linear):
    """A bundle that records how many linears each call of `lora_linear` has, and the list of its records."""
    calls = []

    def recording(x, weights, *adapters):
        calls.append(len(weights))
        return operator(x, weights, *adapters)

    return dataclasses.replace(REFERENCE, lora_linear=recording), calls


@pytest.mark.parametrize(
    ("changes", "training", "calls"),
    [
        ({}, True, [3, 1, 2, 1]),  # q k v, o, gate up, down
        ({"targets": ("q_proj", "v_proj")}, True, [2]),
        ({"targets": ("up_proj", "o_proj")}, True, [1, 1]),
        ({"dropout": 0.5}, True, []),
        ({"dropout": 0.5}, False, [3, 1, 2, 1]),
        ({"dora": True}, True, [1] * 7),
        ({"dora": True, "dropout": 0.5}, True, []),
    ],
    ids=["all", "q and v", "one of each", "dropout", "dropout at rest", "dora", "dora and dropout"],
)
def test_linears_of_one_input_are_one_operator(changes, training, calls):
    ops, made = recorded()
    model = adapted(LoraConfig(rank=4, **changes), ops=ops).train(training)
    torch.manual_seed(0)
    ours = logits(model)
    assert made == calls * SHAPE.num_layers
    for layer in model.layers:  # and that changes nothing
        layer.attention.project = layer.mlp.project = apply_each
    torch.manual_seed(0)
    assert torch.equal(ours, logits(model))


def test_one_layer_alone_is_adapted():
    ops, made = recorded()
    model = adapted(LoraConfig(rank=4, targets=("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")), ops=ops)
    owners = [module for layer in model.layers for module in (layer.attention, layer.mlp)]
    logits(model)
    assert made == [2]
    assert [owner.project for owner in owners] == [apply_each, apply_each, apply_each, apply_adapted]
    merge_lora(model)
    logits(model)
    assert made == [2]
    assert all(owner.project is apply_each for owner in owners)


@pytest.mark.parametrize("config", LORA_KINDS, ids=["plain", "rslora", "some", "dora"])
def test_the_fast_operator_trains_the_same_adapters(config):
    """Float64 judges the gradients of several models: one rounding error reaches most of one model's."""
    fast = dataclasses.replace(REFERENCE, lora_linear=lora_linear)
    gradients = []
    for dtype, ops in ((torch.float32, fast), (torch.float32, REFERENCE), (torch.float64, REFERENCE)):
        models = [adapted(config, dtype, ops=ops, seed=seed).to(dtype).train() for seed in range(4)]
        for model in models:
            for _, module in adapters(model):
                module.lora_B.data /= 5  # larger ones amplify rounding errors on the way through the norms
            model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        trained = [parameter for model in models for parameter in trained_tensors(model).values()]
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    assert_parity("gradient", *gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_layer_trains_the_same_adapters(checkpointing):
    torch._dynamo.reset()
    ops = dataclasses.replace(REFERENCE, lora_linear=lora_linear)
    gradients = []
    for compiled in (False, True):
        model = adapted(
            LoraConfig(rank=4, targets=("q_proj", "v_proj", "gate_proj", "up_proj")), torch.bfloat16, ops=ops
        ).train()
        model.gradient_checkpointing = checkpointing
        if compiled:
            model.layers[1].compile(backend="aot_eager", fullgraph=True)
        model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        gradients.append([tensor.grad for tensor in trained_tensors(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_an_adapted_model_is_copied_and_pickled():
    model = adapted(LoraConfig(rank=4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert other.layers[0].mlp.project is apply_adapted
        assert other.state_dict().keys() == model.state_dict().keys()


def test_the_base_is_kept_in_bfloat16_where_asked():
    model = adapted(LoraConfig(rank=4, base_dtype="bfloat16"))
    for name, parameter in model.named_parameters():
        narrow = parameter.ndim >= 2 and "lora" not in name
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
    rounded = adapted(LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim >= 2 and "lora" not in name:
                parameter.copy_(parameter.bfloat16())
    assert torch.equal(logits(model), logits(rounded))
    merge_lora(model)
    assert all(
        parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters()
    )


def test_the_seed_makes_the_adapters():
    def weights(seed):
        model = build()
        add_lora(model, LoraConfig(rank=4), seed)
        return torch.cat([module.lora_A.detach().flatten() for _, module in adapters(model)])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_linears_may_have_a_config_of_their_own():
    model, own = build(), LoraConfig(rank=2, alpha=10)
    names = ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]
    wrap(model, names, LoraConfig(rank=3), own={names[1]: own})
    assert [(len(module.lora_A), module.config.scale) for _, module in adapters(model)] == [
        (3, 32 / 3),
        (2, 5),
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_other_matrices_of_tokens(tied):
    model = build().eval()
    generator = torch.Generator().manual_seed(1)
    embedding, output = (torch.randn(70, SHAPE.model_dim, generator=generator) for _ in range(2))
    replace_token_matrices(model, embedding, None if tied else output)
    assert (model.config.vocab_size, model.config.tied_embeddings) == (70, tied)
    expected = Transformer(model.config, REFERENCE).init_weights(3).eval()
    with torch.no_grad():
        expected.token_embedding.weight.copy_(embedding)
        expected.output_weight.copy_(embedding if tied else output)
    names = [name for name, _ in expected.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    for name in names[1:]:  # the layers are those of before
        if name.startswith("layers."):
            expected.get_parameter(name).data = build().get_parameter(name).data
    assert torch.equal(logits(model), logits(expected))


def test_the_ids_of_trained_tokens():
    config = LoraConfig(tokens=("<b>", "<a>", "<b>"))
    assert config.token_ids({"<a>": 4, "<b>": 2, "<c>": 3}) == [2, 4]
    with pytest.raises(UserError, match=r"lora\.tokens must be control pieces .*\(<a>\), got '<b>'"):
        config.token_ids({"<a>": 4})
