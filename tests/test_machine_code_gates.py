"""What is read from machine code, on snippets written by hand: each gate on some that pass and some that do
not. No compiler is needed."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("machine_code")


@pytest.fixture
def gates(reading):
    return importlib.import_module("machine_code_gates")


@pytest.fixture
def code(reading):
    """Lines of SASS, at addresses 0x00, 0x10 ...; "name:" marks the next one, and a branch may name it."""
    return lambda text: reading.parse(listing(text))


def listing(text):
    lines, marks = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            marks[line[:-1]] = f"0x{16 * len(lines):x}"
        else:
            lines.append(line)
    for place, line in enumerate(lines):
        *words, last = line.split(" ")
        text = " ".join([*words, marks.get(last, last)])
        lines[place] = f"        /*{16 * place:04x}*/  {text:<50} ;  /* 0x000fe200078e00ff */"
    return "\tFunction : kernel\n" + "\n".join(lines)


# --- what is read ---


def test_an_instruction_is_its_predicate_opcode_and_operands(code):
    first, second = code(
        """
        @!P0 IMAD.WIDE R4, R2.reuse, 0x4, R6
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0
        """
    ).instructions
    assert (first.address, first.predicate, first.opcode) == (0, "@!P0", "IMAD.WIDE")
    assert first.operands == ("R4", "R2", "0x4", "R6")
    assert str(first) == "0x0000 @!P0 IMAD.WIDE R4, R2, 0x4, R6"
    assert first.is_a("IMAD")
    assert not first.is_a("IMA")
    assert (second.address, second.width) == (16, 128)


def test_output_without_instructions_is_refused(reading):
    with pytest.raises(ValueError, match="must hold instructions"):
        reading.parse("cuobjdump fatal   : File 'x' does not exist\n")


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("IMAD.MOV.U32 R7, RZ, RZ, R3", {7}),
        ("IMAD.WIDE R4, R2, 0x4, R6", {4, 5}),
        ("CS2R R8, SRZ", {8, 9}),
        ("LDG.E.128 R12, desc[UR4][R2.64]", {12, 13, 14, 15}),
        ("LDG.E.64 R12, desc[UR4][R2.64]", {12, 13}),
        ("LDSM.16.M88.4 R20, [R62]", {20, 21, 22, 23}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {4, 5, 6, 7}),
        ("DADD R2, R4, R6", {2, 3}),
        ("SHFL.BFLY PT, R3, R4, 0x2, 0x1f", {3}),
        ("LOP3.LUT P0, RZ, R5, 0x1, RZ, 0xc0, !PT", set()),
        ("IADD3.X R9, P0, R9, R8, RZ, P1, !PT", {9}),
        ("ISETP.GE.AND P0, PT, R5, R6, PT", set()),
        ("STS.128 [R4+UR4], R8", set()),
        ("STG.E.128 desc[UR4][R2.64], R4", set()),
        ("R2UR UR4, R5", set()),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR17+0xc000], R191", set()),
        ("MUFU.EX2 R5, R6", {5}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", set()),
    ],
)
def test_registers_that_are_written(code, line, written):
    assert code(line).instructions[0].written == written


def test_an_hgmma_reads_a_from_registers_or_from_shared_memory(code):
    first, second = code(
        """
        HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR8].tnspB, R56
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
        """
    ).instructions
    assert first.product_registers == {120, 121, 122, 123}
    assert second.product_registers == set()
    assert first.written == set(range(56, 88))


def test_bytes_of_loads_and_stores(reading, code):
    found = code(
        """
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 LDG.E.U16 R8, desc[UR4][R2.64]
        LDGSTS.E [R11+0x10000], desc[UR48][R26.64], P5
        LDGSTS.E.BYPASS.128 [R11], desc[UR48][R26.64], P5
        STG.E.64 desc[UR4][R2.64], R4
        """
    )
    assert reading.thread_bytes(found.instructions, "LDG") == 18
    assert reading.thread_bytes(found.instructions, "LDGSTS") == 20
    assert reading.thread_bytes(found.instructions, "STG") == 8


# --- loops ---

# As ptxas lays a kernel out: a masked and a plain loop inside an outer one, and behind the end the code that
# asks again for a copy that has not arrived, and jumps back into the middle of a loop.
NESTED = """
    MOV R1, c[0x0][0x28]
    outer:
    IADD3 R2, R2, 0x1, RZ
    masked:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR17], R9
    @!P4 BRA asks
    goes_on:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0
    FSEL R24, R24, -INF, P1
    FSEL R25, R25, -INF, P1
    @P0 BRA masked
    plain:
    HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0
    MUFU.EX2 R30, R24
    @P1 BRA plain
    STG.E desc[UR4][R2.64], R24
    @P2 BRA outer
    EXIT
    asks:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR17], R9
    @!P4 BRA asks
    BRA goes_on
    end:
    BRA end
