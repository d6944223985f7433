"""Reads what NVIDIA's disassembler prints (SASS): instructions, loops, and the part in which a kernel spends
its time. Nothing here compiles; `inspect_kernels.py` does.

SASS has no public grammar. Only what the questions here need is read: opcodes, branches, and which registers
an instruction writes. In doubt it writes: a gate may be wrong aloud, but not in silence.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);", re.MULTILINE
)
_PREDICATE = re.compile(r"!?U?P(\d|T)")
# What lists predicates first and then registers that it reads.
_WRITES_NO_REGISTER = re.compile(
    r"(\w*SETP|PLOP3|FCHK|R2P|SYNCS|WARPSYNC|NANOSLEEP|RET|BRX|CALL|BAR|ST|RED|B2R|R2UR)"
)
PRODUCT = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)")
_LOAD = re.compile(r"(LDG|LDGSTS|UTMALDG)(\.|$)")


@dataclass(frozen=True)
class Instruction:
    """One line: `@P0 HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR8], R56, gsb0`."""

    address: int
    predicate: str  # "@P0", or "" if it is always executed
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        words = " ".join(filter(None, (self.predicate, self.opcode, ", ".join(self.operands))))
        return f"{self.address:#06x} {words}"

    def is_a(self, *names: str) -> bool:
        """Is the opcode one of these, with whatever modifiers?"""
        return any(self.opcode == name or self.opcode.startswith(name + ".") for name in names)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        return int(self.operands[-1], 16) if self.is_a("BRA") else None

    @property
    def falls_through(self) -> bool:
        """Can the next instruction be the one that follows?"""
        conditional = bool(self.predicate) or len(self.operands) > 1  # BRA.U UP0, 0x80
        return not self.is_a("BRA", "EXIT", "RET") or (conditional and not self.is_a("RET"))

    @property
    def width(self) -> int:
        """N of an HGMMA, whose shape is 64 x N x K."""
        return int(self.opcode.split(".")[1].split("x")[1])

    @property
    def product_registers(self) -> frozenset[int]:
        """The registers that an HGMMA reads A from: four, if A is not in shared memory."""
        first = re.match(r"R(\d+)", self.operands[1])
        return frozenset(range(int(first[1]), int(first[1]) + 4)) if first else frozenset()

    @property
    def written(self) -> frozenset[int]:
        """The general registers that are written."""
        if _WRITES_NO_REGISTER.match(self.opcode):
            return frozenset()
        first = next((operand for operand in self.operands if not _PREDICATE.fullmatch(operand)), "")
        register = re.match(r"R(\d+)(\.|$)", first)
        return (
            frozenset(range(int(register[1]), int(register[1]) + self._results)) if register else frozenset()
        )

    @property
    def _results(self) -> int:
        """How many registers a result takes."""
        if self.is_a("HGMMA"):
            return self.width // 2
        if self.is_a("HMMA", "IMMA") or ".128" in self.opcode:
            return 4
        if self.is_a("LDSM"):
            return int(self.opcode[-1]) if self.opcode[-1].isdigit() else 1
        wide = ".64" in self.opcode or ".WIDE" in self.opcode or self.opcode == "CS2R"
        return 2 if wide or self.opcode.startswith("D") or ".F64" in self.opcode else 1


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def _index(self) -> dict[int, int]:
        return {instruction.address: place for place, instruction in enumerate(self.instructions)}

    @cached_property
    def successors(self) -> list[tuple[int, ...]]:
        """For each instruction the places in `instructions` that can follow it."""
        result = []
        for place, instruction in enumerate(self.instructions):
            following = (
                [place + 1] if instruction.falls_through and place + 1 < len(self.instructions) else []
            )
            if instruction.target is not None:
                following.append(self._index[instruction.target])
            result.append(tuple(following))
        return result

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """Loops that do work, outer ones too, from the first instruction to the branch back.

        The end of a branch back closes a loop if it cannot be reached but through the target. So a jump back
        from code that the compiler put out of the way, behind the end, is none. Nor is waiting in place.
        """
        predecessors: list[list[int]] = [[] for _ in self.instructions]
        for place, following in enumerate(self.successors):
            for successor in following:
                predecessors[successor].append(place)
        found = {}
        for last, following in enumerate(self.successors):
            for first in (place for place in following if place <= last):
                body, new = {first}, [last]
                while new:
                    place = new.pop()
                    if place not in body:
                        body.add(place)
                        new += predecessors[place]
                inside = [self.instructions[place] for place in sorted(body) if first <= place <= last]
                if (first == 0 or 0 not in body) and not _waits(inside):
                    found[first] = max(found.get(first, []), inside, key=len)
        return list(found.values())

    @cached_property
    def innermost(self) -> list[list[Instruction]]:
        """The loops that hold no other one."""
        holds = lambda outer, inner: (
            outer is not inner and outer[0].address <= inner[0].address <= outer[-1].address
        )
        return [loop for loop in self.loops if not any(holds(loop, other) for other in self.loops)]

    @cached_property
    def main(self) -> list[Instruction]:
        """Where a kernel spends its time.

        Of the innermost loops with products the shortest: the others are the same with masks. Without
        products all innermost loops that load, one after the other: each walks over the same row. Without
        loops everything; both sides of a branch then count.
        """
        products = [loop for loop in self.innermost if any(PRODUCT.match(step.opcode) for step in loop)]
        if products:
            return min(products, key=len)
        loads = [loop for loop in self.innermost if any(_LOAD.match(step.opcode) for step in loop)]
        if loads:
            return [step for loop in loads for step in loop]
        idle = lambda step: step.is_a("NOP") or step.target == step.address
        return [step for step in self.instructions if not idle(step)]


def parse(sass: str) -> Code:
    """The instructions of `cuobjdump -sass`. Raises ValueError if there is none."""
    found = tuple(
        Instruction(int(address, 16), predicate.strip(), opcode, _split(operands))
        for address, predicate, opcode, operands in _LINE.findall(sass)
    )
    if not found:
        raise ValueError(f"the disassembler's output must hold instructions, got {sass[:80]!r}")
    return Code(found)


def _waits(loop: list[Instruction]) -> bool:
    """Does a loop only ask again whether a copy is there, or stay where it is, as behind a kernel's end?"""
    works = any(PRODUCT.match(step.opcode) or _LOAD.match(step.opcode) for step in loop)
    return len(loop) == 1 or (count(loop, "SYNCS") > 0 and not works)


def _split(operands: str) -> tuple[str, ...]:
    return tuple(operand.strip().removesuffix(".reuse") for operand in operands.split(",") if operand.strip())


def count(code: list[Instruction] | tuple[Instruction, ...], *names: str) -> int:
    """How many instructions have one of these opcodes."""
    return sum(step.is_a(*names) for step in code)


def widths(code: list[Instruction]) -> Counter[int]:
    """N of the HGMMAs -> how many there are."""
    return Counter(step.width for step in code if step.is_a("HGMMA"))


def thread_bytes(code: list[Instruction], *names: str) -> int:
    """What these loads or stores move per thread."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    moving = (step.opcode.split(".") for step in code if step.is_a(*names))
    return sum(next((sizes[word] for word in words if word in sizes), 4) for words in moving)


def is_float64(step: Instruction) -> bool:
    """Does it compute in float64?"""
    arithmetic = re.match(r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)", step.opcode)
    return bool(arithmetic) or ".F64" in step.opcode or step.opcode.startswith("MUFU.RCP64")
