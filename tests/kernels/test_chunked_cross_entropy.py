import pytest
import torch
import torch.nn.functional as F
from losses import NAMES, OPTIONS, inputs, run
from parity import assert_parity

from lumi.kernels import chunked_cross_entropy as module
from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy
from lumi.kernels.linear_cross_entropy import linear_cross_entropy_reference


def same_dtype_formula(hidden, weight, targets):
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.fixture(params=[5, 1_000_000], ids=["chunks", "one chunk"])
def chunk_rows(request, monkeypatch):
    """Several chunks with a short last one, or a single one."""

    def chunks(num_rows, vocab_size, device):
        return (slice(start, start + request.param) for start in range(0, num_rows, request.param))

    monkeypatch.setattr(module, "_chunks", chunks)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("expected_dloss", [1.0, 0.25, -3.0])
@pytest.mark.usefixtures("chunk_rows")
def test_float64_loss_and_gradients(ignored, options, expected_dloss):
    case = inputs(23, 17, 8, ignored)
    actual = run(chunked_cross_entropy, *case, 0.25, **options, expected_dloss=expected_dloss)
    expected = run(linear_cross_entropy_reference, *case, 0.25, **options)
    assert actual[0].dtype == torch.float64
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("chunk_rows")
def test_parity(dtype):
    hidden, weight, targets = inputs(130, 65, 32)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    same_dtype = run(same_dtype_formula, hidden, weight, targets)
    actual = run(chunked_cross_entropy, hidden, weight, targets)
    assert actual[0].dtype == torch.float32
    for name, a, s, e in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


def test_float32_weight_under_bfloat16_hidden():
    """The product is bfloat16, the gradient keeps the weight's dtype."""
    hidden, weight, targets = inputs(40, 30, 16)
    hidden, weight = hidden.bfloat16(), weight.float()
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    same_dtype = run(same_dtype_formula, hidden, weight, targets)
    actual = run(chunked_cross_entropy, hidden, weight, targets)
    assert [t.dtype for t in actual] == [torch.float32, torch.bfloat16, torch.float32]
    for name, a, s, e in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


def test_real_chunks_cover_every_row_once():
    for num_rows, vocab_size in ((0, 10), (1, 10), (5000, 4096), (5000, 32_768), (700, 10**7)):
        pieces = module._chunks(num_rows, vocab_size, torch.device("cpu"))
        covered = [row for piece in pieces for row in range(num_rows)[piece]]
        assert covered == list(range(num_rows))


@pytest.mark.usefixtures("chunk_rows")
def test_all_ignored_is_zero():
    hidden, weight, _ = inputs(7, 5, 4)
    loss, dhidden, dweight = run(chunked_cross_entropy, hidden, weight, torch.full((7,), -100))
    assert loss == 0
    assert not dhidden.any()
    assert not dweight.any()


def test_no_rows():
    hidden, weight, targets = inputs(0, 5, 4)
    loss, dhidden, dweight = run(chunked_cross_entropy, hidden, weight, targets)
    assert loss == 0
    assert dhidden.shape == (0, 4)
    assert not dweight.any()


def test_only_the_needed_gradient():
    hidden, weight, targets = inputs(9, 5, 4)
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None
    expected = run(linear_cross_entropy_reference, hidden, weight, targets)[1]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, targets).requires_grad


def test_large_logits_do_not_overflow():
    hidden, weight = torch.eye(4) * 1e4, torch.eye(4)
    targets = torch.tensor([0, 1, 2, 0])
    assert chunked_cross_entropy(hidden, weight, targets) == 1e4


@pytest.mark.parametrize("target", [-1, 5])
def test_targets_out_of_range_are_not_silently_taken(target):
    hidden, weight, targets = inputs(3, 5, 4, ignored=0)
    targets[1] = target
    with pytest.raises((IndexError, RuntimeError)):
        chunked_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("function", [chunked_cross_entropy, linear_cross_entropy_reference])
def test_rejects_shapes_that_do_not_fit(function):
    hidden, weight, targets = inputs(3, 5, 4)
    with pytest.raises(
        ValueError,
        match=r"hidden and weight must have shapes \(N, D\) and \(V, D\), got \(3, 4\) and \(5, 3\)",
    ):
        function(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"targets must be int64 of shape \(3,\), got torch.int32"):
        function(hidden, weight, targets.int())


def test_rejects_numbers_out_of_range():
    with pytest.raises(ValueError, match="z_loss must be finite and at least 0, got -1"):
        chunked_cross_entropy(*inputs(3, 5, 4), z_loss=-1)
    with pytest.raises(ValueError, match=r"expected_dloss must be between 2\^-100 and 2\^100 in size, got 0"):
        chunked_cross_entropy(*inputs(3, 5, 4), expected_dloss=0)
