"""Where the processes of a run meet: a store that only the processes of this start share.

torchrun serves one store for all its starts. After one process was killed it starts all of them again, and
they would read in the store the addresses of the dead ones, and wait for them. So each process leaves a
random word of its own. The first process publishes all words that it finds, until every process has found its
own among them. The word of the first process names the start. (The restart count of torchrun cannot name it:
a machine that joins later has counted fewer restarts.)
"""

import json
import os
import secrets
import time
from collections.abc import Iterator

import torch.distributed as dist

from lumi.config import UserError

_POLL_SECONDS = 0.05
_MOST_SECONDS = 300.0  # that the processes of one start may be apart


def fresh_store() -> dist.Store:
    """The store of the environment, behind a prefix for this start. All processes call it together.

    Raises:
        UserError: some processes do not come within five minutes; names them.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not served_by_torchrun
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=is_master, wait_for_workers=False)
    word = secrets.token_hex(8)
    store.set(f"lumi/word/{rank}", word)
    start = _name_start(store, word, size) if rank == 0 else _find_start(store, word, rank)
    return dist.PrefixStore(f"lumi/{start}", store)


def _name_start(store: dist.Store, word: str, size: int) -> str:
    """The first process publishes all words, also those of an earlier start, until each found its own."""
    missing = list(range(1, size))
    for _ in _looks():
        known = [rank for rank in range(size) if rank == 0 or store.check([f"lumi/word/{rank}"])]
        words = {rank: store.get(f"lumi/word/{rank}").decode() for rank in known}
        store.set("lumi/start", json.dumps([word, words]))
        missing = [rank for rank in missing if not store.check([f"lumi/{word}/found/{rank}"])]
        if not missing:
            return word
    ranks = ", ".join(map(str, missing))
    expectation = f"must come within {_MOST_SECONDS:.0f} s of each other"
    raise UserError(f"all {size} processes", expectation, got=f"nothing of rank {ranks}")


def _find_start(store: dist.Store, word: str, rank: int) -> str:
    for _ in _looks():
        start, words = json.loads(store.get("lumi/start")) if store.check(["lumi/start"]) else ("", {})
        if words.get(str(rank)) == word:
            store.set(f"lumi/{start}/found/{rank}", "")
            return start
    expectation = f"must come within {_MOST_SECONDS:.0f} s of each other"
    raise UserError("all processes", expectation, got=f"no word of rank 0 to rank {rank}")


def _looks() -> Iterator[None]:
    """Now and then, until the time is up."""
    end = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(_POLL_SECONDS)
