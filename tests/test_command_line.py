import errno
from dataclasses import dataclass

import pytest

from lumi.cli import dispatch
from lumi.command_line import (
    add_config,
    add_numbers,
    from_options,
    normalize,
    parse,
    parse_size,
    parser,
    run,
)
from lumi.config import UserError


def test_normalize():
    given = ["--data_dirs", "a_b", "--x-y_z=p_q", "key_a.b_c=1", "-x_y"]
    assert normalize(given) == ["--data-dirs", "a_b", "--x-y-z=p_q", "key_a.b_c=1", "-x_y"]


def test_overrides_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    arguments = parser("x", "")
    add_config(arguments)
    arguments.add_argument("--data-dirs", nargs="+")
    for argv in (
        ["seed=1", "--config", "c.json", "--data-dirs", "S", "a=b", "model.dim=2"],
        ["--data-dirs", "S", "seed=1", "a=b", "--config", "c.json", "model.dim=2"],
        ["--config", "c.json", "--data-dirs", "S", "a=b", "--", "seed=1", "model.dim=2"],
    ):
        options = parse(arguments, argv)
        assert (options.config, options.data_dirs, options.overrides) == (
            "c.json",
            ["S", "a=b"],
            ["seed=1", "model.dim=2"],
        )


@dataclass(frozen=True, kw_only=True)
class Oven:
    num_plates: int = 4
    top_heat: float = 0.5
    fan_speed: float | None = None

    def __post_init__(self):
        if self.num_plates < 1:
            raise UserError("num_plates", "must be at least 1", got=self.num_plates, remedy="buy one")


TEXTS = {"num_plates": "how many", "top_heat": "0 is off", "fan_speed": "default: none"}


def test_numbers_become_a_dataclass(capsys):
    arguments = parser("x", "")
    add_numbers(arguments, Oven(num_plates=2), TEXTS)
    assert from_options(Oven, arguments.parse_args([])) == Oven(num_plates=2)
    options = arguments.parse_args(["--num-plates", "3", "--top-heat", "0", "--fan-speed", "1"])
    assert from_options(Oven, options) == Oven(num_plates=3, top_heat=0.0, fan_speed=1.0)
    with pytest.raises(UserError) as raised:
        from_options(Oven, arguments.parse_args(["--num-plates", "0"]))
    assert str(raised.value) == "--num-plates must be at least 1, got 0; buy one"
    with pytest.raises(SystemExit):
        arguments.parse_args(["--num-plates", "0.5"])
    assert "invalid int value" in capsys.readouterr().err


def test_help_shows_defaults_where_there_are_any(capsys):
    arguments = parser("x", "")
    add_numbers(arguments, Oven(num_plates=2, top_heat=0.0), TEXTS)
    arguments.add_argument("--cold", action="store_true", help="no heat")
    with pytest.raises(SystemExit):
        arguments.parse_args(["--help"])
    options = " ".join(capsys.readouterr().out.split()).partition("options:")[2].split(" --")
    assert options[1:] == [
        "help show this help message and exit",
        "num-plates NUM_PLATES how many (default: 2)",
        "top-heat TOP_HEAT 0 is off (default: 0.0)",
        "fan-speed FAN_SPEED default: none",
        "cold no heat",
    ]


@pytest.mark.parametrize(
    ("fault", "code", "printed"),
    [
        (UserError("--port", "must be free", got=80), 2, "error: --port must be free, got 80\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, f"error: [Errno {errno.ENOSPC}] No space left\n"),
        (KeyboardInterrupt(), 130, ""),
        (None, 0, ""),
    ],
    ids=["user", "disk", "Ctrl-C", "none"],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(fault, code, printed, capsys):
    def main(argv):
        assert argv == ["--a-b", "c_d"]
        if fault is not None:
            raise fault
        return 0

    assert run(main, ["--a_b", "c_d"]) == code
    assert capsys.readouterr() == ("", printed)


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda argv: 1 // 0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", ""],
        ["verify", ".", "--search", ""],
        ["report", ""],
        ["report", ".", "--output", ""],
        ["export", "--model-path", "", "--output-dir", "x"],
        ["export", "--model-path", "x", "--output-dir", ""],
        ["tokenizer", "--config", "x", "--corpus-dirs", "x", "--output-dir="],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(arguments, capsys):
    """As a shell makes it of a variable that is not set."""
    with pytest.raises(SystemExit, match="2"):
        dispatch(arguments)
    assert capsys.readouterr().err.endswith(": must be a path, got an empty text\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("500MB", 5 * 10**8), ("100KiB", 102_400), ("7", 7)],
)
def test_sizes(text, size):
    assert parse_size("--max-shard-size", text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 TB", "-1GB", "0", "1e3", "2GB2"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size must be a size such as 2GB, 500MB or 1GiB, got "):
        parse_size("--max-shard-size", text)
