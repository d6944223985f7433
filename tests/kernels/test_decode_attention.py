import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.attention import attention_reference
from lumi.kernels.attention_plan import attention_plan_reference
from lumi.kernels.decode_attention import (
    MAX_SPLITS,
    _decode_attention_op,
    decode_attention,
    decode_attention_launch,
    decode_attention_reference,
    num_splits,
    tile_config,
)


def inputs(B, T, H, G, K):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, K, dtype=torch.float64) for heads in (H, G, G)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["gqa1", "gqa2", "gqa4"])
@pytest.mark.parametrize("split", [[13], [1] * 13, [6, 1, 5, 1]], ids=["prefill", "one by one", "chunks"])
def test_step_by_step_equals_all_at_once(split, heads):
    q, k, v = inputs(2, 13, *heads, 8)
    expected = attention_reference(q, k, v, attention_plan_reference(None, 2, 13, "cpu"))
    k_cache, v_cache = torch.zeros(2, 2, 20, heads[1], 8, dtype=torch.float64)
    pieces, start = [], 0
    for length in split:
        new = slice(start, start + length)
        k_cache[:, new], v_cache[:, new] = k[:, new], v[:, new]
        positions = torch.arange(new.start, new.stop).expand(2, -1)
        pieces.append(decode_attention_reference(q[:, new], k_cache, v_cache, positions))
        start += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-12, atol=1e-14)


def test_rows_may_stand_at_different_positions():
    q, k, v = inputs(2, 9, 4, 2, 8)
    expected = attention_reference(q, k, v, attention_plan_reference(None, 2, 9, "cpu"))
    positions = torch.tensor([[3], [8]])
    actual = decode_attention_reference(torch.stack((q[0, 3:4], q[1, 8:9])), k, v, positions)
    torch.testing.assert_close(
        actual[:, 0], torch.stack((expected[0, 3], expected[1, 8])), rtol=1e-12, atol=1e-14
    )


def test_later_slots_cannot_be_felt():
    q, k, v = inputs(1, 6, 2, 2, 4)
    positions = torch.tensor([[2]])
    before = decode_attention_reference(q[:, 2:3], k, v, positions)
    k[:, 3:], v[:, 3:] = 1e6, -1e6
    assert torch.equal(decode_attention_reference(q[:, 2:3], k, v, positions), before)
    v[:, 2] += 1
    assert not torch.equal(decode_attention_reference(q[:, 2:3], k, v, positions), before)


