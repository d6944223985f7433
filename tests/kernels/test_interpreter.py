"""The patched interpreter itself: its numbers against torch's, and the faults that its memory must notice."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")
import interpreted_memory
import interpreted_numbers
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, 0.1, 1e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
N = 512


def numbers(seed, dtype=torch.bfloat16):
    """Some of every size, and all that is special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=generator) * 2.0 ** torch.randint(-30, 30, (N,), generator=generator)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL).roll(seed)
    return x.to(dtype)


# --- bfloat16 ---


@triton.jit
def elementwise(x_ptr, y_ptr, z_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    if NAME == "add":
        out = x + y
    elif NAME == "subtract":
        out = x - y
    elif NAME == "multiply":
        out = x * y
    elif NAME == "divide":
        out = x / y
    elif NAME == "negate":
        out = -x
    elif NAME == "abs":
        out = tl.abs(x)
    elif NAME == "where":
        out = tl.where(x < y, x, z)
    elif NAME == "maximum":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "chain":
        out = x * y + z - x
    elif NAME == "number":
        out = x * 0.7 + 3
    else:
        out = x
    tl.store(out_ptr + offsets, out)


EXPECTED = {
    "add": lambda x, y, z: x + y,
    "subtract": lambda x, y, z: x - y,
    "multiply": lambda x, y, z: x * y,
    "divide": lambda x, y, z: x / y,
    "negate": lambda x, y, z: -x,
    "abs": lambda x, y, z: x.abs(),
    "where": lambda x, y, z: torch.where(x < y, x, z),
    "maximum": lambda x, y, z: torch.maximum(x, y),
    "chain": lambda x, y, z: x * y + z - x,
    "number": lambda x, y, z: x * torch.tensor(0.7).bfloat16() + 3,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", EXPECTED)
def test_bfloat16_arithmetic_is_torchs(name):
    x, y, z = (numbers(seed) for seed in range(3))
    out = torch.empty_like(x)
    elementwise[(1,)](x, y, z, out, NAME=name, N=N)
    torch.testing.assert_close(out, EXPECTED[name](x, y, z), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_casts_round_to_the_nearest_and_ties_to_even(narrow):
    x = numbers(0, torch.float32)
    x[20:24] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])  # ties, and past one
    out = torch.empty(N, dtype=narrow)
    elementwise[(1,)](x, x, x, out, NAME="cast", N=N)
    torch.testing.assert_close(out, x.to(narrow), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(N)
    elementwise[(1,)](out, out, out, back, NAME="cast", N=N)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, sums_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    offsets = rows[:, None] * SIZE + rows[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    c = tl.dot(a, tl.trans(b), input_precision="ieee")
    tl.store(c_ptr + offsets, c)
    tl.store(sums_ptr + rows, tl.sum(a.to(tl.float32), axis=1))


def test_products_sum_in_float32():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64).bfloat16()
    c, sums = torch.empty(64, 64), torch.empty(64)
    product[(1,)](a, b, c, sums, SIZE=64)
    exact = a.double() @ b.double().T
    bound = 64 * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double().T)
    assert ((c - exact).abs() <= bound).all()
    torch.testing.assert_close(sums, a.float().sum(1))


# --- approximate instructions ---


@triton.jit
def function(x_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    if NAME == "exp2":
        out = tl.exp2(x)
    elif NAME == "exp":
        out = tl.exp(x)
    elif NAME == "log":
        out = tl.log(x)
    elif NAME == "log2":
        out = tl.log2(x)
    elif NAME == "sqrt":
        out = tl.sqrt(x)
    elif NAME == "rsqrt":
        out = tl.rsqrt(x)
    else:
        out = 1.7 / x
    tl.store(out_ptr + offsets, out)


FUNCTIONS = {
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "divide": lambda x: torch.tensor(1.7, dtype=torch.float32).double() / x,
}


@pytest.mark.parametrize("name", [*FUNCTIONS, "exp"])
def test_instructions_are_up_to_two_ulps_off_and_the_same_again(name, monkeypatch):
    interpreted_numbers.install_approximations(monkeypatch, seed=1)
    x = torch.rand(N, generator=torch.Generator().manual_seed(0)) * 8 + 0.01
    out, again = torch.empty(N), torch.empty(N)
    function[(1,)](x, out, NAME=name, N=N)
    function[(1,)](x, again, NAME=name, N=N)
    assert torch.equal(out, again)
    if name == "exp":  # the argument of the power is rounded
        name, x = "exp2", x * torch.tensor(1.4426950408889634)
    exact = FUNCTIONS[name](x.double()).float()
    assert (out.view(torch.int32) - exact.view(torch.int32)).unique().tolist() == [-2, -1, 0, 1, 2]


def test_two_to_the_zero_is_one(monkeypatch):
    interpreted_numbers.install_approximations(monkeypatch, seed=1)
    out = torch.empty(N)
    function[(1,)](torch.zeros(N), out, NAME="exp2", N=N)
    assert torch.equal(out, torch.ones(N))


# --- planted faults ---


@triton.jit
def copy(x_ptr, y_ptr, length, stride, READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride, mask=offsets < length + READS, other=0.0)
    tl.store(y_ptr + offsets * stride, x, mask=offsets < length + WRITES)


@triton.jit
def forgetful(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < length)  # what is masked out is undefined, and summed
    tl.store(y_ptr + tl.program_id(0), tl.sum(x, axis=0))


@triton.jit
def running_sum(x_ptr, y_ptr):
    program = tl.program_id(0)
    before = 0.0
    if program > 0:
        before = tl.load(y_ptr + program - 1)
    tl.store(y_ptr + program, before + tl.load(x_ptr + program))


@triton.jit
def overwrite(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def crowd(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def descriptor_copy(x_desc, y_ptr, start, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), x_desc.load([start]))


@pytest.fixture
def memory(monkeypatch):
    interpreted_memory.install_checks(monkeypatch, seed=0)


def launch_copy(x, y, length=20, stride=1, reads=0, writes=0):
    copy[(2,)](x, y, length, stride, READS=reads, WRITES=writes, BLOCK=16)


@pytest.mark.usefixtures("memory")
def test_right_accesses_pass():
    x, y = torch.randn(20), torch.zeros(20)
    launch_copy(x, y)
    assert torch.equal(y, x)
    wide, target = torch.randn(20, 3), torch.zeros(20, 3)
    launch_copy(wide[:, 1], target[:, 2], stride=3)
    assert torch.equal(target[:, 2], wide[:, 1])
    assert not target[:, :2].any()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": 1}, r"copy, program \(1, 0, 0\): reads x_ptr at byte 80 from its start"),
        ({"writes": 1}, r"copy, program \(1, 0, 0\): writes to y_ptr at byte 80 from its start"),
        ({"length": 21}, r"reads x_ptr at byte 80"),
    ],
    ids=["reads", "writes", "length"],
)
def test_one_past_the_end_is_noticed_inside_a_larger_buffer_too(change, message):
    for view in (lambda t: t, lambda t: torch.cat((t, t))[:20]):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
            launch_copy(view(torch.randn(20)), view(torch.zeros(20)), **change)


@pytest.mark.usefixtures("memory")
def test_other_columns_of_a_view_are_not_the_tensor():
    wide = torch.randn(20, 4)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="reads x_ptr at byte 8 from its start"):
        launch_copy(wide[:, :2], torch.zeros(20), length=8)


