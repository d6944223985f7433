import pytest
import torch

from lumi.config import UserError, from_dict, to_dict
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
}
SIZES = {
    "micro": ((4, 128, 2, 512), 9_438_336),
    "tiny": ((6, 256, 4, 1024), 23_072_000),
    "small": ((7, 384, 6, 1536), 41_686_656),
    "medium": ((12, 512, 8, 2048), 83_898_880),
    "base": ((24, 768, 12, 3072), 276_861_696),
}


def build(**changes):
    return Transformer(ModelConfig(**TINY | changes), REFERENCE).init_weights(0)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_five_sizes(size):
    (layers, dim, heads, mlp), expected = SIZES[size]
    config = ModelConfig(vocab_size=32_768, num_layers=layers, model_dim=dim, num_heads=heads, mlp_dim=mlp)
    with torch.device("meta"):
        model = Transformer(config, REFERENCE)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert config.num_parameters == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_by_arithmetic(shape):
    model = build(**SHAPES[shape])
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters


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


def test_null_means_what_follows_from_the_other_numbers():
    config = from_dict(ModelConfig, TINY | {"num_kv_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert config == ModelConfig(**TINY) == from_dict(ModelConfig, to_dict(config))
    given = ModelConfig(**TINY | {"num_kv_heads": 2, "head_dim": 16})
    assert (given.num_kv_heads, given.head_dim) == (2, 16)
    with pytest.raises(UserError, match=r"config: num_layers must be an integer, got null"):
        from_dict(ModelConfig, TINY | {"num_layers": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 5}, "model_dim must be a multiple of num_heads = 5, got 32"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
        ({"rope_theta": 0.0}, r"rope_theta must be positive, got 0\.0"),
        ({"norm_eps": -1.0}, r"norm_eps must be positive, got -1\.0"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**TINY | changes)


def test_flops_by_hand():
    config = ModelConfig(vocab_size=10, num_layers=1, model_dim=4, num_heads=2, mlp_dim=8)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4 + 3 * 4  # q k v o, gate up down, lm_head, norms
    assert config.flops_per_token(context=16) == 6 * weights + 6 * 4 * 16
