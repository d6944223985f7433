"""Which process a hanging run waits for, judged by the last beats of all processes; a sentence on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a process tells of itself.

    `count` grows while the process lives; `still_seconds` is how long its loop has made no mark. `parts` and
    `idle_seconds` describe the work behind its loop in a patient phase: how much of the common work the
    process has done, and for how long it has done nothing; 0 where that is unknown.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int
    mark: int
    phase: str
    patient: bool
    still_seconds: float
    where: str  # the line of code
    left: Literal["", "finished", "failed"] = ""  # how the loop ended: normally, or with an exception
    parts: int = 0
    idle_seconds: float = 0.0


class Blame(NamedTuple):
    """Who holds the run up.

    `failed`: the process left with an error, but still exists. `mute`: it gives no sign of life. `behind`:
    the others have reached a later mark. `unsaved`: all are patient, and the others have done more of the
    common work behind their loops.
    `apart`: all stand at one mark, these few on another line of code than most. `together`: no process
    differs from the rest.
    """

    kind: Literal["failed", "mute", "behind", "unsaved", "apart", "together"]
    ranks: list[int]


def find_blame(beats: Sequence[Beat], mute: set[int], limit_seconds: float) -> Blame | None:
    """Who holds the run up, as seen by a process that has waited for `limit_seconds`.

    Args:
        beats: of all processes, in the order of ranks.
        mute: the ranks whose beats have stopped.

    Returns:
        None while the processes that the rest waits for are at work: their mark is younger than the limit; or
        they are patient, and some process does something behind its loop or may do so.
    """
    if failed := [beat.rank for beat in beats if beat.left == "failed"]:
        return Blame("failed", failed)
    inside = [beat for beat in beats if not beat.left]
    if silent := [beat.rank for beat in inside if beat.rank in mute]:
        return Blame("mute", silent)
    if not inside:
        return None
    least = min((beat.step, beat.mark) for beat in inside)
    last = [beat for beat in inside if (beat.step, beat.mark) == least]
    if any(beat.still_seconds < limit_seconds for beat in last):
        return None
    if any(beat.patient for beat in last) and min(beat.idle_seconds for beat in inside) < limit_seconds:
        return None
    if len(last) < len(beats):
        return Blame("behind", [beat.rank for beat in last])
    fewest = min(beat.parts for beat in last)
    unsaved = [beat.rank for beat in last if beat.parts == fewest]
    if all(beat.patient for beat in last) and len(unsaved) < len(last):
        return Blame("unsaved", unsaved)
    line, count = Counter(beat.where for beat in last).most_common(1)[0]
    if len(last) / 2 < count < len(last):
        return Blame("apart", [beat.rank for beat in last if beat.where != line])
    return Blame("together", [beat.rank for beat in last])


def describe(blame: Blame, beats: Sequence[Beat]) -> str:
    """One sentence for the user: the blamed ranks, where each stands, and what the others do."""
    blamed = [beats[rank] for rank in blame.ranks]
    others = [beat for beat in beats if beat.rank not in blame.ranks]
    one = len(blamed) == 1
    still = max(beat.still_seconds for beat in blamed)
    stand = _stand(blamed)
    step, who, have = f"step {max(beat.step for beat in beats)}", _names(blamed), "has" if one else "have"
    if blame.kind == "failed":
        return f"{step}: {who} left with an error but did not end; the last mark: {stand}"
    if blame.kind == "mute":
        gives = "gives no sign of life: the process is" if one else "give no sign of life: the processes are"
        return f"{step}: {who} {gives} stopped, dead or cut off; last seen: {stand}"
    if blame.kind == "together":
        text = f"no process has gone on for {still:.0f} s: {stand}"
    elif blame.kind == "unsaved":
        idle = min(beat.idle_seconds for beat in blamed)
        text = f"{who} {have} written nothing for {idle:.0f} s, and all wait for it: {stand}"
    else:
        text = f"{who} {have} not gone on for {still:.0f} s: {stand}; {_waiting(others)}"
    return f"{step}: {text}; if it only needs longer, raise step_timeout_seconds"


def _names(beats: Sequence[Beat]) -> str:
    """Ranks with host and process id, if they are few; otherwise ranks and hosts."""
    if len(beats) <= 4:
        return ", ".join(f"rank {beat.rank} (host {beat.host}, pid {beat.pid})" for beat in beats)
    return f"{_ranks(beats)} (hosts {', '.join(sorted({beat.host for beat in beats}))})"


def _ranks(beats: Sequence[Beat]) -> str:
    """Such as "rank 3" or "ranks 0-2, 7"."""
    runs: list[list[int]] = []
    for beat in beats:
        if runs and beat.rank == runs[-1][-1] + 1:
            runs[-1].append(beat.rank)
        else:
            runs.append([beat.rank])
    shown = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'rank' if len(beats) == 1 else 'ranks'} {shown}"


def _stand(beats: Sequence[Beat]) -> str:
    """Where each process stands; those at one place are named together."""
    places: dict[str, list[Beat]] = {}
    for beat in beats:
        places.setdefault(f"at step {beat.step}, {beat.phase}, in {beat.where}", []).append(beat)
    if len(places) == 1:
        return f"{'it stands' if len(beats) == 1 else 'they stand'} {next(iter(places))}"
    return "; ".join(
        f"{_ranks(there)} {'stands' if len(there) == 1 else 'stand'} {place}"
        for place, there in places.items()
    )


def _waiting(others: Sequence[Beat]) -> str:
    waiting = [beat for beat in others if not beat.left]
    if not waiting:
        return "the others have finished"
    first = max(waiting, key=lambda beat: (beat.step, beat.mark))
    return f"the others wait for it, {_ranks([first])} at step {first.step}, {first.phase}, in {first.where}"
