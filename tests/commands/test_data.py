import pytest

PREPARE = ["prepare", "--config", "none.json", "--output-dir", "x"]
TOKENIZE = ["tokenize", "--corpus-dirs", "none", "--tokenizer-dir", "none", "--output-dir", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--config", "none.json", "--output-dir", "x"],
            "none.json: cannot be read: No such file or directory",
        ),
        (
            [*PREPARE, "--tasks", "2"],
            "--tasks must come with --executor, got 2",
        ),
        (
            [*PREPARE, "--sbatch=--time=1"],
            "--sbatch must come with --executor, got --time=1",
        ),
        (
            [*PREPARE, "--executor", "local"],
            "--executor must come with --tasks N, got local alone",
        ),
        (
            [*PREPARE, "--executor", "local", "--tasks", "2", "--analyze-only"],
            "--analyze-only must be used without --executor: tasks leave their results on disk; take a part",
        ),
        (
            [*PREPARE, "--executor", "slurm", "--tasks", "0"],
            "--tasks must be at least 1, got 0",
        ),
        (
            [*TOKENIZE, "--tasks", "2"],
            "--tasks must come with --executor, got 2",
        ),
        (
            [*TOKENIZE, "--executor", "slurm", "--tasks", "2"],
            "--sbatch must hold --partition=... and --time=..., got ''",
        ),
        (
            ["tokenize", "--corpus-dirs", "none", "--tokenizer-dir", "none", "--output-dir", "x"],
            "none: must be a tokenizer folder",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors(arguments, message, refused):
    refused(arguments, message)
