"""The same weights under two bundles: one training step, with adapters and without, judged by float64."""

import functools

import pytest
import torch
from parity import assert_parity

from lumi.kernels.bundle import NATIVE, REFERENCE, TRITON
from lumi.model.lora import LoraConfig, adapters, add_lora, trained_tensors
from lumi.model.transformer import ModelConfig, Transformer

SHAPES = {
    "grouped": {"num_kv_heads": 2},
    "tied, qk-norm, head_dim 96": {
        "num_kv_heads": 1,
        "tied_embeddings": True,
        "qk_norm": True,
        "head_dim": 96,
    },
    "biases, a window behind a full layer": {
        "qkv_bias": True,
        "num_kv_heads": 2,
        "window": 11,
        "full_attention_layers": 1,
    },
    "a window, no rope in the last layer": {"window": 5, "no_rope_layer_interval": 2},
}


LORA = LoraConfig(rank=3, alpha=5)
KERNELS = pytest.mark.parametrize("ops", [TRITON, NATIVE], ids=lambda ops: ops.name)


@functools.cache  # several tests need the same steps, and Triton's interpreter takes seconds for each
def step(shape, ops, dtype, device, lora, seed, how="plain", joined=False):
    """Loss and gradients of one packed batch, all in `dtype`; or products in `dtype` of float32 masters that
    are joined."""
    sizes = SHAPES[shape]
    config = ModelConfig(vocab_size=97, num_layers=2, model_dim=64, num_heads=4, mlp_dim=96, **sizes)
    model = Transformer(config, ops, compute_dtype=dtype).init_weights(seed)
    model.gradient_checkpointing = how == "checkpointed"
    generator = torch.Generator().manual_seed(seed)
    if lora is not None:
        add_lora(model, lora)
        # With a B of zero, A has no gradient; with a large one, norms amplify rounding errors.
        for _, module in adapters(model):
            module.lora_B.data = 0.05 * torch.randn(module.lora_B.shape, generator=generator)
    model = model.to(device).join_weights() if joined else model.to(device, dtype)
    for layer in model.layers if how == "compiled" else ():
        layer.compile(fullgraph=True, backend="aot_eager")
    tokens, targets = (torch.randint(0, 97, (2, 40), generator=generator).to(device) for _ in range(2))
    targets[0, 5:9] = -100
    lengths = [17, 22, 1, 40]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, 40).to(device)
    cu_seqlens = torch.tensor([0, 17, 39, 40, 80], dtype=torch.int32, device=device)
    loss = model(tokens, targets, positions, cu_seqlens)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained_tensors(model).items()}
    return {"loss": loss.detach()} | gradients


@KERNELS
@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_under_kernels_is_one_under_the_reference(shape, ops, device):
    device = "cpu" if ops is NATIVE else device
    exact = step(shape, REFERENCE, torch.float64, device, None, 0)
    same_dtype = step(shape, REFERENCE, torch.float32, device, None, 0)
    for joined in (False, True):
        actual = step(shape, ops, torch.float32, device, None, 0, joined=joined)
        assert exact.keys() == actual.keys()
        for name in exact:
            assert_parity(name, actual[name], same_dtype[name], exact[name])


@pytest.mark.soak  # the operators of a step and of adapters have their own parity tests
@KERNELS
def test_one_step_with_adapters(ops, device):
    """Adapters on all seven linears of each layer; they alone are trained.

    All A's and all B's of several models are judged together: one rounding error reaches most of one model's.
    """
    device = "cpu" if ops is NATIVE else device
    exact, same_dtype, actual = (
        [step("grouped", each, dtype, device, LORA, seed) for seed in range(4)]
        for each, dtype in ((REFERENCE, torch.float64), (REFERENCE, torch.float32), (ops, torch.float32))
    )
    assert exact[0].keys() == actual[0].keys()
    assert len(exact[0]) == 1 + 2 * 7 * 2
    for part in ("loss", "lora_A", "lora_B"):
        joined = lambda steps, part=part: torch.cat(
            [t.flatten() for each in steps for name, t in each.items() if name.endswith(part)]
        )
        assert_parity(part, joined(actual), joined(same_dtype), joined(exact))


