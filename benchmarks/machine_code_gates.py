"""What the machine code of a kernel with HGMMA (sm_90) must not do. Each gate returns what it found, as text.

An HGMMA is asynchronous. `gsb0` on one ends a group, and `WARPGROUP.DEPBAR.LE gsb0, N` waits until at most N
groups are under way. Until then the HGMMAs read shared memory and the registers of A.
"""

from machine_code import Code, Instruction

GATES = ("narrow_products", "unordered_copies", "overwritten_operands")
NARROWEST = 32  # m64n16k16 takes as long as m64n32k16
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
MOST_GROUPS = 7  # N of a wait has three bits


def narrow_products(code: Code) -> list[str]:
    """HGMMAs that are narrower than the tensor cores need for their full rate."""
    return [str(step) for step in code.instructions if step.is_a("HGMMA") and step.width < NARROWEST]


def unordered_copies(code: Code) -> list[str]:
    """Asynchronous copies, in loops, into shared memory that another warp's HGMMA may still read.

    A copy fills the buffer that the last iteration read. So between that iteration's HGMMAs and the copy must
    stand the wait for them, and then a barrier among all warps: each warp waits for its own HGMMAs only.
    """
    loops = [loop for loop in code.innermost if any(step.is_a("HGMMA") for step in loop)]
    return [str(step) for loop in loops for step in _unordered(loop)]


def _unordered(loop: list[Instruction]) -> list[Instruction]:
    """Walks through two iterations, 0 and 1, and looks at the copies of the second."""
    under_way: list[set[int]] = []  # groups; of each the iterations that its HGMMAs belong to
    group: set[int] = set()  # the one that is not ended yet
    waited: set[int] = set()  # this warp's HGMMAs have read; other warps' perhaps not
    found = []
    for iteration in (0, 1):
        for step in loop:
            if step.is_a("HGMMA"):
                group.add(iteration)
                if "gsb0" in step.operands:
                    under_way.append(group)
                    group = set()
            elif step.is_a("WARPGROUP.DEPBAR"):
                ended = len(under_way) - _allowed(step)
                waited.update(*under_way[: max(ended, 0)])
                under_way = under_way[max(ended, 0) :]
            elif step.is_a("BAR.SYNC") and len(step.operands) == 1 and not step.predicate:
                waited.clear()  # one operand: all warps of the block take part
            elif iteration == 1 and step.is_a(*COPIES) and 0 in waited.union(group, *under_way):
                found.append(step)
    return found


def overwritten_operands(code: Code) -> list[str]:
    """Writes to registers from which an HGMMA under way still reads A: a fault of ptxas 12.8."""
    found = []
    for place, step in enumerate(code.instructions):
        if step.is_a("HGMMA") and step.product_registers:
            found += [f"{step} <- {writer}" for writer in _writers(code, place)]
    return found


def _writers(code: Code, place: int) -> list[Instruction]:
    """What writes to the HGMMA's registers on any way from it to its wait."""
    product = code.instructions[place]
    # How many groups ended behind the HGMMA's own; -1 while its own is open.
    new = [(following, 0 if "gsb0" in product.operands else -1) for following in code.successors[place]]
    seen, found = set(new), {}
    while new:
        current, ended = new.pop()
        step = code.instructions[current]
        if step.is_a("WARPGROUP.DEPBAR") and ended >= _allowed(step):
            continue
        if step.is_a("HGMMA"):
            ended = min(ended + ("gsb0" in step.operands), MOST_GROUPS)
        elif step.written & product.product_registers:
            found[current] = step
        for state in ((following, ended) for following in code.successors[current]):
            if state not in seen:
                seen.add(state)
                new.append(state)
    return list(found.values())


def _allowed(wait: Instruction) -> int:
    """N of `WARPGROUP.DEPBAR.LE gsb0, N`."""
    return int(wait.operands[1], 16)
