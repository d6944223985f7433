"""How fast a kernel could be on an H200 at best, from counts alone: to compare tiles without a GPU.

One walk through a kernel's main code is an iteration of its loop, or all of it where there is none. A walk of
one block keeps each unit of a multiprocessor busy for so many clocks; so many blocks are resident. The unit
that needs the longest sets the time, or the order of the work within a block.

What is assumed:
- An HGMMA m64nNk16 needs N/2 clocks: 4096 FLOP a clock. It reads A (2 KiB, if not in registers) and B (32 N
  bytes) from shared memory at 128 bytes a clock, and never takes less than 16 clocks. HMMA has half the rate.
- A quarter of a multiprocessor has a quarter of the block's warps. It issues one instruction a clock, and
  4 lanes of MUFU: 8 clocks for a warp. Other pipes are never full, and shared memory has no conflicts.
- A warp alone issues an instruction every second clock, because most need the one before.
- Barriers keep the warps of a block in step: first they wait for what they load, then they compute, then they
  wait for their products. Only other blocks use the units that stand still meanwhile. With n resident blocks
  a walk takes an n-th of that at least (the asymptotic bound of a closed queueing network). Without barriers
  the same holds for each warp.
- A load takes its latency, and its bytes come at 64 a clock. What a copy is ahead it is not waited for: with
  num_stages tiles, num_stages - 1 walks, less the part of a walk's time before the copy is asked for.
  What is stored is not waited for.
- A byte of a row comes from memory once, or goes there. Tiles that all programs read come from the L2 cache.
- All blocks that fit are there, all of them with work: no tail, no masked tiles, no launch. Padding is work.

So a figure is a hope and no forecast, but it ranks tiles. Sources: NVIDIA's datasheets of the H100 and H200;
the L2 cache's bandwidth and the latencies were measured on the H100 by others (chipsandcheese.com, July 2023;
arXiv 2402.13499).
"""

from collections import Counter
from dataclasses import dataclass, field

from machine_code import Instruction
from machine_code_gates import COPIES

SMS = 132
CLOCK = 1.755e9  # per second
MEMORY = 4.8e12 / SMS / CLOCK  # bytes per clock and multiprocessor: 20.7
CACHE = 5.5e12 / 114 / CLOCK  # the same of the L2 cache, measured with 114 multiprocessors: 27.5
MEMORY_LATENCY, CACHE_LATENCY = 480, 260  # clocks
PORT = 64  # bytes a clock into one multiprocessor, if the others leave memory and cache to it
QUARTERS = 4
MUFU_CLOCKS = 8  # per warp
DEPENDENT = 2  # clocks per instruction of a warp alone


@dataclass(frozen=True)
class Walk:
    """What one walk of one block takes.

    Args:
        num_warps: of the block.
        instructions, mufu, hmma: of one warp.
        shared_products: N of the HGMMAs with A in shared memory -> how many.
        register_products: the same of those with A in registers.
        loaded_bytes, stored_bytes: between memory and the whole block.
        cache_bytes: from the L2 cache to the whole block.
        ahead: how many walks lie between asking for a copy and needing it.
        in_step: are there barriers?
        blocks: how many are resident on a multiprocessor.
    """

    num_warps: int
    instructions: int
    mufu: int = 0
    hmma: int = 0
    shared_products: Counter[int] = field(default_factory=Counter)
    register_products: Counter[int] = field(default_factory=Counter)
    loaded_bytes: float = 0.0
    stored_bytes: float = 0.0
    cache_bytes: float = 0.0
    ahead: float = 0.0
    in_step: bool = True
    blocks: int = 1


@dataclass(frozen=True)
class Estimate:
    """Clocks of one multiprocessor per walk of one block.

    Args:
        products, mufu, issue, memory: how long each unit is busy; memory may be the L2 cache.
        alone: the walk of one block, or warp, from its first instruction to its last, over the number of
            resident blocks.
        of_products: the share of the tensor cores' peak that is reached at best.
        of_memory: the same of the memory's bandwidth.
    """

    products: float
    mufu: float
    issue: float
    memory: float
    alone: float
    of_products: float
    of_memory: float

    @property
    def binds(self) -> str:
        """What sets the time."""
        return max(("products", "mufu", "issue", "memory", "alone"), key=lambda unit: getattr(self, unit))


def estimate(walk: Walk) -> Estimate:
    """The clocks of each unit, and what that allows at best."""
    per_quarter = walk.num_warps / QUARTERS
    hgmma = sum(number * hgmma_clocks(N) for N, number in walk.shared_products.items())
    hgmma += sum(number * hgmma_clocks(N, a_bytes=0) for N, number in walk.register_products.items())
    products = per_quarter * (hgmma + 8 * walk.hmma)
    mufu, issue = per_quarter * MUFU_CLOCKS * walk.mufu, per_quarter * walk.instructions
    rows = (walk.loaded_bytes + walk.stored_bytes) / MEMORY
    memory = max(rows, walk.cache_bytes / CACHE)

    together = walk.num_warps if walk.in_step else 1
    part, in_quarter = together / walk.num_warps, together / QUARTERS
    dependent = walk.instructions * max(DEPENDENT, in_quarter)
    compute = products * part + max(dependent, walk.mufu * MUFU_CLOCKS * max(1, in_quarter))
    loading = (walk.loaded_bytes + walk.cache_bytes) * part / PORT
    loading += MEMORY_LATENCY if walk.loaded_bytes else CACHE_LATENCY if walk.cache_bytes else 0
    alone = (compute + max(loading - walk.ahead * compute, 0)) / walk.blocks

    clocks = max(products, mufu, issue, memory, alone)
    least = sum(number * N / 2 for N, number in (walk.shared_products + walk.register_products).items())
    least = per_quarter * (least + 4 * walk.hmma)
    return Estimate(products, mufu, issue, memory, alone, least / clocks, rows / clocks)


def hgmma_clocks(N: int, a_bytes: int = 2048) -> float:
    """Of one m64nNk16 on an otherwise idle multiprocessor; `a_bytes` of A are in shared memory."""
    return max(N / 2, (a_bytes + 32 * N) / 128, 16)


def time_before_copies(main: list[Instruction], num_warps: int) -> float:
    """Which part of a walk's time goes by before the first copy, of one that has copies."""
    spent = []
    for step in main:
        clocks = hgmma_clocks(step.width, 0 if step.product_registers else 2048) if step.is_a("HGMMA") else 1
        spent.append(max(clocks * num_warps / QUARTERS, DEPENDENT))
    first = next(place for place, step in enumerate(main) if step.is_a(*COPIES))
    return sum(spent[:first]) / sum(spent)


def backward_of_products(of_dkdv: float, of_dq: float) -> float:
    """The share of the peak that attention's backward reaches at best, as backwards are counted: 5 products.

    dK/dV compute 4 and dQ computes 3, because both need the scores and their gradients.
    """
    return 5 / (4 / of_dkdv + 3 / of_dq)
