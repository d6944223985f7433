"""What all commands share: options spelt with - or _, dotted overrides, and errors of the user or the disk as one line, exit code 2."""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lumi.config import UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that shows defaults and takes no abbreviations, which would break scripts when options are added."""
    return argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False, formatter_class=_Formatter
    )


def add_config(arguments: argparse.ArgumentParser, default: str = "") -> None:
    """The options of a stage that a JSON config drives: `--config`, optional where `default` says in words what it is without, and
    dotted overrides. Use `parse` to read them."""
    shown = f"; default: {default}" if default else ""
    arguments.add_argument("--config", required=not default, help=f"JSON config of this stage{shown}")
    arguments.add_argument(
        "overrides",
        nargs="*",
        metavar="key.subkey=value",
        help="changes to the config, e.g. optimizer.peak_lr=3e-4",
    )


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; overrides may stand anywhere, also behind an option that takes several values. A path that exists is not an override."""
    overrides = [argument for argument in argv if _OVERRIDE.match(argument) and not Path(argument).exists()]
    return arguments.parse_args(
        [*overrides, *(argument for argument in argv if argument not in [*overrides, "--"])]
    )


_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


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
        sys.stdout.reconfigure(
            line_buffering=True
        )  # a log file shows a line when it is written, in order with the progress
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
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