"""


def test_loops_end_at_branches_back_that_close_them(code):
    found = code(NESTED)
    assert sorted(map(len, found.loops)) == [3, 6, 12]
    assert sorted(map(len, found.innermost)) == [3, 6]


def test_the_main_loop_is_the_one_without_masks(reading, code):
    found = code(NESTED)
    assert [step.opcode.split(".")[0] for step in found.main] == ["HGMMA", "MUFU", "BRA"]
    assert reading.widths(found.main) == {32: 1}


def test_without_products_all_loops_that_load_are_the_main_one(code):
    found = code(
        """
        zeros:
        STG.E desc[UR4][R2.64], RZ
        @P0 BRA zeros
        maximum:
        LDG.E R4, desc[UR4][R2.64]
        FMNMX R5, R5, R4, !PT
        @P0 BRA maximum
        gradient:
        LDG.E R4, desc[UR4][R2.64]
        MUFU.EX2 R4, R4
        STG.E desc[UR4][R2.64], R4
        @P0 BRA gradient
        EXIT
        """
    )
    assert [len(loop) for loop in found.innermost] == [2, 3, 4]
    assert [step.address for step in found.main] == list(range(0x20, 0x90, 0x10))


def test_without_loops_all_of_it_is_the_main_part(code):
    found = code("LDG.E R4, desc[UR4][R2.64]\nEXIT\nend:\nBRA end\nNOP")
    assert found.loops == []
    assert [step.opcode for step in found.main] == ["LDG.E", "EXIT"]


# --- gate: the width of products ---


def test_narrow_products(gates, code):
    wide = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
    narrow = "HGMMA.64x16x16.F32.BF16 R96, gdesc[UR8], RZ, !UPT"
    assert gates.narrow_products(code(wide)) == []
    found = gates.narrow_products(code(f"{wide}\n{narrow}\n{narrow}"))
    assert found == [f"0x0010 {narrow}", f"0x0020 {narrow}"]


# --- gate: wait, barrier, copy ---

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_FOR_ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
COPY = "@UP3 UTMALDG.3D [UR16], [UR34]"
SMALL_COPY = "@P1 LDGSTS.E [R11+0x10000], desc[UR48][R26.64], P5"


def loop(*lines):
    return "\n".join(["MOV R1, c[0x0][0x28]", "loop:", *lines, "@P0 BRA loop", "EXIT"])


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, WAIT, BARRIER, COPY),
        (PRODUCT, WAIT, BARRIER, SMALL_COPY),
        # The barrier of the next iteration stands between the wait and the copy too.
        (PRODUCT, BARRIER, WAIT, COPY),
        # The wait may stand at the end of the iteration before.
        (BARRIER, COPY, PRODUCT, WAIT),
        # The last product is waited for behind the first of the next iteration.
        (PRODUCT, WAIT, BARRIER, PRODUCT, COPY),
        # One group may be under way: it is this iteration's.
        (PRODUCT, WAIT_FOR_ALL_BUT_ONE, BARRIER, COPY),
        (COPY,),  # no product reads
        (PRODUCT, WAIT),  # no copy overwrites
    ],
)
def test_copies_in_order(gates, code, lines):
    assert gates.unordered_copies(code(loop(*lines))) == []


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, WAIT, COPY),  # no barrier: another warp's product may still read
        (BARRIER, WAIT, COPY, PRODUCT),  # the barrier comes too early
        (PRODUCT, BARRIER, COPY),  # no wait
        (COPY, PRODUCT, WAIT, BARRIER, PRODUCT),  # the second product is waited for behind the copy
        # The last iteration's second group is still allowed to read.
        (PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x2", BARRIER, COPY, PRODUCT),
        (PRODUCT, WAIT, "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", COPY),  # a barrier of four warps
        (PRODUCT, WAIT, f"@P3 {BARRIER}", COPY),
        (PRODUCT, WAIT, SMALL_COPY),
        # This group never ends, so no wait covers it.
        (PRODUCT.removesuffix(", gsb0"), WAIT, BARRIER, COPY),
    ],
)
def test_copies_out_of_order(gates, code, lines):
    copy = next(line for line in lines if line in (COPY, SMALL_COPY))
    found = gates.unordered_copies(code(loop(*lines)))
    assert [line.partition(" ")[2] for line in found] == [copy]


def test_both_loops_are_looked_at(gates, code):
    first = loop(PRODUCT, WAIT, COPY).replace("EXIT", "NOP")
    second = loop(PRODUCT, BARRIER, SMALL_COPY).replace("loop", "other")
    assert len(gates.unordered_copies(code(f"{first}\n{second}"))) == 2


# --- gate: registers of A ---

FROM_REGISTERS = "HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR8].tnspB, R56, gsb0"
OPEN = FROM_REGISTERS.removesuffix(", gsb0")
WRITE = "F2FP.BF16.F32.PACK_AB R122, R3, R2"


@pytest.mark.parametrize(
    "text",
    [
        f"{FROM_REGISTERS}\n{WAIT}\n{WRITE}\nEXIT",
        f"{WRITE}\n{FROM_REGISTERS}\nEXIT",
        f"{FROM_REGISTERS}\nF2FP.BF16.F32.PACK_AB R124, R3, R2\n{WAIT}\nEXIT",  # the register behind the four
        f"{FROM_REGISTERS}\nSTS [R122], R122\n{WAIT}\nEXIT",  # reads
        f"HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56, gsb0\n{WRITE}\n{WAIT}\nEXIT",  # A in shared memory
        # Another group ended behind it, so the wait that lets one go on covers it.
        f"{FROM_REGISTERS}\n{PRODUCT}\n{WAIT_FOR_ALL_BUT_ONE}\n{WRITE}\nEXIT",
        loop(FROM_REGISTERS, WAIT, WRITE),
        loop(FROM_REGISTERS),  # never waited for, never written: the walk ends
    ],
)
def test_operands_that_are_left_alone(gates, code, text):
    assert gates.overwritten_operands(code(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        f"{FROM_REGISTERS}\n{WRITE}\n{WAIT}\nEXIT",
        f"{FROM_REGISTERS}\nLDSM.16.M88.4 R120, [R62]\n{WAIT}\nEXIT",
        f"{FROM_REGISTERS}\nIMAD.WIDE R118, R2, 0x4, R6\nIMAD.WIDE R119, R2, 0x4, R6\n{WAIT}\nEXIT",
        f"{FROM_REGISTERS}\nSHFL.BFLY PT, R123, R4, 0x2, 0x1f\n{WAIT}\nEXIT",
        # The group may be the one that goes on.
        f"{FROM_REGISTERS}\n{WAIT_FOR_ALL_BUT_ONE}\n{WRITE}\n{WAIT}\nEXIT",
        # The group ends behind the write only.
        f"{OPEN}\n{WAIT}\n{WRITE}\n{PRODUCT}\n{WAIT}\nEXIT",
        loop(WRITE, FROM_REGISTERS),  # over the branch back
        f"{FROM_REGISTERS}\n@P0 BRA far\n{WAIT}\nEXIT\nfar:\n{WRITE}\n{WAIT}\nEXIT",  # on one way only
    ],
)
def test_operands_that_are_overwritten(gates, code, text):
    found = gates.overwritten_operands(code(text))
    assert len(found) == 1
    assert "HGMMA.64x64x16.F32.BF16 R56, R120" in found[0]
    assert " <- 0x" in found[0]
