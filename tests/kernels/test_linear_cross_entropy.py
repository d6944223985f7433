import pytest
import torch
from losses import NAMES, OPTIONS, inputs, run
from parity import DTYPES, assert_parity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumi.kernels import linear_cross_entropy as module
from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy
from lumi.kernels.linear_cross_entropy import (
    _linear_cross_entropy_op,
    _rescale_op,
    linear_cross_entropy,
    linear_cross_entropy_fwd,
    linear_cross_entropy_reference,
    rescale,
    triton_chunk_rows,
    workspace_bytes,
)

# The interpreter's numpy warns about what nothing reads: the logits' buffer between V and its row's end.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


# --- the definition ---


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_definition_is_the_equations(ignored, options):
    """Row by row, target by target, in float64."""
    hidden, weight, targets = inputs(23, 17, 8, ignored)
    loss, dhidden, dweight = 0.0, torch.zeros_like(hidden), torch.zeros_like(weight)
    z_loss = options.get("z_loss", 0.0)
    for n, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        logits = weight @ hidden[n]
        lse = logits.exp().sum().log()
        loss += lse - logits[target] + z_loss * lse**2
        dlogits = logits.exp() / logits.exp().sum() * (1 + 2 * z_loss * lse)
        dlogits[target] -= 1
        dhidden[n] = dlogits @ weight
        dweight += torch.outer(dlogits, hidden[n])
    actual = run(linear_cross_entropy_reference, hidden, weight, targets, **options)
    for name, a, e in zip(NAMES, actual, (loss, dhidden, dweight), strict=True):
        torch.testing.assert_close(
            a, e, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_definition_has_a_wide_loss(dtype):
    hidden, weight, targets = inputs(7, 5, 4)
    loss = linear_cross_entropy_reference(hidden.to(dtype), weight, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# --- the Triton operator ---


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows at most."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(module, "_ROW_MULTIPLE", 4)


def device_inputs(N, V, D, dtype, device, weight_dtype=None, ignored=0.3):
    hidden, weight, targets = inputs(N, V, D, ignored)
    return hidden.to(device, dtype), (weight / 2).to(device, weight_dtype or dtype), targets.to(device)


def assert_all_parity(*cases, factor=0.7, **options):
    """Parity of the loss, dhidden and dweight over all (hidden, weight, targets) together: one rounding error
    is luck, not a budget."""
    exact, same_dtype, actual = [], [], []
    for hidden, weight, targets in cases:
        exact.append(
            run(linear_cross_entropy_reference, hidden.double(), weight.double(), targets, factor, **options)
        )
        same_dtype.append(run(chunked_cross_entropy, hidden, weight, targets, factor, **options))
        actual.append(run(linear_cross_entropy, hidden, weight, targets, factor, **options))
    assert [t.dtype for t in actual[0]] == [torch.float32, cases[0][0].dtype, cases[0][1].dtype]
    for index, name in enumerate(NAMES):
        assert_parity(
            name,
            *(torch.stack([result[index] for result in results]) for results in (actual, same_dtype, exact)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.soak) for n in (63, 64, 129))]
)
def test_triton_parity(rows, dtype, device):
    assert_all_parity(device_inputs(rows, 97, 32, dtype, device, ignored=0.3 if rows > 1 else 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 1000, 2048, 32_769])
