"""JSON lines in, JSON lines out: order, fields, batches, and what is refused before any work."""

import io
import json
import sys
from dataclasses import replace

import pytest
from crafted_models import speller, wanderer

import lumi.inference.completions
from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.cli import dispatch
from lumi.command_line import run
from lumi.formats.hf_format import save_model
from lumi.inference.completions import complete, read_prompts
from lumi.inference.generation import SamplingConfig, generate_ids

RECORDS = [
    {"id": 1, "prompt": "The river"},
    {"prompt": "", "weight": 0.5},
    {"messages": [{"role": "user", "content": "Où est-il? <|im_end|>"}], "id": "x"},
    {
        "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "a"}],
        "tags": ["é", None],
    },
    {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user")]},
    {"prompt": "A much longer prompt than the others, é"},
    {"id": 7, "prompt": "The river"},
]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
POSITIONS = 256


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    save_model(folder, wanderer(tokenizer, padding=16), tokenizer)
    return folder


def one_by_one(tokenizer, config):
    """The definition: every request alone, its seed moved on by its number."""
    model = wanderer(tokenizer, padding=16)
    for number, record in enumerate(RECORDS):
        if "prompt" in record:
            ids, stop = [tokenizer.bos_id, *tokenizer.encode(record["prompt"])], frozenset({tokenizer.eos_id})
        else:
            messages = [Message(**message) for message in record["messages"]]
            ids, stop = prompt_ids(tokenizer, messages), stop_ids(tokenizer)
        options = {"stop_ids": stop, "pad_id": tokenizer.pad_id, "vocab_size": tokenizer.vocab_size}
        [completion] = generate_ids(model, [ids], replace(config, seed=config.seed + number), **options)
        yield record | {
            "text": tokenizer.decode(completion.ids),
            "num_tokens": len(completion.ids),
            "stopped": completion.stopped,
        }


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batches_change_nothing(temperature, tokenizer):
    config = SamplingConfig(max_new_tokens=15, temperature=temperature, seed=3)
    expected = list(one_by_one(tokenizer, config))
    assert len({record["text"] for record in expected}) > 4
    prompts = read_prompts(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n"), "lines", tokenizer, POSITIONS)
    for size, batches in ((1, [1] * 7), (2, [2, 2, 1, 2]), (100, [2, 3, 2])):
        got = list(complete(wanderer(tokenizer, padding=16), tokenizer, prompts, config, size))
        assert [len(batch) for batch in got] == batches
        assert [record for batch in got for record in batch] == expected


def test_each_kind_ends_at_its_own_tokens(tokenizer):
    prompts = read_prompts(LINES, "lines", tokenizer, POSITIONS)
    for token, of_a_text in ((tokenizer.control_id("<|im_end|>"), False), (tokenizer.eos_id, True)):
        model = speller(tokenizer, {None: token})
        records = [
            record
            for batch in complete(model, tokenizer, prompts, SamplingConfig(max_new_tokens=3), 2)
            for record in batch
        ]
        assert {record["stopped"] for record in records if "prompt" in record} == {of_a_text}
        assert {record["stopped"] for record in records if "messages" in record} == {True}


def command(model_dir, *options):
    sampling = ["--temperature", "0", "--max-new-tokens", "9"]
    return ["generate", "--model-path", str(model_dir), *sampling, *map(str, options)]


def test_files_and_pipes(model_dir, tokenizer, tmp_path, monkeypatch, capfdbinary):
    expected = list(one_by_one(tokenizer, SamplingConfig(max_new_tokens=9, temperature=0.0)))
    (tmp_path / "in.jsonl").write_bytes(LINES)
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert run(dispatch, command(model_dir, *files)) == 0
    written = (tmp_path / "out.jsonl").read_bytes()
    assert [json.loads(line) for line in written.splitlines()] == expected
    assert "é".encode() in written
    captured = capfdbinary.readouterr()
    assert captured.out == b""
    assert b"7/7" in captured.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    assert run(dispatch, command(model_dir, "--input", "-", "--output", "-", "--batch_size", "1")) == 0
    assert capfdbinary.readouterr() == (written, b"")


def test_finished_batches_are_not_lost(model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    calls = []

    def fails_later(*arguments, **options):
        calls.append(len((tmp_path / "out.jsonl").read_bytes().splitlines()))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate_ids(*arguments, **options)

    monkeypatch.setattr(lumi.inference.completions, "generate_ids", fails_later)
    options = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", 2)
    assert run(dispatch, command(model_dir, *options)) == 130
    assert calls == [0, 2, 4]
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b"{",
            "must be a JSON object, got something else: Expecting property name enclosed in double quotes",
        ),
        (b'"prompt"', 'must be a JSON object with either "prompt" or "messages"'),
        (b"{}", 'must be a JSON object with either "prompt" or "messages"'),
        (b'{"prompt": "x", "messages": []}', 'must be a JSON object with either "prompt" or "messages"'),
        (b'{"prompt": 3}', "prompt must be a string, got 3"),
        (b'{"prompt": "x", "text": "y"}', '"text" must not be there'),
        (b'{"prompt": "\xff"}', "must be UTF-8, got byte 0xff at 12"),
        (
            b'{"prompt": "x", "id": ["a", {"b": "xx\\ud800"}]}',
            "id: 2: b: text must be valid Unicode, got the lone surrogate U+D800 at character 2",
        ),
        (
            b'{"prompt": "x", "i\\udfffd": 1}',
            "a name: text must be valid Unicode, got the lone surrogate U+DFFF at character 1",
        ),
        (
            b'{"prompt": "\\ud800"}',
            "prompt: text must be valid Unicode, got the lone surrogate U+D800 at character 0",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x\\ud800"}]}',
            "messages: 1: content: text must be valid Unicode, got the lone",
        ),
        (b'{"prompt": "x", "id": NaN}', "numbers must be finite, JSON has no others, got NaN"),
        (
            b'{"prompt": "x", "id": [-1e999]}',
            "numbers must be finite, JSON has no others, got -1e999",
        ),
        (
            b'{"prompt": "x", "prompt": "y"}',
            "must be a JSON object, got something else: duplicate key 'prompt'",
        ),
        (
            b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}",
            "must be a JSON object, got something else: Exceeds",
        ),
        (b"[" * 100_000, "must be a JSON object, got something else: maximum recursion depth"),
        (b'{"messages": []}', "messages must be a list of at least one message"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "message 1: role must be one of"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}',
            "messages must be at most one",
        ),
        (
            b'{"prompt": "' + b"x" * 300 + b'"}',
            "a prompt must be shorter than the model's 256 positions, got 30",
        ),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_a_malformed_line_is_named_before_any_work(line, message, model_dir, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(LINES + b"\n" + line + b"\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert run(dispatch, command(model_dir, *files)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'in.jsonl'}: line 9: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--output", "y"], "--output must come with --input"),
        (["--prompt", "x", "--batch-size", "2"], "--batch-size must come with --input"),
        (["--input", "in.jsonl", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--input", "in.jsonl", "--output", "./in.jsonl"], "--output must be another file than --input"),
        (
            ["--input", "in.jsonl", "--output", "none/out"],
            "--output must be a file in a folder that takes files, got none/out",
        ),
        (["--input", "in.jsonl", "--output", "."], "--output must be a file, got the folder ."),
        (["--input", "in.jsonl", "--output", "full"], "--output must be new or empty, got full, a file that"),
        (["--input", "in.jsonl", "--output", "link"], "--output must be new or empty, got link, a file that"),
        (["--input", "in.jsonl"], "in.jsonl: must hold at least one line"),
        (["--input", "none.jsonl"], "--input must be a file that can be read, got none.jsonl: No such file"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("\n")
    (tmp_path / "full").write_text("mine")
    (tmp_path / "link").symlink_to("full")
    assert run(dispatch, command(model_dir, *options)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert (tmp_path / "full").read_text() == "mine"
    assert (tmp_path / "in.jsonl").read_text() == "\n"
