import socket
from datetime import UTC, datetime, timedelta

import pytest

from lumi.config import UserError
from lumi.training.run_status import read_status, write_status


def test_what_was_written_is_read(tmp_path):
    folder = tmp_path / "new" / "run"
    assert read_status(folder) is None
    before = datetime.now(UTC) - timedelta(seconds=1)
    write_status(folder, "running", 0)
    write_status(folder, "preempted", 17, signal="SIGTERM", checkpoint="checkpoints/step-00000017")
    status = read_status(folder)
    assert before <= datetime.fromisoformat(status.pop("time")) <= datetime.now(UTC)
    assert status == {
        "status": "preempted",
        "step": 17,
        "host": socket.gethostname(),
        "signal": "SIGTERM",
        "checkpoint": "checkpoints/step-00000017",
    }
    assert [path.name for path in folder.iterdir()] == ["status.json"]


def test_a_damaged_file_is_named(tmp_path):
    for content, message in (
        ("{", r"status.json: not valid JSON"),
        (
            '{"status": "asleep"}',
            r"status.json: must hold a status, one of running, preempted, finished, failed, got .*asleep",
        ),
        ("[]", r"status.json: must hold a status"),
    ):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_status(tmp_path)