def test_triton_parity_over_vocabularies(vocab_size, dtype, device):
    """Part of one tile, tiles that end where the row ends, and a last tile that is nearly empty."""
    assert_all_parity(device_inputs(17, vocab_size, 24, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_triton_parity_in_chunks(options, dtype, device):
    assert_all_parity(device_inputs(27, 65, 32, dtype, device), **options)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str
)
@pytest.mark.usefixtures("small_chunks")
def test_triton_parity_with_a_weight_of_another_dtype(dtype, weight_dtype, device):
    assert_all_parity(device_inputs(19, 65, 32, dtype, device, weight_dtype))


def test_triton_parity_of_a_weight_gradient_that_is_rounded_by_the_product(device, monkeypatch):
    """As of a bfloat16 weight when one chunk holds all rows."""
    monkeypatch.setattr(module, "dweight_dtype", lambda N, V, dtype, weight_dtype: weight_dtype)
    assert_all_parity(device_inputs(33, 65, 32, torch.float16, device))


def test_dtype_of_the_sum_of_the_weight_gradient():
    most = 4096
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert module.dweight_dtype(most, 128_256, brain, brain) == brain
    assert module.dweight_dtype(most + 1, 128_256, brain, brain) == single
    assert [
        module.dweight_dtype(1, 10, *pair) for pair in ((half, half), (brain, single), (single, brain))
    ] == [single] * 3


@pytest.mark.parametrize(
    "view",
    [
        lambda hidden, weight, targets: (hidden[:, 8:24], weight[:, 8:24], targets),
        lambda hidden, weight, targets: (hidden[:, ::2], weight[:, ::2], targets),
        lambda hidden, weight, targets: (hidden[::2], weight[::3], targets[::2] % 11),
        lambda hidden, weight, targets: (hidden.T, weight.T[:, :20], targets.repeat(2)[:32] % 32),
        lambda hidden, weight, targets: (hidden[:1].expand(20, -1), weight[:1].expand(33, -1), targets),
    ],
    ids=["columns", "strided columns", "rows", "transposed", "stride-0 rows"],
)
@pytest.mark.usefixtures("small_chunks")
def test_triton_strides_are_respected(view, device):
    hidden, weight, targets = view(*device_inputs(20, 33, 32, torch.float32, device, ignored=0.0))
    assert not hidden.is_contiguous()
    assert_all_parity((hidden, weight, targets))


@pytest.mark.usefixtures("small_chunks")
def test_triton_leaves_inputs_alone_and_is_deterministic(device):
    case = device_inputs(19, 65, 16, torch.float16, device)
    before = [t.clone() for t in case]
    first, second = (run(linear_cross_entropy, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_without_counted_rows_or_rows(device):
    hidden, weight, targets = device_inputs(7, 5, 4, torch.float32, device)
    for rows in (7, 0):
        loss, dhidden, dweight = run(
            linear_cross_entropy, hidden[:rows], weight, torch.full_like(targets, -100)[:rows], z_loss=1.0
        )
        assert loss == 0
        assert dhidden.shape == (rows, 4)
        assert not dhidden.any()
        assert not dweight.any()


def test_triton_ignored_rows_have_zero_gradients(device):
    hidden, weight, targets = device_inputs(12, 40, 8, torch.float32, device)
    dhidden = run(linear_cross_entropy, hidden, weight, targets, z_loss=0.1)[1]
    assert torch.equal(dhidden.any(dim=1), targets != -100)


@pytest.mark.parametrize("target", [-1, 5, 2**32])
def test_triton_turns_a_target_out_of_range_into_nan(target, device):
    hidden, weight, targets = device_inputs(3, 5, 4, torch.float32, device, ignored=0.0)
    targets[1] = target
    loss, dhidden, dweight = run(linear_cross_entropy, hidden, weight, targets)
    assert loss.isnan()
    assert dhidden.isnan().all(dim=1).tolist() == [False, True, False]
    assert dweight.isnan().all()


def test_triton_large_logits_do_not_overflow(device):
    hidden, weight = torch.eye(4, device=device) * 1e4, torch.eye(4, device=device)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 0], device=device)) == 1e4


def test_triton_only_the_needed_gradient(device, monkeypatch):
    hidden, weight, targets = device_inputs(9, 33, 4, torch.float32, device)
    loss, dhidden, dweight = run(linear_cross_entropy, hidden, weight, targets)
    asked = []

    def record(*args):
        asked.append(args[5:7])
        return _linear_cross_entropy_op(*args)

    monkeypatch.setattr(module, "_linear_cross_entropy_op", record)
    for index, expected in ((0, dhidden), (1, dweight)):
        leaves = [hidden.clone(), weight.clone()]
        leaves[index].requires_grad_()
        linear_cross_entropy(*leaves, targets).backward()
        assert torch.equal(leaves[index].grad, expected)
        assert leaves[1 - index].grad is None
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets)
    assert not alone.requires_grad
    assert torch.equal(alone, loss)
    assert asked == [(True, False), (False, True), (False, False)]
    outputs = _linear_cross_entropy_op(hidden.detach(), weight.detach(), targets, 0.0, 1.0, False, False)
    assert [t.numel() for t in outputs] == [1, 0, 0]


