import functools
import math

import pytest
import torch
from parity import assert_parity

from lumi import _csrc
from lumi.kernels import native as native_module
from lumi.kernels.adamw import adamw, adamw_reference
from lumi.kernels.global_norm import global_norm
from lumi.kernels.native import has_native, native_device

SHAPES = [(1,), (), (17,), (63,), (64, 3), (65,), (129, 5), (0,), (8191,), (8192,), (8193,), (65_537,)]
STEP = 7  # the number of the step that is made
NUMBERS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def tensors(shapes, device, dtype=torch.float32, seed=0):
    """Parameters, gradients, and states as six steps leave them: float32 values, in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda scale: [
        (torch.randn(shape, generator=generator) * scale).to(device, dtype) for shape in shapes
    ]
    steps = [torch.tensor(STEP - 1.0, device=device) for _ in shapes]
    return draw(1.0), draw(0.1), draw(0.05), [t.square() for t in draw(0.1)], steps


def clone(lists):
    return tuple([t.clone() for t in tensors] for tensors in lists)


def decays(shapes):
    return [0.1 if len(shape) > 1 else 0.0 for shape in shapes]


def truth(lists, weight_decays, factor=1.0):
    """AdamW by the paper's Algorithm 2, in float64, element by element (its schedule multiplier times alpha
    is our lr)."""
    lr, beta1, beta2, eps = (NUMBERS[name] for name in ("lr", "beta1", "beta2", "eps"))
    results = []
    for param, grad, m, v, before, decay in zip(
        *([t.double().cpu() for t in items] for items in lists), weight_decays, strict=True
    ):
        step = before.item() + 1
        g = grad * factor
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        results.append((param - lr * (m_hat / (v_hat**0.5 + eps)) - lr * decay * param, m, v))
    return results


def assert_is_a_step(lists, actual, factor=1.0, copies=None, **clip):
    """`actual` are params, exp_avgs and exp_avg_sqs after a step from `lists`: as good as the reference in
    float32."""
    weight_decays = decays([t.shape for t in lists[0]])
    same = clone(lists)
    adamw_reference(*same, weight_decays=weight_decays, **NUMBERS, **clip)
    expected = truth(lists, weight_decays, factor)
    for index, exact in enumerate(expected):
        for which, name, value in zip((0, 2, 3), ("param", "exp_avg", "exp_avg_sq"), exact, strict=True):
            assert_parity(f"{name}[{index}]", actual[which][index].cpu(), same[which][index].cpu(), value)
        assert actual[4][index] == lists[4][index] + 1
        if copies is not None:
            assert torch.equal(copies[index], actual[0][index].to(torch.bfloat16))


@pytest.fixture
def native(device):
    """The device, if Lumi has compiled code for it here."""
    if not has_native(torch.device(device)):
        pytest.skip("Lumi was installed without an nvcc: there is no CUDA code to test")
    return device


@pytest.fixture
def calls(monkeypatch):
    """How often compiled code was called."""
    counted = []
    for name in ("adamw", "adamw_cuda"):
        if hasattr(_csrc, name):
            real = getattr(_csrc, name)
            monkeypatch.setattr(_csrc, name, lambda *args, real=real: counted.append(1) or real(*args))
    return counted


def test_reference_is_the_papers_algorithm():
    lists = tensors(SHAPES, "cpu", torch.float64)
    actual = clone(lists)
    adamw_reference(*actual, weight_decays=decays(SHAPES), **NUMBERS)
    for index, exact in enumerate(truth(lists, decays(SHAPES))):
        for found, value in zip((actual[0], actual[2], actual[3]), exact, strict=True):
            torch.testing.assert_close(found[index], value, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("with_copies", [False, True])
def test_parity(native, calls, with_copies):
    lists = tensors(SHAPES, native)
    actual = clone(lists)
    copies = (
        [torch.empty(shape, dtype=torch.bfloat16, device=native) for shape in SHAPES] if with_copies else None
    )
    adamw(*actual, weight_decays=decays(SHAPES), copies=copies, **NUMBERS)
    assert len(calls) == 1
    assert_is_a_step(lists, actual, copies=copies)
    assert all(map(torch.equal, actual[1], lists[1]))


@pytest.mark.parametrize(
    ("max_norm", "loss_scale"), [(0.5, 1.0), (0.5, 1024.0), (1e9, 1024.0), (math.inf, 1.0)]
)
def test_clipping(native, max_norm, loss_scale):
    lists = tensors(SHAPES, native)
    lists = (lists[0], [g * loss_scale for g in lists[1]], *lists[2:])
    norm = global_norm(lists[1])
    actual = clone(lists)
    clip = {"norm": norm, "max_norm": max_norm, "loss_scale": loss_scale}
    adamw(*actual, weight_decays=decays(SHAPES), **NUMBERS, **clip)
    assert_is_a_step(lists, actual, min(1.0, max_norm / (norm.item() / loss_scale)) / loss_scale, **clip)
    assert all(map(torch.equal, actual[1], lists[1]))


def test_a_norm_beyond_float32(native):
    lists = tensors([(10,), (10,)], native)
    lists = (lists[0], [torch.full((10,), 3e38, device=native) for _ in range(2)], *lists[2:])
    norm = global_norm(lists[1])
    assert norm > torch.finfo(torch.float32).max
    actual = clone(lists)
    adamw(*actual, weight_decays=[0.0, 0.0], norm=norm, max_norm=1e3, **NUMBERS)
    assert_is_a_step(lists, actual, 1e3 / norm.item(), norm=norm, max_norm=1e3)


@pytest.mark.parametrize("implementation", [adamw, adamw_reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_where_the_norm_is_not_finite(native, bad, implementation):
    lists = tensors(SHAPES, native)
    lists[1][-1][-1] = bad
    actual = clone(lists)
    copies = [torch.full(shape, 3.0, dtype=torch.bfloat16, device=native) for shape in SHAPES]
    clip = {"norm": global_norm(lists[1]), "max_norm": 1.0, "copies": copies}
    implementation(*actual, weight_decays=decays(SHAPES), **NUMBERS, **clip)
    for before, after in zip(lists, actual, strict=True):
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    assert all((copy == 3.0).all() for copy in copies)


def test_copies_round_to_nearest_even_and_keep_nan(native):
    """Every upper half of a float32 with lower halves below, at and above the middle; lr 0 leaves finite
    parameters as they are."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    param = (
        torch.cat([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
        .view(torch.float32)
        .to(native)
    )
    before = param.clone()
    zeros = [torch.zeros_like(param) for _ in range(3)]
    copy = torch.empty(param.shape, dtype=torch.bfloat16, device=native)
    adamw(
        [param],
        [zeros[0]],
        [zeros[1]],
        [zeros[2]],
        [torch.zeros((), device=native)],
        weight_decays=[0.0],
        copies=[copy],
        **{**NUMBERS, "lr": 0.0},
    )
    finite = before.isfinite()
    bits = lambda t: t[finite].view({torch.float32: torch.int32, torch.bfloat16: torch.int16}[t.dtype])
    assert torch.equal(bits(param), bits(before))
    assert torch.equal(bits(copy), bits(before.to(torch.bfloat16)))
    assert copy[before.isnan()].isnan().all()


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("which", range(5))
def test_addresses_of_any_alignment(native, offset, which):
    """One of the five lists starts `offset` elements after a 16-byte boundary. The numbers must not change by
    a bit."""
    size = 8192 + 77
    lists = tensors([(size,)], native)
    copy = torch.empty(size, dtype=torch.bfloat16, device=native)
    expected, expected_copy = clone(lists), torch.empty_like(copy)
    settings = {"weight_decays": [0.1], **NUMBERS}
    adamw(*expected, copies=[expected_copy], **settings)
    shifted = [*(items[0] for items in lists[:4]), copy]
    memory = torch.zeros(size + 8, dtype=shifted[which].dtype, device=native)
    view = memory[offset : offset + size]
    view.copy_(shifted[which])
    shifted[which] = view
    adamw(*([t] for t in shifted[:4]), lists[4], copies=[shifted[4]], **settings)
    for a, b in zip(shifted, [*(items[0] for items in expected[:4]), expected_copy], strict=True):
        assert torch.equal(a, b)
    assert (memory[:offset] == 0).all()
    assert (memory[offset + size :] == 0).all()


def test_more_tensors_than_one_launch_holds(native):
    """Empty ones, arrays of one, two and three chunks in every launch, and a last launch that is not full."""
    shapes = [(index % 5 * (4100 if index % 7 == 0 else 1),) for index in range(1300)]
    lists = tensors(shapes, native)
    actual = clone(lists)
    copies = [torch.empty(shape, dtype=torch.bfloat16, device=native) for shape in shapes]
    adamw(*actual, weight_decays=decays(shapes), copies=copies, **NUMBERS)
    joined = lambda lists: (*([torch.cat(items)] for items in lists[:4]), lists[4][:1])
    assert len({step.item() for step in actual[4]}) == 1  # of empty tensors too
    assert_is_a_step(joined(lists), joined(actual), copies=[torch.cat(copies)])


def test_weight_decay_is_each_tensors_own(native):
    shapes = [(3,)] * 4
    lists = tensors(shapes, native)
    params = [t.clone() for t in lists[0]]
    zeros = lambda: [torch.zeros(3, device=native) for _ in shapes]
    adamw(params, zeros(), zeros(), zeros(), lists[4], weight_decays=[0.0, 0.5, 1.0, 100.0], **NUMBERS)
    for before, after, factor in zip(lists[0], params, (1.0, 0.995, 0.99, 0.0), strict=True):
        torch.testing.assert_close(after, before * factor, rtol=1e-6, atol=1e-7)


def test_each_tensor_has_its_own_count(native):
    """Of a first and a thousandth step, by hand."""
    ones = lambda: [torch.ones(3, device=native) for _ in range(2)]
    zeros = lambda: [torch.zeros(3, device=native) for _ in range(2)]
    params, steps = zeros(), [torch.tensor(count, device=native) for count in (0.0, 999.0)]
    adamw(params, ones(), zeros(), zeros(), steps, weight_decays=[0.0, 0.0], **NUMBERS)
    later = 0.01 * 0.1 / (1 - 0.9**1000) / math.sqrt(0.05 / (1 - 0.95**1000))
    for param, expected in zip(params, (0.01, later), strict=True):
        torch.testing.assert_close(param.cpu(), torch.full((3,), -expected), rtol=1e-6, atol=0)
    assert [step.item() for step in steps] == [1.0, 1000.0]


def test_twice_the_same(native):
    results = []
    for _ in range(2):
        actual = tensors(SHAPES, native)
        adamw(*actual, weight_decays=decays(SHAPES), norm=global_norm(actual[1]), max_norm=0.5, **NUMBERS)
        results.append(actual)
    for a, b in zip(*results, strict=True):
        assert all(map(torch.equal, a, b))


def test_does_not_depend_on_the_number_of_threads():
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            actual = tensors([(2_000_001,), (7,), (65_536,)], "cpu")
            adamw(*actual, weight_decays=[0.1, 0.0, 0.1], **NUMBERS)
            results.append(actual)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("implementation", [adamw, adamw_reference])
def test_autograd_notices(native, implementation):
    """A backward pass through a product that needs the old weight must refuse."""
    weight = torch.nn.Parameter(torch.ones(3, device=native))
    x = torch.ones(3, device=native, requires_grad=True)
    loss = (weight * x).sum()
    zeros = [torch.zeros(3, device=native) for _ in range(2)]
    implementation(
        [weight],
        [torch.ones(3, device=native)],
        [zeros[0]],
        [zeros[1]],
        [torch.zeros((), device=native)],
        weight_decays=[0.0],
        **NUMBERS,
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_code_is_for_plain_contiguous_float32_only(native, calls):
    plain = lambda: tensors([(6, 4)], native)
    adamw(*plain(), weight_decays=[0.0], **NUMBERS)
    assert len(calls) == 1
    subclass = type("Subclass", (torch.Tensor,), {})
    others = {
        "float64": tensors([(6, 4)], native, torch.float64),
        "strides": (*([t[0].T] for t in tensors([(4, 6)], native)[:4]), plain()[4]),
        "subclass": (*([t[0].as_subclass(subclass)] for t in plain()[:4]), plain()[4]),
        "bfloat16": tensors([(6, 4)], native, torch.bfloat16),
    }
    for name, lists in others.items():
        before = clone(lists)
        adamw(*lists, weight_decays=[0.1], **NUMBERS)
        assert len(calls) == 1, name
        adamw_reference(*before, weight_decays=[0.1], **NUMBERS)
        assert torch.equal(lists[0][0], before[0][0]), name


def test_nothing(device):
    adamw([], [], [], [], [], weight_decays=[], **NUMBERS)
    adamw_reference([], [], [], [], [], weight_decays=[], **NUMBERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "steps must be one for each of 1 parameters, got 0"),
        (
            {"steps": [torch.ones((), dtype=torch.int64)]},
            r"steps\[0\] must be a float32 scalar on cpu, got torch.int64 of shape \(\) on cpu",
        ),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"max_norm": math.nan}, "max_norm must be positive, got nan"),
        ({"loss_scale": 0.0}, "loss_scale must be positive, got 0.0"),
        ({"weight_decays": [-0.5]}, r"weight_decays\[0\] must be at least 0, got -0.5"),
        ({"weight_decays": []}, "weight_decays must be one for each of 1 parameters, got 0"),
        ({"grads": []}, "grads must be one for each of 1 parameters, got 0"),
        (
            {"params": [torch.ones(3, dtype=torch.int64)]},
            r"params\[0\] must be floating-point and on cpu, got torch.int64 on cpu",
        ),
        (
            {"grads": [torch.ones(2)]},
            r"grads\[0\] must be torch.float32 of shape \(3,\) on cpu, "
            r"got torch.float32 of shape \(2,\) on cpu",
        ),
        (
            {"exp_avgs": [torch.ones(3).double()]},
            r"exp_avgs\[0\] must be torch.float32 of shape \(3,\) on cpu, "
            r"got torch.float64 of shape \(3,\) on cpu",
        ),
        (
            {"exp_avg_sqs": [torch.ones(3, device="meta")]},
            r"exp_avg_sqs\[0\] must be torch.float32 of shape \(3,\) on cpu, "
            r"got torch.float32 of shape \(3,\) on meta",
        ),
        (
            {"copies": [torch.ones(3)]},
            r"copies\[0\] must be torch.bfloat16 of shape \(3,\) on cpu, "
            r"got torch.float32 of shape \(3,\) on cpu",
        ),
        ({"copies": []}, "copies must be one for each of 1 parameters, got 0"),
        (
            {"norm": torch.ones(())},
            r"norm must be a float64 scalar on cpu, got torch.float32 of shape \(\) on cpu",
        ),
        (
            {"norm": torch.ones(1).double()},
            r"norm must be a float64 scalar on cpu, got torch.float64 of shape \(1,\) on cpu",
        ),
    ],
    ids=str,
)
def test_refuses(change, message):
    lists = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    settings = {**lists, "steps": [torch.zeros(())], "weight_decays": [0.0], **NUMBERS, **change}
    with pytest.raises(ValueError, match=f"^{message}$"):
        adamw(**settings)


