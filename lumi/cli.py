"""The `lumi` command: one subcommand for each stage."""

import sys
from collections.abc import Callable

from lumi import __version__
from lumi.command_line import run, summary
from lumi.commands.data import prepare, tokenize, tokenizer
from lumi.commands.experiments import fit, sweep
from lumi.commands.inference import chat, generate, serve
from lumi.commands.models import compare, evaluate, export, merge, push, verify
from lumi.commands.runs import demo, doctor, finetune, new, plan, report
from lumi.config import UserError

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command
    for command in (
        prepare,
        tokenizer,
        tokenize,
        new,
        plan,
        sweep,
        fit,
        generate,
        chat,
        serve,
        evaluate,
        compare,
        export,
        merge,
        verify,
        finetune,
        report,
        push,
        demo,
        doctor,
    )
}


def dispatch(argv: list[str]) -> int:
    """Hand over to a subcommand."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv == ["--version"]:
        print(f"lumi {__version__}")
        return 0
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError("the command", f"must be one of {', '.join(COMMANDS)}", got=repr(argv[0]))
    print("usage: lumi COMMAND ... (lumi COMMAND --help shows its options)\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<10} {summary(command)}")
    print("\nTraining: torchrun lumi/train.py --help")
    return 0 if argv else 2


def main() -> int:
    """The console script."""
    return run(dispatch)


if __name__ == "__main__":
    sys.exit(main())
