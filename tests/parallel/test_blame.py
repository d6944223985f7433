"""Who is to blame for a hang, by hand-made tables."""

from dataclasses import replace

import pytest

from lumi.parallel.blame import Beat, Blame, describe, find_blame


def beat(rank, step=7, mark=0, still=100.0, where="train.py:10 train", **more):
    phase = ("waiting for data", "counting targets", "optimizer")[mark]
    more = {"patient": False, "phase": phase, **more}
    return Beat(
        rank=rank,
        host=f"node{rank // 2}",
        pid=100 + rank,
        count=5,
        step=step,
        mark=mark,
        still_seconds=still,
        where=where,
        **more,
    )


def saving(rank, idle=100.0, **more):
    return beat(rank, patient=True, idle_seconds=idle, **more)


LIMIT = 60.0
TABLES = {
    "one is behind in the step": ([beat(0, mark=1), beat(1), beat(2, mark=1)], set(), Blame("behind", [1])),
    "an earlier step is behind a later mark": (
        [beat(0), beat(1, step=6, mark=2), beat(2)],
        set(),
        Blame("behind", [1]),
    ),
    "two are behind, one of them less": (
        [beat(0, mark=2), beat(1), beat(2, mark=1)],
        set(),
        Blame("behind", [1]),
    ),
    "two equally": ([beat(0, step=6), beat(1), beat(2, step=6)], set(), Blame("behind", [0, 2])),
    "the one behind saves": ([beat(0, patient=True, still=0), beat(1, mark=1)], set(), None),
    "the one behind is at work": ([beat(0, still=59.0), beat(1, mark=1)], set(), None),
    "one of two behind is at work": ([beat(0, still=59.0), beat(1), beat(2, mark=1)], set(), None),
    "the one ahead saves": ([beat(0, mark=1, patient=True, still=0), beat(1)], set(), Blame("behind", [1])),
    "a save that moves": ([saving(0, idle=59.0), saving(1, idle=200.0)], set(), None),
    "a save that moves in a process that goes on": (
        [beat(0, mark=1, idle_seconds=0.0), saving(1)],
        set(),
        None,
    ),
    "a save that began just now": ([saving(0, still=59.0), saving(1)], set(), None),
    "a save of which nobody knows": ([beat(0, patient=True), beat(1, patient=True)], set(), None),
    "a save that hangs": (
        [saving(0, parts=3), saving(1, parts=4), saving(2, parts=4)],
        set(),
        Blame("unsaved", [0]),
    ),
    "a save that hangs, alone in patience": (
        [beat(0, mark=1, idle_seconds=100.0), saving(1)],
        set(),
        Blame("behind", [1]),
    ),
    "a save that hangs on all": ([saving(0), saving(1)], set(), Blame("together", [0, 1])),
    "no sign of life": ([beat(0), beat(1), beat(2)], {1}, Blame("mute", [1])),
    "no sign of life, and another is behind": ([beat(0, step=5), beat(1), beat(2)], {2}, Blame("mute", [2])),
    "no sign of life in a save": ([beat(0, patient=True), beat(1)], {0}, Blame("mute", [0])),
    "left with an error": ([beat(0), beat(1, left="failed"), beat(2)], {1}, Blame("failed", [1])),
    "the others have finished": (
        [beat(0, left="finished"), beat(1), beat(2, left="finished")],
        {0, 2},
        Blame("behind", [1]),
    ),
    "all have finished": ([beat(0, left="finished"), beat(1, left="finished")], {0, 1}, None),
    "one of three on another line": (
        [beat(0), beat(1), beat(2, where="rows.py:3 row")],
        set(),
        Blame("apart", [2]),
    ),
    "two of two on other lines": (
        [beat(0), beat(1, where="rows.py:3 row")],
        set(),
        Blame("together", [0, 1]),
    ),
    "all on one line": ([beat(0), beat(1), beat(2)], set(), Blame("together", [0, 1, 2])),
    "all at one mark, one just arrived": ([beat(0), beat(1, still=1.0), beat(2)], set(), None),
}


@pytest.mark.parametrize("name", TABLES)
def test_who_is_to_blame(name):
    beats, mute, blame = TABLES[name]
    assert find_blame(beats, mute, LIMIT) == blame


LONGER = "; if it only needs longer, raise step_timeout_seconds"
READING = "at step 7, waiting for data, in train.py:10 train"


def test_what_is_said():
    beats = [beat(0), beat(1, step=6, mark=2, where="rows.py:3 row"), beat(2)]
    stands = "it stands at step 6, optimizer, in rows.py:3 row"
    assert describe(Blame("behind", [1]), beats) == (
        f"step 7: rank 1 (host node0, pid 101) has not gone on for 100 s: {stands}; "
        f"the others wait for it, rank 0 {READING}{LONGER}"
    )
    assert describe(Blame("mute", [1]), beats) == (
        "step 7: rank 1 (host node0, pid 101) gives no sign of life: "
        f"the process is stopped, dead or cut off; last seen: {stands}"
    )
    assert describe(Blame("failed", [2]), beats) == (
        "step 7: rank 2 (host node1, pid 102) left with an error but did not end; "
        f"the last mark: it stands {READING}"
    )
    assert describe(Blame("together", [0, 1]), [beat(0), beat(1)]) == (
        f"step 7: no process has gone on for 100 s: they stand {READING}{LONGER}"
    )
    assert describe(Blame("unsaved", [1]), [saving(0, parts=2), saving(1, parts=1, idle=61.0)]) == (
        "step 7: rank 1 (host node0, pid 101) has written nothing for 61 s, and all wait for it: "
        f"it stands {READING}{LONGER}"
    )
    done = [replace(beat(0), left="finished"), beat(1)]
    assert "; the others have finished; " in describe(Blame("behind", [1]), done)


def test_many_are_named_in_short():
    beats = [beat(rank, where="rows.py:3 row" if rank == 5 else "train.py:10 train") for rank in range(8)]
    text = describe(Blame("mute", [0, 1, 2, 4, 5]), beats)
    mute = "ranks 0-2, 4-5 (hosts node0, node1, node2) give no sign of life: the processes are stopped"
    places = f"ranks 0-2, 4 stand {READING}; rank 5 stands at step 7, waiting for data, in rows"
    assert mute in text
    assert places in text
