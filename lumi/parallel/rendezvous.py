"""Where the processes of a run meet: a store that only those of this start share.

torchrun serves one store for all its starts. Processes that it starts again, after one was killed, would read there the addresses that
the dead ones had left, and wait for them. So each process leaves a word of its own, the first one names all that it finds, until every
process has found itself among them; the name of the start is the first one's word. (torchrun's count of restarts cannot be the name:
a machine that joins later has counted fewer.)
"""

import json
import os
import secrets
import time
from collections.abc import Iterator

import torch.distributed as dist

from lumi.config import UserError

_SECONDS = 0.05  # between two looks
_MOST_SECONDS = 300.0  # that processes of one start may be apart


def fresh_store() -> dist.Store:
    """The store of torchrun that the environment describes, behind a prefix for this start. All processes call this together.

    Raises:
        UserError: some of the others do not come within five minutes; names them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    served = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )  # by torchrun; otherwise by the first process
    is_master = rank == 0 and not served
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_master, wait_for_workers=False
    )
    word = secrets.token_hex(8)
    store.set(f"lumi/word/{rank}", word)
    start = _name_start(store, word, size) if rank == 0 else _find_start(store, word, rank)
    return dist.PrefixStore(f"lumi/{start}", store)


def _name_start(store: dist.Store, word: str, size: int) -> str:
    """The first process: publish the words, which may be of an earlier start, until each other process has found its own."""
    missing = list(range(1, size))
    for _ in _looks():
        known = [rank for rank in range(size) if rank == 0 or store.check([f"lumi/word/{rank}"])]
        words = {rank: store.get(f"lumi/word/{rank}").decode() for rank in known}
        store.set("lumi/start", json.dumps([word, words]))
        missing = [rank for rank in missing if not store.check([f"lumi/{word}/found/{rank}"])]
        if not missing:
            return word
    ranks = ", ".join(map(str, missing))
    raise UserError(
        f"all {size} processes must come within {_MOST_SECONDS:.0f} s of each other, got nothing of rank {ranks}"
    )


def _find_start(store: dist.Store, word: str, rank: int) -> str:
    for _ in _looks():
        start, words = json.loads(store.get("lumi/start")) if store.check(["lumi/start"]) else ("", {})
        if words.get(str(rank)) == word:
            store.set(f"lumi/{start}/found/{rank}", "")
            return start
    raise UserError(
        f"all processes must come within {_MOST_SECONDS:.0f} s of each other, got no word of rank 0 to rank {rank}"
    )


def _looks() -> Iterator[None]:
    """Now and then, until the time is up."""
    end = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(_SECONDS)