# --- the incoming gradient ---


@pytest.mark.parametrize("expected_dloss", [1.0, 0.7, -1e-3])
@pytest.mark.usefixtures("small_chunks")
def test_triton_is_right_for_any_incoming_gradient(expected_dloss, device):
    case = device_inputs(19, 65, 16, torch.float32, device)
    exact = run(linear_cross_entropy_reference, case[0].double(), case[1].double(), case[2], 0.7)
    same_dtype = run(chunked_cross_entropy, *case, 0.7)
    actual = run(linear_cross_entropy, *case, 0.7, expected_dloss=expected_dloss)
    for name, a, s, e in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert_parity(name, a, s, e)


@pytest.mark.parametrize("factor", [1.0, 0.1, 1 / 3, 65_536 / 1000])
def test_an_expected_gradient_arrives_as_expected(factor, device, monkeypatch):
    """`factor` as a training loop applies it, a Python number, comes back as the very float32 that the kernel
    compares with."""
    hidden, weight, targets = device_inputs(9, 33, 8, torch.float32, device)
    stored = linear_cross_entropy_fwd(hidden, weight, targets, 0.0, factor, True, True)[1:]
    seen = []

    def record(gradient, dloss, expected_dloss):
        assert dloss == torch.tensor(expected_dloss, device=device)
        seen.append(gradient.data_ptr())
        rescale(gradient, dloss, expected_dloss)

    monkeypatch.setattr(module, "rescale", record)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    (linear_cross_entropy(hidden, weight, targets, expected_dloss=factor) * factor).backward()
    assert [
        hidden.grad.data_ptr(),
        weight.grad.data_ptr(),
    ] == seen  # the forward's tensors become .grad without a copy
    assert torch.equal(hidden.grad, stored[0])
    assert torch.equal(weight.grad, stored[1])