def test_rejects_shapes_that_do_not_fit():
    q, k, v = inputs(2, 5, 4, 2, 8)
    positions = torch.arange(5).expand(2, -1)
    with pytest.raises(ValueError, match="the caches must have shape"):
        decode_attention_reference(q, k, v[:, :4], positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(2, 5\), got \(2, 4\)"):
        decode_attention_reference(q, k, v, positions[:, :4])
    with pytest.raises(ValueError, match="query heads must be a multiple of kv heads, got 3 and 2"):
        decode_attention_reference(q[:, :, :3], k, v, positions)


# --- pages, and the Triton kernels ---


def truth(q, k_cache, v_cache, positions, window=None):
    """Query by query, over the slots it sees."""
    y = torch.empty_like(q)
    for b, row in enumerate(positions.tolist()):
        for t, position in enumerate(row):
            first = 0 if window is None else max(0, position - window + 1)
            k, v = (
                c[b, first : position + 1].repeat_interleave(q.shape[2] // c.shape[2], dim=1)
                for c in (k_cache, v_cache)
            )
            weights = torch.softmax(torch.einsum("hk,shk->hs", q[b, t], k) / q.shape[-1] ** 0.5, dim=-1)
            y[b, t] = torch.einsum("hs,shk->hk", weights, v)
    return y


def case(B, T, H, G, K, S, device, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, length, heads, K, device=device).to(dtype)
        for length, heads in ((T, H), (S, G), (S, G))
    )
    return q, k, v, torch.randint(0, S, (B, T), device=device)


def in_pages(k_cache, v_cache, positions, page_size=16, window=None):
    """The used slots of both caches in pages of random order among unused ones; all that must not be read is
    NaN, or leads nowhere."""
    firsts = [0 if window is None else max(0, int(row.min()) - window + 1) for row in positions]
    B, S = k_cache.shape[:2]
    per_row = -(-S // page_size)
    order = torch.randperm(B * per_row + 3, device=k_cache.device)[: B * per_row].view(B, per_row)
    pages = []
    for cache in (k_cache, v_cache):
        paged = cache.new_full((B * per_row + 3, page_size, *cache.shape[2:]), float("nan"))
        for b in range(B):
            for s in range(firsts[b], int(positions[b].max()) + 1):
                paged[order[b, s // page_size], s % page_size] = cache[b, s]
        pages.append(paged)
    page_table = order.int()
    for b in range(B):
        page_table[b, int(positions[b].max()) // page_size + 1 :] = (-1, 2**31 - 1)[b % 2]
        page_table[b, : firsts[b] // page_size] = (2**31 - 1, -1)[b % 2]
    return *pages, page_table


def assert_all_parity(q, k_cache, v_cache, positions, *actual, window=None):
    exact = truth(*(t.double() for t in (q, k_cache, v_cache)), positions, window)
    same_dtype = decode_attention_reference(q, k_cache, v_cache, positions, None, window)
    for y in actual or [decode_attention(q, k_cache, v_cache, positions)]:
        assert_parity("y", y, same_dtype, exact)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_are_the_same_cache(page_size):
    q, k, v, positions = case(3, 4, 4, 2, 8, 70, "cpu")
    k_pages, v_pages, page_table = in_pages(k, v, positions, page_size)
    actual = decode_attention_reference(q, k_pages.nan_to_num(), v_pages.nan_to_num(), positions, page_table)
    torch.testing.assert_close(actual, truth(q, k, v, positions), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "slots", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 4, 1, 64), (1, 3, 3, 96), (5, 4, 2, 128), (17, 2, 1, 64)],
    ids=str,
)
def test_parity(tokens, heads, kv_heads, head_dim, slots, dtype, device):
    q, k, v, positions = case(2, tokens, heads, kv_heads, head_dim, slots, device, dtype)
    k_pages, v_pages, page_table = in_pages(k, v, positions)
    paged = decode_attention(q, k_pages, v_pages, positions, page_table)
    assert_all_parity(q, k, v, positions, decode_attention(q, k, v, positions), paged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 80, 256])
def test_parity_of_other_head_dims(head_dim, dtype, device):
    assert_all_parity(*case(2, 3, 2, 1, head_dim, 70, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 20])
def test_any_number_of_shares_gives_the_same(splits, dtype, device):
    """More shares than there are blocks of keys; rows that see only a few of them."""
    q, k, v, _ = case(2, 2, 4, 1, 64, 150, device, dtype)
    positions = torch.tensor([[0, 149], [30, 70]], device=device)
    pages = in_pages(k, v, positions, 32)
    paged = decode_attention_launch(q, *pages[:2], positions, pages[2], splits)
    assert_all_parity(q, k, v, positions, decode_attention_launch(q, k, v, positions, None, splits), paged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_shares_than_the_second_kernel_holds_at_a_time(dtype, device):
    config = tile_config(16, 1, dtype)
    slots = 19 * config["MIN_SHARE"] * config["BLOCK_S"]
    q, k, v, _ = case(1, 1, 1, 1, 16, slots, device, dtype)
    positions = torch.full((1, 1), slots - 1, device=device)
    assert_all_parity(q, k, v, positions, decode_attention_launch(q, k, v, positions, None, 19))


@pytest.mark.parametrize("window", [1, 7, 16, 40, 500])
def test_a_window_in_prefill_and_decoding_is_that_of_attention(window):
    q, k, v = inputs(2, 45, 4, 2, 8)
    expected = attention_reference(q, k, v, attention_plan_reference(None, 2, 45, "cpu", window))
    positions = torch.arange(45).expand(2, -1)
    pieces = [
        decode_attention_reference(q[:, new], k, v, positions[:, new], None, window)
        for new in torch.arange(45).split([30, 1, 1, 13])
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("window", [1, 20, 33, 500])
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_parity_in_a_window(tokens, window, splits, dtype, device):
    """What lies before the window of a row's first query is NaN, and its pages lead nowhere."""
    q, k, v, _ = case(2, tokens, 4, 2, 64, 150, device, dtype)
    positions = torch.tensor([[3], [149 - tokens]], device=device) + torch.arange(tokens, device=device)
    k_pages, v_pages, page_table = in_pages(k, v, positions, window=window)
    paged = decode_attention_launch(q, k_pages, v_pages, positions, page_table, splits, window)
    k_cache, v_cache = k.clone(), v.clone()
    k_cache[1, : max(0, 149 - tokens - window + 1)] = torch.nan
    v_cache[1, : max(0, 149 - tokens - window + 1)] = torch.nan
    whole = decode_attention_launch(q, k_cache, v_cache, positions, None, splits, window)
    assert_all_parity(q, k, v, positions, whole, paged, window=window)


def test_a_negative_position_sees_nothing_in_a_window_either(device):
    q, k, v, _ = case(2, 3, 4, 2, 64, 60, device)
    positions = torch.tensor([[-1, 59, 58], [-1, -7, -1]], device=device)
    for splits in (1, 3):
        y = decode_attention_launch(q, k, v, positions, None, splits, 5)
        assert not y[0, 0].any()
        assert not y[1].any()
        assert_all_parity(q[:1, 1:], k[:1], v[:1], positions[:1, 1:], y[:1, 1:], window=5)


def test_a_window_of_nothing_is_refused(device):
    tensors = case(2, 3, 4, 2, 64, 40, device)
    for function in (decode_attention_reference, decode_attention):
        with pytest.raises(ValueError, match="window must be at least 1, got 0"):
            function(*tensors, None, 0)


def test_keys_are_split_in_these_tests(device):
    """As far as the launcher's own choice goes, and within what the second kernel can take."""
    config = tile_config(64, 4, torch.float16)
    cpu = torch.device("cpu")
    assert num_splits(4, 300, config, cpu) == 2
    assert num_splits(1, 10**6, config, cpu) == 12
    assert num_splits(10_000, 10**6, config, cpu) == 1
    assert num_splits(1, 0, config, cpu) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_the_capacity_of_a_cache_and_the_rows_beside_change_no_bit(window, dtype, device):
    """Shares follow the slots in use. What is not used is NaN, and pages for it lead nowhere."""
    q, k, v, _ = case(2, 1, 4, 1, 64, 300, device, dtype)
    positions = torch.tensor([[5], [299]], device=device)
    pages = in_pages(k, v, positions, 16, window)
    small = decode_attention(q, *pages[:2], positions, pages[2], window)
    assert_all_parity(q, k, v, positions, small, window=window)
    unused = torch.full((2, 300), -1, dtype=torch.int32, device=device)
    assert torch.equal(
        decode_attention(q, *pages[:2], positions, torch.cat((pages[2], unused), dim=1), window), small
    )
    large = [torch.cat((t, t.new_full((2, 4800, 1, 64), torch.nan)), dim=1) for t in (k, v)]
    assert torch.equal(
        decode_attention(q, *large, positions, None, window),
        decode_attention(q, k, v, positions, None, window),
    )
    both_short = torch.tensor([[5], [0]], device=device)
    assert torch.equal(decode_attention(q, *large, both_short, None, window)[0], small[0])


def test_shares_that_no_key_is_left_for_are_neither_written_nor_read(device):
    """Twelve programs for a row of one block of keys: the partial results of eleven stay NaN."""
    q, k, v, _ = case(2, 1, 2, 1, 16, 5000, device)
    positions = torch.tensor([[3], [-1]], device=device)
    y = decode_attention_launch(q, k, v, positions, None, 12)
    assert_all_parity(q[:1], k[:1, :4], v[:1, :4], positions[:1], y[:1])
    assert not y[1].any()


def test_no_more_shares_than_the_second_kernel_takes(monkeypatch, device):
    monkeypatch.setattr("lumi.kernels.decode_attention._wanted_programs", lambda _: 10**6)
    assert num_splits(1, 10**6, tile_config(128, 1, torch.float16), torch.device(device)) == MAX_SPLITS


@pytest.mark.parametrize("split", [[40], [1] * 6, [33, 1, 1, 5]], ids=["prefill", "one by one", "chunks"])
def test_prefill_and_decoding_equal_all_at_once(split, device):
    T = sum(split)
    q, k, v, _ = case(2, T, 4, 2, 32, T, device)
    positions = torch.arange(T, device=device).expand(2, -1)
    k_cache, v_cache = torch.full((2, 2, T + 5, 2, 32), float("nan"), device=device)
    pieces = []
    for new in torch.arange(T, device=device).split(split):
        k_cache[:, new], v_cache[:, new] = k[:, new], v[:, new]
        pieces.append(decode_attention(q[:, new], k_cache, v_cache, positions[:, new]))
    assert_all_parity(q, k, v, positions, torch.cat(pieces, dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_slots_past_a_row_may_hold_anything(splits, dtype, device):
    q, k, v, _ = case(3, 1, 4, 2, 64, 100, device, dtype)
    positions = torch.tensor([[0], [50], [99]], device=device)
    before = decode_attention_launch(q, k, v, positions, None, splits)
    for b, value in enumerate((float("nan"), float("inf"))):
        k[b, positions[b, 0] + 1 :], v[b, positions[b, 0] + 1 :] = value, value
    assert torch.equal(decode_attention_launch(q, k, v, positions, None, splits), before)


def test_a_query_sees_nothing_later_than_itself(device):
    q, k, v, _ = case(1, 3, 4, 2, 64, 80, device)
    positions = torch.tensor([[20, 79, 40]], device=device)
    before = decode_attention(q, k, v, positions)
    k[:, 41:], v[:, 41:] = 100.0, -1e30
    after = decode_attention(q, k, v, positions)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, 1], before[:, 1])


@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_not_finite_is_not_hidden(splits, device):
    q, k, v, _ = case(2, 1, 4, 2, 64, 100, device)
    positions = torch.full((2, 1), 99, device=device)
    k[0, 50, 0, 3] = float("nan")
    y = decode_attention_launch(q, k, v, positions, None, splits)
    assert y[0, 0, :2].isnan().all()
    assert y[0, 0, 2:].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_a_negative_position_sees_nothing(splits, device):
    q, k, v, _ = case(2, 1, 4, 2, 64, 60, device)
    positions = torch.tensor([[-1], [59]], device=device)
    y = decode_attention_launch(q, k, v, positions, None, splits)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert torch.equal(y[1:], decode_attention_launch(q[1:], k[1:], v[1:], positions[1:], None, splits))


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_parity_far_from_unit_scale(scale, device):
    """Scores of a thousand: one key takes all the weight, and exp without the maximum would overflow."""
    q, k, v, positions = case(2, 3, 4, 2, 64, 130, device)
    assert_all_parity(q * scale, k * scale, v, positions)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, ::2],
        lambda t: t[..., :32],
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t[..., ::2],
        lambda t: t[:1].expand(2, -1, -1, -1),
    ],
    ids=["slots", "part of heads", "heads outside", "batch inside", "a stride inside heads", "one row twice"],
)
def test_strides_are_respected(view, device):
    q, k, v, positions = case(2, 6, 4, 2, 64, 66, device)
    q_view, k_view, v_view = (view(t) for t in (q, k, v))
    assert not k_view.is_contiguous()
    positions = torch.randint(0, k_view.shape[1], (6, 2), device=device).T[:, : q_view.shape[1]]
    assert_all_parity(q_view, k_view, v_view, positions)
    k_pages, v_pages, page_table = in_pages(k_view, v_view, positions)
    paged = decode_attention(
        q_view,
        k_pages.transpose(1, 2).contiguous().transpose(1, 2),
        v_pages,
        positions,
        page_table.T.contiguous().T,
    )
    assert_all_parity(q_view, k_view, v_view, positions, paged)


def test_positions_of_32_bits(device):
    q, k, v, positions = case(2, 3, 4, 2, 64, 66, device)
    assert torch.equal(decode_attention(q, k, v, positions.int()), decode_attention(q, k, v, positions))


def test_inputs_are_left_alone_and_it_is_deterministic(device):
    tensors = case(2, 3, 4, 2, 64, 200, device)
    before = [t.clone() for t in tensors]
    first, second = (decode_attention(*tensors) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_no_queries_give_no_results(device):
    q, k, v, positions = case(2, 0, 4, 2, 64, 9, device)
    assert decode_attention(q, k, v, positions).shape == (2, 0, 4, 64)


def test_operator_is_registered_whole(device):
    q, k, v, positions = case(2, 3, 4, 2, 32, 40, device)
    torch.library.opcheck(_decode_attention_op.opaque, (q, k, v, positions, None))
    k_pages, v_pages, page_table = (t.nan_to_num() for t in in_pages(k, v, positions))
    torch.library.opcheck(_decode_attention_op.opaque, (q, k_pages, v_pages, positions, page_table, 7))


def test_compiles_without_a_graph_break(device):
    tensors = case(2, 3, 4, 2, 32, 40, device)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), decode_attention(*tensors))
    k_pages, v_pages, page_table = in_pages(*tensors[1:])
    paged = (tensors[0], k_pages, v_pages, tensors[3], page_table)
    assert torch.equal(compiled(*paged), decode_attention(*paged))


def test_a_gradient_is_refused(device):
    q, k, v, positions = case(1, 2, 2, 1, 32, 5, device)
    with pytest.raises(RuntimeError, match="backward"):
        decode_attention(q.requires_grad_(), k, v, positions).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda q: q[0]}, r"q must have shape \(B, T, H, K\), got \(3, 4, 64\)"),
        (
            {"k_cache": lambda k: k[:1]},
            r"the caches must have shape \(2, 'S', 'G', 64\), got \(1, 40, 2, 64\) and \(2, 40, 2, 64\)",
        ),
        ({"v_cache": lambda v: v[..., :32]}, "the caches must have shape .*, got .* and"),
        ({"positions": lambda p: p[:, :2]}, r"positions must have shape \(2, 3\), got \(2, 2\)"),
        ({"positions": lambda p: p.float()}, r"positions must be int64 or int32, got torch\.float32"),
        ({"q": lambda q: q[:, :, :3]}, "query heads must be a multiple of kv heads, got 3 and 2"),
        (
            {"q": lambda q: q.half()},
            r"of one dtype, .*, got torch\.float16, torch\.float32 and torch\.float32",
        ),
        (
            {n: lambda t: t.double() for n in ("q", "k_cache", "v_cache")},
            r"float32, bfloat16 or float16, got torch\.float64",
        ),
        (
            {n: lambda t: t[..., :4] for n in ("q", "k_cache", "v_cache")},
            "K must be a multiple of 8 between 8 and 256, got 4",
        ),
        (
            {n: lambda t: t[..., :36] for n in ("q", "k_cache", "v_cache")},
            "K must be a multiple of 8 between 8 and 256, got 36",
        ),
        ({n: lambda t: t.repeat(1, 1, 1, 5) for n in ("q", "k_cache", "v_cache")}, "K must be .*, got 320"),
        ({"v_cache": lambda v: v.to("meta")}, "page_table must be on one device, got .*, .*, meta, "),
    ],
    ids=[
        "three dimensions",
        "batch",
        "head dims",
        "tokens",
        "float",
        "heads",
        "dtypes",
        "float64",
        "4",
        "36",
        "320",
        "device",
    ],
)
def test_refuses(change, message, device):
    arguments = dict(
        zip(("q", "k_cache", "v_cache", "positions"), case(2, 3, 4, 2, 64, 40, device), strict=True)
    )
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments | {name: function(arguments[name]) for name, function in change.items()})


