"""What all commands share: options spelt with - or _, dotted overrides, and user errors as one line with exit code 2."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence

from lumi.config import UserError


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that shows defaults and takes no abbreviations, which would break scripts when options are added."""
    return argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_config(arguments: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of a stage that a JSON config drives: `--config` and dotted overrides."""
    arguments.add_argument("--config", required=required, help="JSON config of this stage")
    arguments.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="changes to the config, e.g. optimizer.peak_lr=3e-4")


def normalize(argv: Sequence[str]) -> list[str]:
    """`--data_dirs` -> `--data-dirs`; values stay as they are."""
    normal = []
    for argument in argv:
        name, separator, value = argument.partition("=")
        normal.append(name.replace("_", "-") + separator + value if name.startswith("--") else argument)
    return normal


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main` with normalised arguments; a UserError becomes one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written, in order with the progress
    try:
        return main(normalize(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # whoever was at work has said what it leaves
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 141
