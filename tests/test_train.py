"""The door of training: arguments, and errors as one line."""

import json

import pytest
from runs import merged

import lumi.train
from lumi.command_line import run


def test_user_errors_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    config = tmp_path / "bad.json"
    config.write_text(json.dumps(merged({})))
    arguments = ["--config", str(config), "--data_dirs", "D", "--tokenizer-dir", "T", "--output_dir", "R"]
    assert run(lumi.train.main, [*arguments, "optimizer.peek_lr=1"]) == 2
    expected = f"error: {config}: optimizer.peek_lr unknown key (value 1); did you mean 'peak_lr'?"
    assert capsys.readouterr().err.strip() == expected
    monkeypatch.setenv("LOCAL_RANK", "1")  # the machine's first process says it
    assert run(lumi.train.main, [*arguments, "optimizer.peek_lr=1"]) == 2
    assert capsys.readouterr().err == ""


def test_an_unknown_option_is_refused(capsys):
    paths = ["--data-dirs", "D", "--tokenizer-dir", "T", "--output-dir", "R"]
    with pytest.raises(SystemExit) as left:
        lumi.train.main(["--config", "C", *paths, "--no-such-option"])
    assert left.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err