@pytest.mark.usefixtures("memory")
def test_before_the_start_is_noticed():
    buffer = torch.randn(40)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="reads x_ptr at byte -4 from its start"):
        copy[(1,)](buffer[20:], torch.zeros(20), 2, -1, READS=0, WRITES=0, BLOCK=16)


@pytest.mark.usefixtures("memory")
def test_what_was_never_written_spoils_the_result():
    x, y = torch.ones(20), torch.zeros(2)
    forgetful[(2,)](x, y, 20, BLOCK=16)
    assert y[0] == 16
    assert y[1].isnan()
    launch_copy(torch.empty(20), target := torch.zeros(20))
    assert target.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) > 2**29).all()
    assert torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (
            lambda: running_sum[(8,)](torch.ones(8), torch.zeros(8)),
            "y_ptr after program . (wrote to|read) it",
        ),
        (
            lambda: overwrite[(8,)](torch.ones(8), torch.zeros(1)),
            "writes to y_ptr after program . wrote to it",
        ),
        (lambda: crowd[(1,)](torch.zeros(8), BLOCK=16), "writes to y_ptr twice in one store"),
    ],
    ids=["reads another's result", "writes what another wrote", "two lanes"],
)
def test_programs_that_need_an_order_are_noticed(launch, message):
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        launch()


def test_programs_run_in_another_order(monkeypatch):
    """Even without the notes of who touched what, a kernel that counts on the order gives another result."""
    interpreted_memory.install_checks(monkeypatch, seed=0)
    monkeypatch.setattr(interpreted_memory.Memory, "note", lambda *_: None)
    y = torch.zeros(8)
    running_sum[(8,)](torch.ones(8), y)
    assert not torch.equal(y, torch.arange(1.0, 9))
    order = torch.zeros(1)
    overwrite[(8,)](torch.arange(8.0), order)
    assert order != 7


@pytest.mark.usefixtures("memory")
def test_descriptors_are_read_at_their_own_addresses():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.arange(40.0), torch.zeros(16)
    for start, expected in ((8, x[8:24]), (32, torch.cat((x[32:], torch.zeros(8))))):
        descriptor_copy[(1,)](TensorDescriptor(x, [40], [1], [16]), y, start, BLOCK=16)
        assert torch.equal(y, expected)