@pytest.mark.parametrize("function", [decode_attention_reference, decode_attention])
@pytest.mark.parametrize(
    ("page_size", "page_table", "message"),
    [
        (
            16,
            torch.zeros(2, 3),
            r"page_table must be int32 of shape \(2, max_pages\), got torch\.float32 of shape \(2, 3\)",
        ),
        (
            16,
            torch.zeros(3, 3, dtype=torch.int32),
            r"page_table must be .*, got torch\.int32 of shape \(3, 3\)",
        ),
        (
            8,
            torch.zeros(2, 3, dtype=torch.int32),
            "pages of a power of two, at least 16 slots, got 5 pages of 8",
        ),
        (
            48,
            torch.zeros(2, 3, dtype=torch.int32),
            "pages of a power of two, at least 16 slots, got 5 pages of 48",
        ),
    ],
    ids=["float", "batch", "8", "48"],
)
def test_refuses_pages(page_size, page_table, message, function, device):
    q, pages = torch.zeros(2, 1, 4, 64, device=device), torch.zeros(5, page_size, 2, 64, device=device)
    with pytest.raises(ValueError, match=message):
        function(q, pages, pages, torch.zeros(2, 1, dtype=torch.int64, device=device), page_table.to(device))


@pytest.mark.gpu
def test_caches_past_two_to_the_31_elements():
    """Addresses of the last row do not fit 32 bits; in pages, those of the last page."""
    q = torch.randn(3, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(3, 2**20, 1, 1024, device="cuda", dtype=torch.bfloat16)[..., :128].expand(
        -1, -1, 2, -1
    )
    cache[2, :64, 0] = torch.randn(64, 128, device="cuda").bfloat16()
    positions = torch.full((3, 1), 63, device="cuda")
    expected = decode_attention(
        q[2:], cache[2:, :64].contiguous(), cache[2:, :64].contiguous(), positions[2:]
    )
    y = decode_attention(q, cache, cache, positions)
    assert_parity("y", y[2:], expected, expected.double())
    pages = cache.unflatten(1, (-1, 64)).flatten(0, 1)
    page_table = torch.tensor([[0], [1], [2 * 2**20 // 64]], device="cuda", dtype=torch.int32)
    assert_parity(
        "paged", decode_attention(q, pages, pages, positions, page_table)[2:], expected, expected.double()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 32, 8, 128, 8192), (16, 1, 8, 8, 64, 1000), (2, 300, 12, 4, 96, 700)], ids=str
)
def test_parity_at_sizes_that_models_have(shape, dtype):
    q, k, v, positions = case(*shape, "cuda", dtype)
    k_pages, v_pages, page_table = in_pages(k, v, positions, 64)
    paged = decode_attention(q, k_pages, v_pages, positions, page_table)
    assert_all_parity(q, k, v, positions, decode_attention(q, k, v, positions), paged)


@pytest.mark.gpu
def test_it_neither_waits_for_the_device_nor_breaks_a_capture():
    q, k, v, positions = case(2, 1, 8, 2, 64, 2000, "cuda", torch.float16)
    expected = decode_attention(q, k, v, positions)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q, k, v, positions)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(q, k, v, positions)
    graph.replay()
    assert torch.equal(y, expected)
    positions.copy_(positions // 2)
    graph.replay()
    assert torch.equal(y, decode_attention(q, k, v, positions))