@pytest.mark.gpu
def test_nobody_waits_for_the_device(native):
    lists, settings = tensors(SHAPES, native), {"weight_decays": decays(SHAPES), "max_norm": 0.5, **NUMBERS}
    norm = global_norm(lists[1])
    adamw(*lists, norm=norm, **settings)  # loads the kernel
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    adamw(*lists, norm=norm, **settings)
    assert not torch.cuda.current_stream().query(), "the step came back only after the device was done"


@pytest.mark.gpu
def test_a_gpu_older_than_the_compiled_code_gets_the_reference(native, calls, monkeypatch):
    monkeypatch.setattr(native_module, "has_native", lambda device: False)
    lists = tensors(SHAPES, native)
    actual = clone(lists)
    adamw(*actual, weight_decays=decays(SHAPES), norm=global_norm(lists[1]), max_norm=0.5, **NUMBERS)
    adamw_reference(*lists, weight_decays=decays(SHAPES), norm=global_norm(lists[1]), max_norm=0.5, **NUMBERS)
    assert not calls
    for a, b in zip(actual, lists, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("has_cuda", "capability", "expected"),
    [
        (True, (7, 5), False),
        (True, (8, 0), True),
        (True, (8, 9), True),
        (True, (12, 0), True),
        (False, (9, 0), False),
    ],
    ids=str,
)
def test_which_gpus_there_is_compiled_code_for(monkeypatch, has_cuda, capability, expected):
    asked = []
    monkeypatch.setattr(_csrc, "has_cuda", has_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(native_module, "_capability", functools.cache(native_module._capability.__wrapped__))
    for index, name in ((1, "cuda:1"), (1, "cuda:1"), (2, "cuda"), (2, "cuda:2")):
        assert has_native(torch.device(name)) is expected, index
    assert asked == ([1, 2] if has_cuda else []), "each device is asked once"
    assert has_native(torch.device("cpu"))
    assert not has_native(torch.device("meta"))


def test_which_tensors_compiled_code_takes(native):
    x = torch.ones(4, 4, device=native)
    assert native_device([x, torch.nn.Parameter(x), x[:0], x[1]]) == x.device
    assert native_device([x.bfloat16()], torch.bfloat16) == x.device
    assert native_device([]) is None
    others = [
        x.double(),
        x.T[:2],
        x.bfloat16(),
        x.as_subclass(type("Subclass", (torch.Tensor,), {})),
        x.to("meta"),
        1.0,
    ]
    for index, other in enumerate(others):
        assert native_device([x, other]) is None, index
        assert native_device([other, x]) is None, index
    assert native_device([x.to("meta")]) is None


@pytest.mark.gpu
def test_queued_on_the_current_stream(native):
    """On a stream that is busy making the gradients: taken from another stream, they would still be NaN."""
    lists = tensors([(1 << 22,)], native)
    actual, late = clone(lists), torch.full_like(lists[1][0], math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(lists[1][0])
        norm = global_norm([late])
        adamw(
            actual[0],
            [late],
            *actual[2:],
            weight_decays=[0.0],
            norm=norm,
            max_norm=1.0,
            **NUMBERS,
        )
        norm = norm.item()
    assert_is_a_step(lists, actual, min(1.0, 1.0 / norm), norm=global_norm(lists[1]), max_norm=1.0)


@pytest.mark.gpu
def test_captured_into_a_graph(native):
    """The addresses travel as arguments, which a graph keeps: a replay works on the same memory with its
    contents of then, the number of the step too."""
    lists, others = tensors(SHAPES, native), tensors(SHAPES, native, seed=1)
    others[4][0] += 5
    expected, actual = clone(others), clone(lists)
    settings = {"weight_decays": decays(SHAPES), "max_norm": 0.5, **NUMBERS}
    adamw(*expected, norm=global_norm(expected[1]), **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw(*actual, norm=global_norm(actual[1]), **settings)
    for target, source in zip(actual, others, strict=True):
        torch._foreach_copy_(target, source)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert all(map(torch.equal, a, b))
