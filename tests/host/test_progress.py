import sys

import pytest

from lumi.host.progress import progress_bar


@pytest.mark.parametrize(("terminal", "interval"), [(True, 0.5), (False, 15.0)])
def test_a_log_file_gets_fewer_lines_than_a_terminal(monkeypatch, capsys, terminal, interval):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress_bar("tokenizing", " documents", total=3) as progress:
        progress.update(3)
        assert progress.mininterval == progress.maxinterval == interval
    line = capsys.readouterr().err
    assert "tokenizing: 100%" in line
    assert "3/3" in line
