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

import torch.distributed as dist

_SECONDS = 0.05  # between two looks


def fresh_store() -> dist.Store:
    """The store of torchrun that the environment describes, behind a prefix for this start. All processes call this together.

    Raises:
        torch.distributed.DistError: the others do not come within the store's time limit.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun; otherwise by the first process
    is_master = rank == 0 and not served
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_master, wait_for_workers=False)
    word = secrets.token_hex(8)
    store.set(f"lumi/word/{rank}", word)
    start = _name_start(store, word, size) if rank == 0 else _find_start(store, word, rank)
    return dist.PrefixStore(f"lumi/{start}", store)


def _name_start(store: dist.Store, word: str, size: int) -> str:
    """The first process: publish the words, which may be of an earlier start, until each other process has found its own."""
    others = range(1, size)
    while True:
        words = [found.decode() for found in store.multi_get([f"lumi/word/{rank}" for rank in range(size)])]
        store.set("lumi/start", json.dumps([word, words]))
        if all(store.check([f"lumi/{word}/found/{rank}"]) for rank in others):
            return word
        time.sleep(_SECONDS)


def _find_start(store: dist.Store, word: str, rank: int) -> str:
    while True:
        start, words = json.loads(store.get("lumi/start"))
        if rank < len(words) and words[rank] == word:
            store.set(f"lumi/{start}/found/{rank}", "")
            return start
        time.sleep(_SECONDS)
