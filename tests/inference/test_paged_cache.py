import pytest
import torch

from lumi.inference.paged_cache import NewTokens, PagedCache, bytes_per_token
from lumi.inference.pages import PAGE_SIZE
from lumi.kernels.bundle import NATIVE, REFERENCE
from lumi.model.transformer import ModelConfig, Transformer

SHAPE = {"vocab_size": 61, "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}


def build(ops=REFERENCE, **changes):
    return Transformer(ModelConfig(**SHAPE | changes, max_positions=128), ops).init_weights(0).eval()


@pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=lambda ops: ops.name)
@pytest.mark.parametrize("changes", [{}, {"window": 7, "full_attention_layers": 1}], ids=str)
@torch.inference_mode()
def test_pieces_in_pages_compute_what_whole_texts_do(ops, changes):
    """Texts that come in pieces of several sizes, into pages in any order, beside each other."""
    model = build(ops, **changes)
    texts = [torch.arange(count) * factor % 61 for count, factor in ((50, 3), (40, 7), (33, 11))]
    pages = [[5, 0, 9, 3], [1, 8, 2, 4], [7, 6, 10, 11]]
    cache = PagedCache(model, 12)
    for layer in cache.layers:  # what nobody has written must not be looked at
        layer.k_PSGK.fill_(1e4)
        layer.v_PSGK.fill_(1e4)
    found = [[], [], []]
    at = [0, 0, 0]
    # Counts of new tokens per text and step; those with one come first.
    for counts in [{0: 20}, {0: 1, 1: 30}, {0: 1, 1: 1, 2: 17}, {0: 1, 1: 1, 2: 1}, {1: 1, 2: 9, 0: 25}]:
        batch = [
            NewTokens(texts[row][at[row] : at[row] + count].tolist(), at[row], pages[row])
            for row, count in counts.items()
        ]
        hidden = cache.hidden(batch).split(list(counts.values()))
        for row, part in zip(counts, hidden, strict=True):
            found[row].append(part)
            at[row] += len(part)
    assert at == [48, 33, 27]
    for row, text in enumerate(texts):
        whole = model.hidden(text[None, : at[row]])[0]
        torch.testing.assert_close(torch.cat(found[row]), whole, rtol=2e-5, atol=2e-5)


@torch.inference_mode()
def test_a_shared_page_is_read_by_all():
    model = build()
    text = torch.arange(PAGE_SIZE + 8) * 5 % 61
    cache = PagedCache(model, 4)
    cache.hidden([NewTokens(text.tolist(), 0, [2, 0])])
    other = torch.cat((text[:PAGE_SIZE], torch.tensor([9, 8, 7])))
    [*_, last] = cache.hidden([NewTokens(other[PAGE_SIZE:].tolist(), PAGE_SIZE, [2, 3])])
    torch.testing.assert_close(last, model.hidden(other[None])[0, -1], rtol=2e-5, atol=2e-5)


def test_bytes():
    model = build()
    cache = PagedCache(model, 5)
    tensors = [tensor for layer in cache.layers for tensor in (layer.k_PSGK, layer.v_PSGK)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert held == 5 * PAGE_SIZE * bytes_per_token(model.config, torch.float32)
