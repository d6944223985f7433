import pytest
import torch
from losses import inputs
from parity import assert_parity

from lumi.kernels import chunked_cross_entropy, linear_cross_entropy
from lumi.kernels.bundle import NATIVE, REFERENCE, TRITON
from lumi.kernels.token_losses import token_losses, token_losses_chunked, token_losses_reference

# As in test_linear_cross_entropy.py.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
NAMES = ("losses", "dhidden", "dweight")
BUNDLES = [REFERENCE, NATIVE, TRITON]
CASES = [
    (REFERENCE, torch.float32),
    (REFERENCE, torch.bfloat16),
    (TRITON, torch.float32),
    (TRITON, torch.bfloat16),
    pytest.param(TRITON, torch.float16, marks=pytest.mark.soak),
]
each_bundle = pytest.mark.parametrize("ops", BUNDLES, ids=lambda ops: ops.name)


def run(function, hidden, weight, targets):
    """Losses and gradients, for an incoming gradient that differs from row to row in size and sign."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    losses = function(hidden, weight, targets)
    return losses, *torch.autograd.grad(losses, (hidden, weight), factors(losses))


def factors(losses):
    return torch.linspace(-1, 2, len(losses)).square().sub(0.5).to(losses)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks in every bundle, the last one short."""
    chunks = lambda num_rows, *_: (slice(start, start + 8) for start in range(0, num_rows, 8))
    monkeypatch.setattr(chunked_cross_entropy, "_chunks", chunks)
    monkeypatch.setattr(linear_cross_entropy, "native_chunk_rows", lambda *_: 8)
    for name, value in (("LOGITS_BYTES", 1), ("MIN_CHUNK_ROWS", 8), ("_ROW_MULTIPLE", 4)):
        monkeypatch.setattr(linear_cross_entropy, name, value)


def placed(ops, device, *sizes, dtype=torch.float32, **options):
    """Inputs where the bundle runs; the weight is float32, as master weights are."""
    hidden, weight, targets = inputs(*sizes, **options)
    device = "cpu" if ops is NATIVE else device
    return hidden.to(device, dtype), (weight / 2).to(device, torch.float32), targets.to(device)


def assert_same(ops, hidden, weight, targets):
    exact = run(token_losses_reference, hidden.double(), weight.double(), targets)
    same_dtype = run(token_losses_reference, hidden, weight, targets)
    actual = run(ops.token_losses, hidden, weight, targets)
    for name, a, s, e in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


@pytest.mark.parametrize(("ops", "dtype"), CASES, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.usefixtures("small_chunks")
def test_parity(ops, dtype, ignored, device):
    assert_same(ops, *placed(ops, device, 27, 65, 32, dtype=dtype, ignored=ignored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.usefixtures("small_chunks", "cpu_target")
def test_native_parity(dtype, ignored, device):
    assert_same(NATIVE, *placed(NATIVE, device, 27, 65, 32, dtype=dtype, ignored=ignored))


def test_float64_is_the_definition():
    case = inputs(23, 17, 8)
    expected = run(token_losses_reference, *case)
    for actual, truth in zip(run(token_losses_chunked, *case), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-13)


@each_bundle
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("operator", ["token_losses", "linear_cross_entropy"])
def test_a_copy_of_the_weight_changes_no_bit(ops, operator, device):
    """The operator reads the copy, and the weight has the gradient, in float32."""
    hidden, weight, targets = placed(ops, device, 40, 97, 32, dtype=torch.bfloat16)
    weight, results = weight.float() + 1e-4, []
    for master, copy in (
        (weight, None),
        (weight, weight.bfloat16()),
        (weight.new_zeros(97, 32), weight.bfloat16()),
    ):
        leaves = [hidden.clone().requires_grad_(), master.clone().requires_grad_()]
        losses = getattr(ops, operator)(*leaves, targets, copy_VD=copy)
        (losses.sum() * 0.7).backward()
        assert leaves[1].grad.dtype == torch.float32
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with pytest.raises(ValueError, match="copy must be torch\\.bfloat16 of shape"):
        getattr(ops, operator)(hidden, weight, targets, copy_VD=weight)


@each_bundle
@pytest.mark.usefixtures("small_chunks")
def test_the_sum_is_linear_cross_entropy(ops, device):
    hidden, weight, targets = placed(ops, device, 27, 65, 32)
    leaves = [(hidden.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    losses = ops.token_losses(*leaves[0], targets)
    total = ops.linear_cross_entropy(*leaves[1], targets)
    assert not losses[targets == -100].any()
    torch.testing.assert_close(losses.sum(), total)
    gradients = (
        torch.autograd.grad(loss, pair) for loss, pair in zip((losses.sum(), total), leaves, strict=True)
    )
    for mine, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, fused)


@each_bundle
def test_only_the_needed_gradient(ops, device):
    hidden, weight, targets = placed(ops, device, 9, 33, 8)
    hidden.requires_grad_()
    expected = run(token_losses_reference, hidden, weight, targets)[1]
    losses = ops.token_losses(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(losses, hidden, factors(losses))
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        assert not ops.token_losses(hidden, weight, targets).requires_grad


@each_bundle
def test_without_counted_rows_or_rows(ops, device):
    hidden, weight, targets = placed(ops, device, 7, 5, 4)
    for rows in (7, 0):
        ignored = torch.full_like(targets, -100)[:rows]
        losses, dhidden, dweight = run(ops.token_losses, hidden[:rows], weight, ignored)
        assert losses.shape == (rows,)
        assert dhidden.shape == (rows, 4)
        assert not any(tensor.any() for tensor in (losses, dhidden, dweight))


def test_refusals(device):
    hidden, weight, targets = inputs(3, 5, 4, ignored=0.0)
    with pytest.raises(ValueError, match=r"hidden must be float32, bfloat16 or float16, got torch.float64"):
        token_losses(hidden, weight, targets)
    for function in (token_losses_reference, token_losses_chunked):
        with pytest.raises(ValueError, match=r"targets must be int64 of shape \(3,\), got torch.int32"):
            function(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="the operators for CPUs take tensors of float32 or of bfloat16"):
        NATIVE.token_losses(hidden, weight, targets)
    targets[1] = 5
    losses = token_losses(*(t.to(device) for t in (hidden.float(), weight.float(), targets)))
    assert losses.isnan().tolist() == [False, True, False]
    with pytest.raises(IndexError):
        NATIVE.token_losses(hidden.float(), weight.float(), targets)
