"""A folder of configs from one dial."""

import json

import pytest
import torch

import lumi.planning.new_project
from lumi.cli import dispatch
from lumi.config import UserError, load_config
from lumi.corpus import PrepareConfig
from lumi.planning.new_project import new_project, parse_number
from lumi.training.run_config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def rate(monkeypatch):
    """A machine of 10^12 FLOP/s."""
    monkeypatch.setattr(lumi.planning.new_project, "training_rate", lambda *_: 1e12)


def config_of(folder):
    return load_config(TrainConfig, folder / "pretrain.json")


def test_every_stage_has_a_config(tmp_path):
    said = new_project(tmp_path / "new", CPU, size="3M", tokens="50M")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "corpus.json", "tokenizer.json", "pretrain.json", "evaluation.json",
    }  # fmt: skip
    config = config_of(tmp_path / "new")
    assert config.num_tokens >= 50e6
    tokenizer = json.loads((tmp_path / "new" / "tokenizer.json").read_text())
    assert tokenizer["vocab_size"] == config.model.vocab_size == 8192
    corpus = load_config(PrepareConfig, tmp_path / "new" / "corpus.json")
    assert sum(source.max_tokens for source in corpus.sources) == pytest.approx(1.08 * 50e6, rel=1e-6)
    for reason in (
        "3,012,288 parameters",
        "65% fineweb_edu",
        f"lumi prepare --config {tmp_path}/new/corpus.json",
    ):
        assert reason in said


def test_twenty_tokens_for_each_parameter_unless_told_otherwise(tmp_path):
    new_project(tmp_path / "new", CPU, size="tiny")
    assert 20 * 23_072_000 <= config_of(tmp_path / "new").num_tokens < 20 * 23_072_000 + 131_072


def test_minutes_give_tokens_or_size_and_tokens(tmp_path):
    """10 minutes of 10^12 FLOP/s are 6e14. 6 N (20 N) = 6e14 at N = 2.24M."""
    new_project(tmp_path / "both", CPU, size=None, minutes=10)
    parameters = config_of(tmp_path / "both").model.num_parameters
    assert parameters == pytest.approx((6e14 / 120) ** 0.5, rel=0.05)
    new_project(tmp_path / "tokens", CPU, size="micro", minutes=10)
    config = config_of(tmp_path / "tokens")
    flops = config.num_tokens * config.model.flops_per_token(1024)
    assert flops == pytest.approx(6e14, rel=0.02)


def test_own_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 420)
    said = new_project(tmp_path / "new", CPU, size="1M", data=[str(tmp_path / "a.jsonl")])
    (source,) = load_config(PrepareConfig, tmp_path / "new" / "corpus.json").sources
    assert (source.kind, source.paths) == ("jsonl", (str(tmp_path / "a.jsonl"),))
    assert "5.88 kB, some 1.4k tokens if not compressed; training reads each " in said
    (tmp_path / "b.txt").write_text("x")
    new_project(tmp_path / "text", CPU, size="1M", data=[str(tmp_path / "b.txt")])
    (source,) = load_config(PrepareConfig, tmp_path / "text" / "corpus.json").sources
    assert source.kind == "text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--size must be micro, .* or a number such as 23M; or give --minutes"),
        ({"size": "large"}, "--size must be a positive number such as 23M or 0.5B, got 'large'"),
        ({"size": "0M"}, "--size must be a positive number"),
        ({"size": "1M", "tokens": "-5"}, "--tokens must be a positive number"),
        ({"size": "1M", "tokens": "5M", "minutes": 3}, "--tokens cannot stand beside --minutes"),
        ({"minutes": 0}, "--minutes must be positive, got 0"),
        ({"minutes": float("nan")}, "--minutes must be positive, got nan"),
        ({"size": "1M", "data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        new_project(tmp_path / "new", CPU, **({"size": None} | options))
    assert not (tmp_path / "new").exists()


def test_files_without_a_byte_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"--data must hold text, got 0 bytes in .*empty.jsonl"):
        new_project(tmp_path / "new", CPU, size="1M", data=[str(tmp_path / "empty.jsonl")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"content": "x"}\n' * 200,
            r"got .*a\.jsonl:1: no field 'text'; it has 'content'; mend the",
        ),
        ("a.jsonl", b"{\n", r"--data must hold texts of .*, got .*a\.jsonl:1: not valid JSON: "),
        ("a.json", b'[{"content": 1}]', r"got .*a\.json:item 1: no field 'text'; it has 'content'; mend the"),
        ("a.json", b"[{]", r"a\.json must hold one JSON array of objects, got "),
        ("a.txt", b"\xff", r"--data must hold texts of .*, got .*a\.txt: invalid UTF-8 at byte 0"),
        (
            "a.txt",
            b"x" * 1_100_000,
            r"texts of at most 1,000,000 characters, got one of 1,100,000 in .*a\.txt",
        ),
        ("a.parquet", b"PAR1", r"a\.parquet must be a readable parquet file, got "),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", r"a\.jsonl\.gz must be a readable jsonl file, got "),
    ],
)
def test_files_without_a_text_are_refused_at_once(name, content, message, tmp_path):
    (tmp_path / "good.txt").write_text("x" * 300)
    (tmp_path / "good.jsonl").write_text('{"text": "x"}\n{}\n')
    (tmp_path / name).write_bytes(content)
    beside = f"good{name[1:]}" if name in ("a.jsonl", "a.txt") else name
    data = [str(tmp_path / beside), str(tmp_path / name)]
    with pytest.raises(UserError, match=message):
        new_project(tmp_path / "new", CPU, size="1M", data=data)
    assert not (tmp_path / "new").exists()


def test_bad_records_among_good_ones_and_empty_files_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{\n{"text": "x"}\n')
    (tmp_path / "empty.jsonl").touch()
    data = [str(tmp_path / name) for name in ("a.jsonl", "empty.jsonl")]
    new_project(tmp_path / "new", CPU, size="1M", data=data)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.txt").touch()
    new_project(tmp_path / "text", CPU, size="1M", data=[str(tmp_path / "*.txt")])


def test_a_dataset_on_the_hub_is_not_read(tmp_path):
    said = new_project(tmp_path / "new", CPU, size="1M", data=["org/name"])
    assert "the dataset org/name on the hub, which was not read yet" in said
    assert " of training on this machine, without other work\n" in said


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="--output-dir must be new or empty"):
        new_project(tmp_path, CPU, size="tiny")


@pytest.mark.parametrize(("text", "number"), [("23M", 23e6), (".5b", 5e8), ("1000", 1000), ("2.5k", 2500)])
def test_numbers(text, number):
    assert parse_number("--size", text) == number


def test_the_command(tmp_path, capsys):
    assert dispatch(["new", "--size", "tiny", "--output-dir", str(tmp_path / "new"), "--device", "cpu"]) == 0
    assert "23,072,000 parameters" in capsys.readouterr().out
