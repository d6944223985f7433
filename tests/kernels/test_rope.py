import pytest
import torch
from parity import DTYPES, assert_parity

from lumi.kernels.rope import _rope_op, rope, rope_reference, rope_table


@pytest.fixture(scope="module")
def llama():
    """transformers' module of that name; `make gpu` does without."""
    pytest.importorskip("transformers", reason="transformers is not installed here")
    from transformers.models.llama import modeling_llama

    return modeling_llama


def judge(llama, head_dim, theta):
    return llama.LlamaRotaryEmbedding(
        llama.LlamaConfig(
            head_dim=head_dim,
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=32_768,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 48, 64, 128])
def test_table_is_transformers_table_to_the_bit(llama, head_dim, theta):
    torch.manual_seed(0)
    positions = torch.stack((torch.arange(700), torch.randint(0, 32_768, (700,))))
    cos, sin = judge(llama, head_dim, theta)(torch.zeros(1), positions)
    ours = rope_table(positions, head_dim, theta)
    assert torch.equal(ours[0], cos)
    assert torch.equal(ours[1], sin)
    assert ours[0].dtype == torch.float32


def test_rotation_is_transformers_rotation_to_the_bit(llama):
    torch.manual_seed(0)
    q, k = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 0, 1]])
    cos, sin = rope_table(positions, 64, 10_000.0)
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, expected in zip(rope_reference(q, k, cos, sin), theirs, strict=True):
        assert torch.equal(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(1, 50, 2, 32).to(dtype), torch.randn(1, 50, 1, 32).to(dtype)
    cos, sin = rope_table(torch.arange(50)[None], 32, 10_000.0)
    once = [t.to(dtype) for t in rope_reference(q.float(), k.float(), cos, sin)]
    for ours, expected in zip(rope_reference(q, k, cos, sin), once, strict=True):
        assert torch.equal(ours, expected)


def test_scores_depend_on_the_distance_only():
    """The property that rotary embeddings exist for, in float64 with tables made in float64."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)

    def score(q_position, k_position):
        rotated = []
        for x, position in ((q, q_position), (k, k_position)):
            angles = (position * frequencies).repeat(2)[None, None]
            rotated.append(rope_reference(x, x, angles.cos(), angles.sin())[0])
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-12, atol=1e-13)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_table_is_exact_to_its_dtype():
    """Against float64 cosines of the float32 angles: each entry within an ulp of 1."""
    positions = torch.arange(2048)[None]
    cos, sin = rope_table(positions, 64, 10_000.0)
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, 64, 2).float() / 64))
    angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)
    for name, ours, function in (("cos", cos, torch.cos), ("sin", sin, torch.sin)):
        assert_parity(name, ours, function(angles), function(angles.double()))


@pytest.mark.parametrize(
    ("positions", "head_dim", "message"),
    [((5,), 8, r"shape \(B, T\), got \(5,\)"), ((1, 5), 7, "head_dim must be even and positive, got 7")],
)
def test_rejects(positions, head_dim, message):
    with pytest.raises(ValueError, match=message):
        rope_table(torch.zeros(positions, dtype=torch.int64), head_dim, 10_000.0)


# --- the Triton kernel ---


def turned(q, k, cos, sin):
    """The rotation as a product of complex numbers, without casts."""

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        product = (
            torch.complex(first, second)
            * torch.complex(cos, sin).to(torch.complex128)[:, :, None, : x.shape[-1] // 2]
        )
        return torch.cat((product.real, product.imag), dim=-1)

    return turn(q), turn(k)


def run(function, q, k, dq, dk, cos, sin):
    q, k = (t.detach().requires_grad_() for t in (q, k))
    out = function(q, k, cos, sin)
    return *out, *torch.autograd.grad(out, (q, k), (dq, dk))


def assert_all_parity(q, k, dq, dk, cos, sin):
    exact = run(turned, *(t.double() for t in (q, k, dq, dk, cos, sin)))
    same_dtype, actual = (run(function, q, k, dq, dk, cos, sin) for function in (rope_reference, rope))
    for name, *results in zip(("q", "k", "dq", "dk"), actual, same_dtype, exact, strict=True):
        assert_parity(name, *results)


def case(batch, tokens, heads, kv_heads, head_dim, device, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = (heads, kv_heads, heads, kv_heads)
    tensors = [torch.randn(batch, tokens, size, head_dim, device=device).to(dtype) for size in sizes]
    positions = torch.randint(0, 2000, (batch, tokens), device=device)
    return *tensors, *rope_table(positions, head_dim, 10_000.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 64), (4, 2, 96), (3, 1, 128), (5, 5, 2)], ids=str
)
def test_parity(tokens, heads, kv_heads, head_dim, dtype, device):
    assert_all_parity(*case(2, tokens, heads, kv_heads, head_dim, device, dtype))


def test_heads_and_rows_of_a_joint_projection(device):
    """q, k and v as slices of one matrix; gradients that are transposed, or one number for all."""
    *_, cos, sin = case(2, 9, 4, 2, 64, device)
    torch.manual_seed(1)
    joint = torch.randn(2, 9, 8 * 64, device=device)
    q, k = joint[..., : 4 * 64].unflatten(-1, (4, 64)), joint[..., 4 * 64 : 6 * 64].unflatten(-1, (2, 64))
    dq = torch.randn(2, 4, 9, 64, device=device).transpose(1, 2)
    assert_all_parity(q, k, dq, torch.ones(1, device=device).expand(2, 9, 2, 64), cos, sin)
    assert_all_parity(
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k[..., ::2].repeat(1, 1, 1, 2),
        dq,
        torch.randn_like(k),
        cos,
        sin,
    )


def test_inputs_are_left_alone_and_no_tokens_are_none(device):
    tensors = case(1, 5, 2, 1, 32, device)
    before = [t.clone() for t in tensors]
    run(rope, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    q, k = rope(
        *(torch.zeros(1, 0, heads, 32, device=device) for heads in (2, 1)),
        *torch.zeros(2, 1, 0, 32, device=device),
    )
    assert (q.shape, k.shape) == ((1, 0, 2, 32), (1, 0, 1, 32))


def test_operator_is_registered_whole(device):
    q, k, *_, cos, sin = case(2, 3, 4, 2, 32, device)
    torch.library.opcheck(_rope_op.opaque, (q.requires_grad_(), k.requires_grad_(), cos, sin, 1))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda *arguments: torch.utils.checkpoint.checkpoint(rope, *arguments, use_reentrant=False),
        torch.compile(rope, fullgraph=True, backend="aot_eager"),
    ],
    ids=["checkpointed", "compiled"],
)
def test_checkpointed_and_compiled_it_is_the_same(wrap, device):
    tensors = case(2, 7, 4, 2, 32, device)
    assert all(torch.equal(a, b) for a, b in zip(run(wrap, *tensors), run(rope, *tensors), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q, k, cos, sin: (q[0], k, cos, sin),
            r"q and k must have shapes \(B, T, H, K\) and \(B, T, G, K\)",
        ),
        (lambda q, k, cos, sin: (q, k[:, :3], cos, sin), "q and k must have shapes"),
        (lambda q, k, cos, sin: (q[..., :5], k[..., :5], cos[..., :5], sin[..., :5]), "K even, got"),
        (
            lambda q, k, cos, sin: (q, k.half(), cos, sin),
            r"of one dtype, .*, got torch\.float32 and torch\.float16",
        ),
        (lambda q, k, cos, sin: (q.double(), k.double(), cos, sin), r"of one dtype, .*, got torch\.float64"),
        (
            lambda q, k, cos, sin: (q, k, cos.half(), sin),
            r"cos must be float32 of shape \(2, 4, 8\), got torch\.float16",
        ),
        (
            lambda q, k, cos, sin: (q, k, cos, sin[:1]),
            r"sin must be float32 of shape \(2, 4, 8\), got .* \(1, 4, 8\)",
        ),
        (lambda q, k, cos, sin: (q, k, cos, sin.to("meta")), "must be on one device, got .* and meta"),
    ],
    ids=["three dimensions", "tokens", "odd", "dtypes", "float64", "cos", "sin", "device"],
)
def test_refuses(change, message, device):
    q, k, *_, cos, sin = case(2, 4, 2, 1, 8, device)
    with pytest.raises(ValueError, match=message):
        rope(*change(q, k, cos, sin))


@pytest.mark.gpu
def test_tokens_past_two_to_the_31_elements():
    """Addresses of the last tokens do not fit 32 bits."""
    q = torch.zeros(1, 2**19 + 3, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(1, 2**19 + 3, 1, 128, device="cuda", dtype=torch.bfloat16)
    q[0, -1] = k[0, -1] = 1
    cos, sin = rope_table(torch.zeros(1, 2**19 + 3, dtype=torch.int64, device="cuda"), 128, 10_000.0)
    assert all(torch.equal(out[0, -1], torch.ones_like(out[0, -1])) for out in rope(q, k, cos, sin))