@pytest.mark.parametrize(
    ("how", "lora"),
    [
        pytest.param("compiled", LORA, id="compiled-adapters"),
        pytest.param("checkpointed", None, id="checkpointed-whole"),
        pytest.param("compiled", None, marks=pytest.mark.soak, id="compiled-whole"),
        pytest.param("checkpointed", LORA, marks=pytest.mark.soak, id="checkpointed-adapters"),
    ],
)
@KERNELS
def test_compiled_and_checkpointed_it_is_the_same_step(how, lora, ops, device):
    """Bit for bit: every operator is one node of the graph, with known shapes."""
    device = "cpu" if ops is NATIVE else device
    plain = step("grouped", ops, torch.float32, device, lora, 0)
    other = step("grouped", ops, torch.float32, device, lora, 0, how)
    assert plain.keys() == other.keys()
    for name in plain:
        assert torch.equal(plain[name], other[name]), name


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joined_weights_give_the_same_step_compiled_and_checkpointed(dtype, how):
    plain, other = (step("grouped", NATIVE, dtype, "cpu", None, 0, each, True) for each in ("plain", how))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@KERNELS
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=3)], ids=["whole", "adapters"])
def test_one_graph_serves_all_lengths(lora, ops, device):
    """A layer is compiled once for all lengths: the shapes of fake results follow those of the inputs."""
    torch.compiler.reset()
    config = ModelConfig(vocab_size=97, num_layers=1, model_dim=32, num_heads=2, mlp_dim=48)
    device = "cpu" if ops is NATIVE else device
    model = Transformer(config, ops).init_weights(0).to(device)
    if lora is not None:
        add_lora(model, lora)
    model.join_weights()
    graphs = []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward
    model.layers[0].compile(fullgraph=True, dynamic=True, backend=count)
    for length in (5, 7, 11):
        model.hidden(torch.zeros(2, length, dtype=torch.int64, device=device))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_a_step_waits_for_nothing_and_can_be_captured():
    """With offsets on the device, nothing synchronises, and a CUDA graph replays the step."""
    config = ModelConfig(vocab_size=97, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=96)
    model = Transformer(config, TRITON, compute_dtype=torch.bfloat16).init_weights(0).to("cuda")
    tokens, targets = (torch.randint(0, 97, (2, 40), device="cuda") for _ in range(2))
    cu_seqlens = torch.tensor([0, 17, 40, 80], dtype=torch.int32, device="cuda")

    def step():
        model.zero_grad()
        loss = model(tokens, targets, None, cu_seqlens)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [t.clone() for t in step()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for t in captured:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=lambda ops: ops.name)
def test_z_loss_and_its_gradients_against_float64(ops):
    """By torch's operators on the hidden states; not in evaluation."""
    config = ModelConfig(vocab_size=97, num_layers=2, model_dim=64, num_heads=4, mlp_dim=96)
    results = []
    for dtype, bundle in ((torch.float64, REFERENCE), (torch.float32, REFERENCE), (torch.float32, ops)):
        model = Transformer(config, bundle, compute_dtype=dtype).init_weights(1).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(30)
        tokens, targets = torch.randint(0, 97, (2, 2, 40), generator=torch.Generator().manual_seed(0))
        targets[0, 5:9] = -100
        if len(results) < 2:
            logits = model.hidden(tokens).flatten(0, 1) @ model.lm_head.weight.T
            plain = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
            trained = logits[targets.flatten() != -100]
            loss = plain + 0.1 * trained.exp().sum(dim=1).log().square().sum()
            assert loss > 1.2 * plain
        else:
            model.z_loss = 0.1
            loss = model.train()(tokens, targets)
            assert model.eval()(tokens, targets).item() == pytest.approx(plain.item(), rel=1e-5)
        loss.backward()
        results.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    exact, same_dtype, actual = results
    for name, value in actual.items():
        assert_parity(name, value, same_dtype[name], exact[name])
