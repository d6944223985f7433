import pytest

from lumi.cli import dispatch
from lumi.command_line import run


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Says that arguments give one line of error, which begins with a message, and leave nothing behind."""

    def refused(arguments, message):
        monkeypatch.chdir(tmp_path)
        assert run(dispatch, arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    return refused
