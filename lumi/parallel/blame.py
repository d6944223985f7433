"""Which process a run that hangs is waiting for, from what all of them have last told, and one sentence about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a process tells of itself. `count` grows while it lives; `still_seconds` is how long its loop has made no mark.

    `parts` and `idle_seconds` are of the work behind its loop, in a patient phase: how much the process has done of what all do together,
    and for how long it has done nothing; 0 where nobody knows.
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
    left: Literal["", "finished", "failed"] = ""  # the loop ended: as it should, or with an exception
    parts: int = 0
    idle_seconds: float = 0.0


class Blame(NamedTuple):
    """Who holds the run up.

    `failed`: left with an error, but still there. `mute`: no sign of life. `behind`: the others have gone on to a later mark. `unsaved`:
    all are patient, and the others have done more of what they do together behind their loops. `apart`: all stand at one mark, these few on
    another line than most. `together`: nobody can be told from the rest.
    """

    kind: Literal["failed", "mute", "behind", "unsaved", "apart", "together"]
    ranks: list[int]


def find_blame(beats: Sequence[Beat], mute: set[int], limit_seconds: float) -> Blame | None:
    """Who holds the run up, as seen by a process that has waited for `limit_seconds`.

    Args:
        beats: of all processes, in the order of ranks.
        mute: the ranks whose beats have stopped.

    Returns:
        None as long as those that the rest waits for are at work: at a mark younger than the limit; or in a patient phase, while any
        process does something behind its loop, or nobody knows whether.
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
    """One sentence about a blame, for the user: the ranks, their hosts and process ids, where each stands, and what the others do."""
    blamed = [beats[rank] for rank in blame.ranks]
    others = [beat for beat in beats if beat.rank not in blame.ranks]
    one = len(blamed) == 1
    still = max(beat.still_seconds for beat in blamed)
    stand = _stand(blamed)
    text = f"step {max(beat.step for beat in beats)}: "
    if blame.kind == "failed":
        return text + f"{_names(blamed)} left with an error but did not end; the last mark: {stand}"
    if blame.kind == "mute":
        gives = "gives no sign of life: the process is" if one else "give no sign of life: the processes are"
        return text + f"{_names(blamed)} {gives} stopped, dead or cut off; last seen: {stand}"
    if blame.kind == "together":
        text += f"no process has gone on for {still:.0f} s: {stand}"
    elif blame.kind == "unsaved":
        idle = min(beat.idle_seconds for beat in blamed)
        text += f"{_names(blamed)} {'has' if one else 'have'} written nothing for {idle:.0f} s, and all wait for it: {stand}"
    else:
        text += f"{_names(blamed)} {'has' if one else 'have'} not gone on for {still:.0f} s: {stand}; {_waiting(others)}"
    return text + "; if it only needs longer, raise step_timeout_seconds"


def _names(beats: Sequence[Beat]) -> str:
    """Ranks with host and process id, as long as they are few."""
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
    """Where each stands, those at one place together."""
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