@pytest.mark.parametrize("function", [linear_cross_entropy, chunked_cross_entropy])
def test_loss_scaling_keeps_small_float16_gradients(function, device):
    """A probability of 2^-26 is 0 in float16; times a factor of 2^16 it is not."""
    hidden, weight = torch.tensor([[18.0, 0.0]], device=device).half(), torch.eye(2, device=device).half()
    targets, factor = torch.tensor([0], device=device), 2.0**16
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), targets, factor)[1]
    late = run(function, hidden, weight, targets, factor)[1]
    early = run(function, hidden, weight, targets, factor, expected_dloss=factor)[1]
    assert late[0, 1] == 0
    torch.testing.assert_close(early[0, 1].double(), exact[0, 1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_elements", [1, 4096, 5000, 40_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescale(num_elements, dtype, device):
    gradient = torch.randn(num_elements, device=device).to(dtype)
    before = gradient.clone()
    rescale(
        gradient, torch.tensor(float("inf"), device=device), float("inf")
    )  # inf / inf would be NaN: nothing is multiplied
    assert torch.equal(gradient, before)
    dloss = torch.tensor(0.3, device=device)
    rescale(gradient, dloss, 2.0)
    assert torch.equal(gradient, (before.float() * (dloss / 2.0)).to(dtype))


def test_a_second_backward_is_refused(device):
    hidden, weight, targets = device_inputs(9, 33, 8, torch.float32, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- memory ---


class Allocations(TorchDispatchMode):
    """Collects, by address, every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.tensors = {}  # kept alive, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr():
                self.tensors.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return result

    def sizes(self, *but):
        """Bytes of each storage, but for those of some tensors."""
        old = {t.untyped_storage().data_ptr() for t in but}
        return [t.untyped_storage().nbytes() for address, t in self.tensors.items() if address not in old]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_allocates_what_workspace_bytes_says(needs, weight_dtype, device):
    N, V, D = 45, 97, 4
    hidden, weight, targets = device_inputs(N, V, D, torch.float32, device, weight_dtype)
    with Allocations() as allocations:
        linear_cross_entropy_fwd(hidden, weight, targets, 0.0, 1.0, *needs)
    sizes = allocations.sizes(hidden, weight, targets)
    the_sum = 4  # of the losses, which the operator adds
    assert sum(sizes) + the_sum == workspace_bytes(N, D, V, torch.float32, weight_dtype, *needs)
    assert max(sizes) < N * V


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_never_holds_all_logits(dtype, device):
    N, V, D = 45, 97, 4
    hidden, weight, targets = device_inputs(N, V, D, dtype, device)
    with Allocations() as allocations:
        linear_cross_entropy_fwd(hidden, weight, targets, 0.0, 1.0, True, True)
    assert max(allocations.sizes(hidden, weight, targets)) < N * V


def test_backward_allocates_only_a_16_bit_gradient(device):
    for weight_dtype in (torch.float32, torch.float16):
        hidden, weight, targets = device_inputs(9, 97, 4, torch.float16, device, weight_dtype)
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
        with Allocations() as allocations:
            grads = torch.autograd.grad(loss * 0.3, (hidden, weight))
        large = [
            size
            for size in allocations.sizes(*(grads if weight_dtype == torch.float32 else grads[:1]))
            if size > 4
        ]
        assert large == ([2 * weight.numel()] if weight_dtype == torch.float16 else [])


@pytest.mark.parametrize("V", [1, 97, 32_768, 128_256, 262_144])
@pytest.mark.parametrize("element_size", [2, 4])
def test_chunks_are_few_even_and_within_the_bound(V, element_size):
    for N in (0, 1, 100, 2048, 2049, 4096, 5000, 16_384, 100_000):
        rows = triton_chunk_rows(N, V, element_size)
        num_chunks = -(-N // rows) if N else 0
        padded = -(-V // 64) * 64
        assert rows * padded * element_size <= max(
            module.LOGITS_BYTES, module.MIN_CHUNK_ROWS * padded * element_size
        )
        assert rows >= min(N, module.MIN_CHUNK_ROWS // 2)
        most = max(module.MIN_CHUNK_ROWS, module.LOGITS_BYTES // (padded * element_size) // 128 * 128)
        assert num_chunks == -(-N // most)
        assert N == 0 or (num_chunks - 1) * rows < N <= num_chunks * rows


# --- registration ---


def test_operators_are_registered_whole(device):
    """Schema, fake tensors, autograd and AOT dispatch agree with what the kernels do.

    AOT dispatch of the forward with its backward is left to the tests under torch.compile: opcheck hands all
    three outputs to the user, and an output of a graph may not be changed by the graph's backward. The public
    function keeps the two gradients to itself.
    """
    hidden, weight, targets = device_inputs(9, 33, 8, torch.float32, device)
    torch.library.opcheck(_linear_cross_entropy_op, (hidden, weight, targets, 0.0, 1.0, True, False))
    case = (hidden.requires_grad_(), weight.requires_grad_(), targets, 0.1, 0.5, True, True)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_linear_cross_entropy_op, case, test_utils=utilities)
    torch.library.opcheck(
        _rescale_op, (torch.randn(9, 8, device=device), torch.tensor(2.0, device=device), 1.0)
    )


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=str)
def test_fake_tensors_have_the_real_shapes(needs, device):
    hidden, weight, targets = device_inputs(9, 33, 8, torch.float16, device, torch.float32)
    hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    options = (0.0, 1.0, *needs)
    real = _linear_cross_entropy_op(hidden, weight, targets, *options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = _linear_cross_entropy_op(*(mode.from_tensor(t) for t in (hidden, weight, targets)), *options)
    assert [(t.shape, t.stride(), t.dtype, t.device) for t in fake] == [
        (t.shape, t.stride(), t.dtype, t.device) for t in real
    ]


@pytest.mark.parametrize("wrapped", ["checkpointed", "compiled"])
@pytest.mark.parametrize("expected_dloss", [1.0, 0.7])
def test_checkpointed_and_compiled_it_is_the_same(wrapped, expected_dloss, device):
    def function(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, 0.1, expected_dloss)

    if wrapped == "checkpointed":
        wrap = lambda *case: torch.utils.checkpoint.checkpoint(function, *case, use_reentrant=False)
    else:
        wrap = torch.compile(function, fullgraph=True, backend="aot_eager")
    case = device_inputs(9, 33, 8, torch.float32, device)
    results = (run(f, *case, 0.7) for f in (wrap, function))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_together_with_its_surroundings(dynamic, device):
    case = device_inputs(9, 33, 8, torch.float32, device)

    def step(hidden, weight, targets):
        return linear_cross_entropy(hidden * 2, weight, targets) * 0.5

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, *case), run(step, *case), strict=True))


HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (
            (HIDDEN, WEIGHT[:, :3], TARGETS),
            {},
            r"hidden and weight must have shapes .*, got \(3, 4\) and \(5, 3\)",
        ),
        (
            (HIDDEN, WEIGHT, TARGETS[:2]),
            {},
            r"targets must be int64 of shape \(3,\), got torch.int64 of shape \(2,\)",
        ),
        ((HIDDEN, WEIGHT, TARGETS.int()), {}, "targets must be int64 .*, got torch.int32"),
        ((HIDDEN, WEIGHT[:0], TARGETS), {}, r"weight must have at least one row, got shape \(0, 4\)"),
        (
            (HIDDEN.double(), WEIGHT, TARGETS),
            {},
            r"hidden must be float32, bfloat16 or float16, got torch\.float64",
        ),
        (
            (HIDDEN, WEIGHT.double(), TARGETS),
            {},
            r"weight must be float32, bfloat16 or float16, got torch\.float64",
        ),
        ((HIDDEN, WEIGHT.to("meta"), TARGETS), {}, "weight must be on the device of hidden, cpu, got meta"),
        ((HIDDEN, WEIGHT, TARGETS.to("meta")), {}, "targets must be on the device of hidden, cpu, got meta"),
        ((HIDDEN, WEIGHT, TARGETS), {"z_loss": -1.0}, "z_loss must be finite and at least 0, got -1.0"),
        (
            (HIDDEN, WEIGHT, TARGETS),
            {"z_loss": float("nan")},
            "z_loss must be finite and at least 0, got nan",
        ),
        (
            (HIDDEN, WEIGHT, TARGETS),
            {"expected_dloss": 0.0},
            r"expected_dloss must be between 2\^-100 and 2\^100 in size, got 0.0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_triton_refuses(case, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*case, **options)


# --- on a GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_within_the_bound(weight_dtype):
    N, V, D = 8192, 128_256, 512  # several chunks: their logits alone would take 2 GB
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=weight_dtype).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    linear_cross_entropy(
        hidden[:256], weight, targets[:256]
    ).backward()  # cuBLAS allocates its workspace once
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (linear_cross_entropy(hidden, weight, targets) * 0.5).backward()
    torch.cuda.synchronize()
    backward = 0 if weight_dtype == torch.float32 else 2 * V * D
    rounding = 2**22  # a few blocks of up to 2 MiB
    assert (
        torch.cuda.max_memory_allocated() - before
        <= workspace_bytes(N, D, V, torch.bfloat16, weight_dtype) + backward + rounding
    )


@pytest.mark.gpu
def test_logits_past_two_to_the_31_elements(monkeypatch):
    """Addresses of the last rows of one chunk do not fit 32 bits."""
    monkeypatch.setattr(module, "LOGITS_BYTES", 2**33)
    N, V, D = 2**14 + 128, 2**17, 16
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(V, (N,), device="cuda")
    assert triton_chunk_rows(N, V, 2) == N
    whole = linear_cross_entropy_fwd(hidden, weight, targets, 0.0, 1.0, True, False)
    last = linear_cross_entropy_fwd(hidden[-128:], weight, targets[-128:], 0.0, 1.0, True, False)
    exact = run(linear_cross_entropy_reference, hidden[-128:].double(), weight.double(), targets[-128:])
    assert_parity("dhidden", whole[1][-128:], last[1], exact[1])
