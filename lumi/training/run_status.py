"""`status.json` in a run's folder: how the run stands, for whoever started it.

torchrun exits with 1 even when a signal ended a run that saved everything. A scheduler's script reads here
whether the run can go on.
"""

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from lumi.config import UserError, read_json, write_json

Status = Literal["running", "preempted", "finished", "failed"]


def status_file(folder: str | Path) -> Path:
    """Where the status of the run in `folder` is."""
    return Path(folder) / "status.json"


def write_status(folder: str | Path, status: Status, step: int, **more: Any) -> None:
    """Replace the status of a run, atomically.

    Args:
        folder: of the run; made where it is not there yet.
        status: "preempted": a signal ended it, and it can go on; "failed": an error did.
        step: the last one done.
        more: JSON values to stand beside it, such as `signal` or `message`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        status_file(folder),
        {"status": status, "step": step, "time": now, "host": socket.gethostname(), **more},
    )


def read_status(folder: str | Path) -> dict[str, Any] | None:
    """The status of the run in `folder`: `status`, `step`, `time` (ISO 8601, UTC), `host`, and more. None:
    there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = status_file(folder)
    if not path.exists():
        return None
    data = read_json(path)
    if not isinstance(data, dict) or data.get("status") not in get_args(Status):
        raise UserError(
            f"{path}: must hold a status, one of {', '.join(get_args(Status))}",
            got=str(data)[:60],
            remedy="remove the file",
        )
    return data
