import pytest
import torch

from lumi.data.batches import IGNORE, collate
from lumi.data.rows import TokenRow
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import ModelConfig, Transformer

TINY = {"vocab_size": 61, "num_layers": 2, "model_dim": 32, "num_heads": 4, "mlp_dim": 48}
SHAPES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one kv head, tied": {"num_kv_heads": 1, "tied_embeddings": True},
    "qk-norm, wide heads": {"qk_norm": True, "head_dim": 16},
    "biases": {"qkv_bias": True, "num_kv_heads": 2},
    "a window": {"window": 3},
    "a window behind a full layer, no rope in the last": {
        "window": 2,
        "full_attention_layers": 1,
        "no_rope_layer_interval": 2,
    },
}


def build(**changes):
    model = Transformer(ModelConfig(**TINY | changes), REFERENCE).init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model


def random_documents(lengths, vocab=61):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def as_row(document):
    """Tokens and targets (1, T) of one document on its own; the last token predicts nothing."""
    targets = torch.cat([document[1:], torch.tensor([IGNORE])])
    return document[None], targets[None]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_loss_and_gradients_are_the_sum_over_documents(shape):
    documents = random_documents([5, 1, 9, 3, 6, 6])
    rows, length = [[0, 1, 2], [3, 4, 5]], 15
    model = build(**SHAPES[shape]).double()
    model.compute_dtype = torch.float64

    pieces = [[as_row(documents[d]) for d in row] for row in rows]
    tokens = torch.cat([torch.cat([t for t, _ in row], 1) for row in pieces])
    targets = torch.cat([torch.cat([t for _, t in row], 1) for row in pieces])
    lengths = [len(documents[d]) for row in rows for d in row]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, length)
    packed_loss = model(tokens, targets, positions, cu_seqlens)
    packed_loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    separate = [model(*as_row(document)) for document in documents]
    sum(separate).backward()
    assert packed_loss.item() == pytest.approx(sum(loss.item() for loss in separate), rel=1e-12)
    for ours, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_packed_document_does_not_see_its_neighbour():
    model = build()
    a, b, c = random_documents([6, 6, 6])
    positions = torch.arange(6).repeat(2)[None]
    cu_seqlens = torch.tensor([0, 6, 12], dtype=torch.int32)
    with torch.no_grad():
        first, second = (model.hidden(torch.cat([x, b])[None], positions, cu_seqlens)[0, 6:] for x in (a, c))
        assert torch.equal(first, second)
        assert not torch.equal(
            model.hidden(torch.cat([a, b])[None])[0, 6:], model.hidden(torch.cat([c, b])[None])[0, 6:]
        )


@pytest.mark.parametrize("tied", [False, True])
def test_trained_on_counting_it_predicts_the_next_number(tied):
    """Targets shifted twice would make it predict t+2, targets not shifted t."""
    model = build(tied_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        starts = torch.randint(0, 61, (16, 1), generator=generator)
        sequences = ((starts + torch.arange(17)) % 61).numpy()
        no_starts = torch.zeros(17, dtype=torch.bool).numpy()
        batch = collate([TokenRow(row, no_starts, ~no_starts, []) for row in sequences])
        loss = model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens) / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tokens = (torch.arange(61)[:, None] + torch.arange(8)) % 61
        predicted = model.logits(model.hidden(tokens)[:, -1]).argmax(-1)
    assert torch.equal(predicted, (tokens[:, -1] + 1) % 61)
    assert loss.item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_two_steps_of_the_residual_stream(dtype):
    """Bit by bit what the formula says, although a sum and the norm behind it are one operator."""
    model = build()
    tokens = random_documents([20])[0][None]
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    model.compute_dtype = dtype
    model.hidden(tokens)
    for layer, (x, context) in zip(model.layers, tuple(inputs), strict=True):
        middle = x + layer.attention(layer.attention_norm(x), context)
        assert torch.equal(layer(x, context), middle + layer.mlp(layer.mlp_norm(middle)))


def test_gradient_checkpointing_changes_memory_not_numbers():
    plain, recomputing = build(), build()
    recomputing.gradient_checkpointing = True
    tokens, targets = as_row(random_documents([20])[0])
    saved = []
    for model in (plain, recomputing):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(tokens, targets)
        saved.append(kept)
        loss.backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert saved[1] < saved[0] / 2


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters():
    exact, model = build(), build()
    model.compute_dtype = torch.bfloat16
    tokens, targets = as_row(random_documents([40])[0])
    assert model.hidden(tokens).dtype == torch.bfloat16
    loss, exact_loss = model(tokens, targets), exact(tokens, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    difference = abs(loss.item() / exact_loss.item() - 1)
    assert 0 < difference < 8 * torch.finfo(torch.bfloat16).eps


def test_the_seed_makes_the_weights():
    one, same = build(), build()
    other = Transformer(one.config, REFERENCE).init_weights(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)
    wide = Transformer(ModelConfig(**TINY | {"model_dim": 256, "num_layers": 8}), REFERENCE).init_weights(0)
    assert wide.layers[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert wide.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)


def seen_by_last(model, length):
    """The tokens of a row that reach the last hidden state."""
    last_D = model.hidden(torch.arange(length)[None])[0, -1]
    (gradient_VD,) = torch.autograd.grad((last_D * torch.arange(32)).sum(), model.token_embedding.weight)
    return gradient_VD.abs().amax(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, range(20)),
        ({"window": 3}, range(15, 20)),  # two before itself, and two before these
        ({"window": 3, "full_attention_layers": 1}, range(20)),
        ({"window": 1}, [19]),
        ({"window": 30}, range(20)),
    ],
    ids=str,
)
def test_what_reaches_a_token_through_windows(changes, expected):
    assert seen_by_last(build(**changes), 20) == list(expected)


def test_without_rope_positions_say_nothing():
    """All layers without it: the last token sees a set. One layer with it: a sequence."""
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    for interval, is_same in ((1, True), (2, False)):
        model = build(no_rope_layer_interval=interval, num_layers=2).double()
        model.compute_dtype = torch.float64
        with torch.no_grad():
            first, second = (
                model.hidden(tokens, torch.tensor([positions]))[0, -1]
                for positions in ([0, 1, 2, 3, 4], [0, 2, 7, 9, 10])
            )
        assert torch.equal(first, second) == is_same


def test_biases_are_zero_at_first_and_are_trained():
    model = Transformer(ModelConfig(**TINY, qkv_bias=True), REFERENCE).init_weights(0)
    plain = Transformer(ModelConfig(**TINY), REFERENCE).init_weights(0)
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 3 * TINY["num_layers"]
    tokens, targets = as_row(random_documents([20])[0])
    assert not any(bias.any() for bias in biases.values())
    assert torch.equal(model.hidden(tokens), plain.hidden(tokens))
    model(tokens, targets).backward()
    assert all(bias.grad.any() for bias in biases.values())
