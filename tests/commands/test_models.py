import pytest

from lumi.cli import dispatch
from lumi.config import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--quantize q8_0", "--quantize must come with --format gguf, got --format hf"),
        ("--license mit", "--license must come with --format gguf, got --format hf"),
        (
            "--format gguf --dtype float32",
            "--dtype must come with --format hf, .*; --quantize is its precision",
        ),
        (
            "--format gguf --max-shard-size 2GB",
            "--max-shard-size must come with --format hf, got --format gguf",
        ),
    ],
)
@pytest.mark.parametrize("command", ["export", "merge"])
def test_options_without_effect(command, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        dispatch([command, "--model-path", "m", "--output-dir", str(tmp_path / "out"), *options.split()])
    assert not (tmp_path / "out").exists()
