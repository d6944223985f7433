"""`lumi push` as tests call it, and what it leaves."""

from hub_server import TOKEN
from huggingface_hub import ModelCard

from lumi.cli import dispatch
from lumi.command_line import run


def push(*words):
    return dispatch(["push", *map(str, words)])


def refusal(capsys, *words):
    """The one line that a push is refused with; the token is never in it."""
    assert run(dispatch, ["push", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    [line] = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def card_of(hub, repo, branch="main"):
    return ModelCard(hub.files(repo, branch)["README.md"].decode())
