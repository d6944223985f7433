"""The estimate of `benchmarks/roofline.py`, against clocks that were computed by hand."""

import importlib
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("roofline")


def test_the_tensor_cores_peak_is_the_datasheets(roofline):
    """m64n64k16 in 32 clocks is 4096 FLOP a clock: 989 TFLOP/s of 132 multiprocessors at 1.83 GHz."""
    walk = roofline.Walk(num_warps=4, instructions=1, shared_products=Counter({64: 1}))
    flop = 2 * 64 * 64 * 16 / roofline.estimate(walk).products * roofline.SMS * 1.83e9
    assert flop == pytest.approx(989e12, rel=0.001)


@pytest.mark.parametrize(
    ("N", "from_shared", "from_registers"),
    [
        (256, 128, 128),
        (128, 64, 64),
        (64, 32, 32),
        (32, 24, 16),  # (2048 + 32 * 32) / 128: reading shared memory takes longer than multiplying
        (16, 20, 16),  # at half of the rate or less
    ],
)
def test_clocks_of_an_hgmma(roofline, N, from_shared, from_registers):
    one = Counter({N: 1})
    shared = roofline.Walk(num_warps=4, instructions=1, shared_products=one)
    registers = roofline.Walk(num_warps=4, instructions=1, register_products=one)
    assert roofline.estimate(shared).products == from_shared
    assert roofline.estimate(registers).products == from_registers


def test_units_of_a_block_of_eight_warps(roofline):
    """Two warps on each quarter: 2 x 100 issue slots, 2 x 10 x 8 of MUFU, 2 x (4 x 64 + 2 x 32) of HGMMA."""
    walk = roofline.Walk(
        num_warps=8,
        instructions=100,
        mufu=10,
        shared_products=Counter({128: 4}),
        register_products=Counter({64: 2}),
        cache_bytes=2750,
        ahead=1,
        blocks=1,
    )
    found = roofline.estimate(walk)
    assert (found.issue, found.mufu, found.products) == (200, 160, 640)
    assert found.memory == pytest.approx(100, rel=0.001)  # 27.5 bytes a clock
    assert found.alone == 840  # products, then the rest; the copy is under way meanwhile
    assert found.of_products == pytest.approx(640 / 840)
    assert found.of_memory == 0
    assert found.binds == "alone"


def test_a_second_resident_block_fills_the_gaps(roofline):
    walk = {"num_warps": 4, "instructions": 200, "shared_products": Counter({128: 5})}
    one, two, three = (roofline.estimate(roofline.Walk(**walk, blocks=blocks)) for blocks in (1, 2, 3))
    assert one.alone == 320 + 2 * 200  # an instruction every second clock
    assert (one.binds, one.of_products) == ("alone", pytest.approx(320 / 720))
    assert (two.binds, two.of_products) == ("alone", pytest.approx(320 / 360))
    assert (three.binds, three.of_products) == ("products", 1)


def test_narrow_products_cost_half_of_the_peak(roofline):
    walk = roofline.Walk(num_warps=4, instructions=1, register_products=Counter({16: 100}), blocks=8)
    found = roofline.estimate(walk)
    assert (found.products, found.binds, found.of_products) == (1600, "products", 0.5)


def test_hmma_has_half_of_the_rate(roofline):
    """m16n8k16 is 2048 of the 512 products a clock and quarter, at half of the rate: 8 clocks."""
    found = roofline.estimate(roofline.Walk(num_warps=4, instructions=1, hmma=10, blocks=100))
    assert (found.products, found.of_products) == (80, 0.5)


def test_a_copy_behind_the_last_product_is_not_ahead(roofline):
    """6400 bytes from the cache take 260 + 100 clocks. With two stages a walk asks for them at its end."""
    walk = {"num_warps": 4, "instructions": 100, "cache_bytes": 6400}
    alone = {ahead: roofline.estimate(roofline.Walk(**walk, ahead=ahead)).alone for ahead in (0, 0.5, 1, 2)}
    assert alone == {0: 200 + 360, 0.5: 200 + 260, 1: 360, 2: 200}


def test_the_part_of_a_walk_before_its_copies(roofline):
    """Eight warps: 2 x 32 clocks of HGMMA, 2 of FADD, then 2 of the copy and 64 + 2 behind it: 66 of 134."""
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
    lines = (product, "FADD R4, R4, R5", "@UP3 UTMALDG.3D [UR16], [UR34]", product, "@P0 BRA 0x0")
    sass = "\n".join(f"  /*{16 * place:04x}*/  {line} ;" for place, line in enumerate(lines))
    main = importlib.import_module("machine_code").parse(sass).main
    assert roofline.time_before_copies(main, num_warps=8) == pytest.approx(66 / 134)


def test_rows_are_bound_by_memory(roofline):
    """20.7 bytes a clock and multiprocessor are 4.8 TB/s of 132 at 1.755 GHz."""
    walk = roofline.Walk(num_warps=4, instructions=100, loaded_bytes=2 * 1024, stored_bytes=1024, blocks=8)
    found = roofline.estimate(walk)
    assert found.memory == pytest.approx(3072 / 20.72, rel=0.001)
    assert found.memory * 4.8e12 / 132 / 1.755e9 == pytest.approx(3072)
    assert found.alone == (480 + 2048 / 64 + 200) / 8
    assert (found.binds, found.of_memory, found.of_products) == ("memory", 1, 0)


def test_one_resident_block_leaves_memory_waiting(roofline):
    walk = {"num_warps": 16, "instructions": 200, "loaded_bytes": 4096, "stored_bytes": 4096}
    one = roofline.estimate(roofline.Walk(**walk))
    assert one.alone == 480 + 64 + 200 * 4  # four warps on each quarter
    assert (one.binds, one.of_memory) == ("alone", pytest.approx(8192 / 20.72 / 1344, rel=0.001))
    # Without barriers each warp waits for its own part, and works while others wait.
    free = roofline.estimate(roofline.Walk(**walk, in_step=False))
    assert free.alone == 480 + 4 + 200 * 2
    assert free.binds == "alone"


def test_attentions_backward_counts_five_of_seven_products(roofline):
    assert roofline.backward_of_products(1.0, 1.0) == pytest.approx(5 / 7)
    # Four units of work at half of the peak and three at the whole take 8 + 3 units of time.
    assert roofline.backward_of_products(0.5, 1.0) == pytest.approx(5 / 11)
