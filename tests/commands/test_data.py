import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "--config", "none.json", "--output-dir", "x"],
            "none.json: cannot be read: No such file or directory",
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
