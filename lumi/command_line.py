"""What all commands share: options, dotted overrides, and errors as one line with exit code 2."""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lumi.config import UserError

Settings = TypeVar("Settings")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that shows defaults. It takes no abbreviations: new options would break them."""
    return argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False, formatter_class=_Formatter
    )


def given_path(text: str) -> Path:
    """For `type=` of an option. An empty text is no path: as a `Path` it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got an empty text")
    return Path(text)


def summary(command: Callable[[list[str]], int]) -> str:
    """The line about a subcommand that `lumi --help` and its own help show."""
    return command.__doc__ or ""


def add_config(arguments: argparse.ArgumentParser, default: str = "") -> None:
    """Add `--config` and dotted overrides, for a stage that a JSON config drives. Use `parse` to read them.

    Args:
        default: says in words which config a call without `--config` takes; empty: `--config` is required.
    """
    shown = f"; default: {default}" if default else ""
    arguments.add_argument("--config", required=not default, help=f"JSON config of this stage{shown}")
    example = "changes to the config, e.g. optimizer.peak_lr=3e-4"
    arguments.add_argument("overrides", nargs="*", metavar="key.subkey=value", help=example)


def parse(arguments: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse options and overrides.

    Overrides may stand anywhere, also behind an option that takes several values. An argument that names an
    existing path is not an override.
    """
    overrides, others = split_overrides(argv)
    return arguments.parse_args([*overrides, *others])


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides among arguments, and the others."""
    overrides = [argument for argument in argv if _OVERRIDE.match(argument) and not Path(argument).exists()]
    return overrides, [argument for argument in argv if argument not in (*overrides, "--")]


_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


def add_device(arguments: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def add_cache_dir(arguments: argparse.ArgumentParser) -> None:
    """Add `--cache-dir`, for commands that take a corpus folder as data."""
    text = "for tokens of corpus folders (default: in them) and what comes from URLs (default: ~/.cache/lumi)"
    arguments.add_argument("--cache-dir", type=given_path, metavar="DIR", help=text)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(option: str, text: str) -> int:
    """Bytes of a size such as "2GB" (2 * 10**9, as in transformers), "500MiB" or "1000". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise UserError(option, "must be a size such as 2GB, 500MB or 1GiB", got=repr(text))
    return size


def add_numbers(arguments: argparse.ArgumentParser, defaults: Any, texts: Mapping[str, str]) -> None:
    """Add an option for some fields of a dataclass that hold numbers. `from_options` builds the dataclass.

    Args:
        defaults: the dataclass or an instance of it; a default of None counts as a float.
        texts: the help text of each of the fields, by name.
    """
    for name, text in texts.items():
        default = getattr(defaults, name)
        kind = int if isinstance(default, int) else float
        arguments.add_argument(option_name(name), type=kind, default=default, help=text)


def from_options(cls: type[Settings], options: argparse.Namespace) -> Settings:
    """Build a dataclass from the options named after its fields. Raises UserError naming the option."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {name: getattr(options, name) for name in names}
    try:
        return cls(**values)
    except UserError as error:
        raise error.replace(subject=option_name(error.subject)) from error


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports of packages that only some users need. Raises UserError if one is not installed.

    Args:
        name: the extra of `lumi-train` that brings them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f"run: pip install 'lumi-train[{name}]'"
        raise UserError(f"the package {error.name}", "must be installed for this", remedy=remedy) from error


def option_name(field: str) -> str:
    """`max_new_tokens` -> `--max-new-tokens`."""
    return f"--{field.replace('_', '-')}"


def normalize(argv: Sequence[str]) -> list[str]:
    """`--data_dirs` -> `--data-dirs`. Values stay as they are."""
    normal = []
    for argument in argv:
        name, separator, value = argument.partition("=")
        normal.append(name.replace("_", "-") + separator + value if name.startswith("--") else argument)
    return normal


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main` with normalised arguments. A UserError becomes one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # so that a log file gets lines and progress in their order
    try:
        return main(normalize(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # the interrupted work has already said what it leaves
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        sys.stderr.close()
        return 141
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
