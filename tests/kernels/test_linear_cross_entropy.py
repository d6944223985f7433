import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity

from lumi.kernels import linear_cross_entropy
from lumi.kernels.linear_cross_entropy import cross_entropy_per_token_reference, linear_cross_entropy_reference


def judge(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")


def judge_same_dtype(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets, ignore_index=-100, reduction="sum")


def run(function, hidden, weight, targets, factor=1.0):
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, targets)
    return loss, *torch.autograd.grad(loss * factor, (hidden, weight))


def inputs(N, V, D, ignored=0.3):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    return hidden, weight, targets


@pytest.fixture(params=[5, 1_000_000], ids=["chunks", "one chunk"])
def chunk_rows(request, monkeypatch):
    """Several chunks with a short last one, or a single one."""

    def chunks(num_rows, vocab_size, device):
        return (slice(start, start + request.param) for start in range(0, num_rows, request.param))

    monkeypatch.setattr(linear_cross_entropy, "_chunks", chunks)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.usefixtures("chunk_rows")
def test_float64_loss_and_gradients(ignored):
    case = inputs(23, 17, 8, ignored)
    actual, expected = run(linear_cross_entropy_reference, *case, 0.25), run(judge, *case, 0.25)
    assert actual[0].dtype == torch.float64
    for name, a, e in zip(("loss", "dhidden", "dweight"), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("chunk_rows")
def test_parity(dtype):
    hidden, weight, targets = inputs(130, 65, 32)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = run(judge, hidden.double(), weight.double(), targets)
    same_dtype = run(judge_same_dtype, hidden, weight, targets)
    actual = run(linear_cross_entropy_reference, hidden, weight, targets)
    assert actual[0].dtype == torch.float32
    for name, a, s, e in zip(("loss", "dhidden", "dweight"), actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


def test_float32_weight_under_bfloat16_hidden():
    """The product is bfloat16, the gradient keeps the weight's dtype."""
    hidden, weight, targets = inputs(40, 30, 16)
    hidden, weight = hidden.bfloat16(), weight.float()
    exact = run(judge, hidden.double(), weight.double(), targets)
    same_dtype = run(judge_same_dtype, hidden, weight, targets)
    actual = run(linear_cross_entropy_reference, hidden, weight, targets)
    assert [t.dtype for t in actual] == [torch.float32, torch.bfloat16, torch.float32]
    for name, a, s, e in zip(("loss", "dhidden", "dweight"), actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


def test_real_chunks_cover_every_row_once():
    for num_rows, vocab_size in ((0, 10), (1, 10), (5000, 4096), (5000, 32_768), (700, 10**7)):
        pieces = linear_cross_entropy._chunks(num_rows, vocab_size, torch.device("cpu"))
        covered = [row for piece in pieces for row in range(num_rows)[piece]]
        assert covered == list(range(num_rows))


@pytest.mark.usefixtures("chunk_rows")
def test_all_ignored_is_zero():
    hidden, weight, _ = inputs(7, 5, 4)
    loss, dhidden, dweight = run(linear_cross_entropy_reference, hidden, weight, torch.full((7,), -100))
    assert loss == 0
    assert not dhidden.any()
    assert not dweight.any()


def test_no_rows():
    hidden, weight, targets = inputs(0, 5, 4)
    loss, dhidden, dweight = run(linear_cross_entropy_reference, hidden, weight, targets)
    assert loss == 0
    assert dhidden.shape == (0, 4)
    assert not dweight.any()


def test_only_the_needed_gradient():
    hidden, weight, targets = inputs(9, 5, 4)
    hidden.requires_grad_()
    linear_cross_entropy_reference(hidden, weight, targets).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, run(judge, hidden, weight, targets)[1], rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert not linear_cross_entropy_reference(hidden, weight, targets).requires_grad


def test_large_logits_do_not_overflow():
    hidden, weight = torch.eye(4) * 1e4, torch.eye(4)
    targets = torch.tensor([0, 1, 2, 0])
    assert linear_cross_entropy_reference(hidden, weight, targets) == 1e4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("chunk_rows")
def test_per_token_losses(dtype):
    hidden, weight, targets = inputs(23, 17, 8)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    actual = cross_entropy_per_token_reference(hidden, weight, targets)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not actual.requires_grad
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits.to(actual.dtype), targets, ignore_index=-100, reduction="none")
    assert torch.equal(actual == 0, targets == -100)
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(actual.dtype).eps, atol=1e-15)
    torch.testing.assert_close(actual.sum(), linear_cross_entropy_reference(hidden, weight, targets).detach())


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_out_of_range_are_not_silently_taken(target):
    hidden, weight, targets = inputs(3, 5, 4, ignored=0)
    targets[1] = target
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy_reference(hidden, weight, targets)
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy_per_token_reference(hidden, weight, targets)


def test_rejects_shapes_that_do_not_fit():
    hidden, weight, targets = inputs(3, 5, 4)
    with pytest.raises(ValueError, match=r"hidden and weight must have shapes \(N, D\) and \(V, D\), got \(3, 4\) and \(5, 3\)"):
        linear_cross_entropy_reference(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"targets must be int64 of shape \(3,\), got torch.int32"):
        linear_cross_entropy_reference(hidden, weight, targets.int())
