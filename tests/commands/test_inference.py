import pytest
import torch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--model-path", "none", "--prompt", "x"],
            "none: must be a model folder with a config.json",
        ),
        (
            ["generate", "--model-path", "none", "--prompt", "x", "--top-p", "0"],
            "--top-p must be between 0.000001 and 1 (off), got 0.0\n",
        ),
        pytest.param(
            ["generate", "--model-path", "none", "--prompt", "x", "--device", "cuda"],
            '--device must be "cpu" or "auto" on this machine, got "cuda"',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors(arguments, message, refused):
    refused(arguments, message)
