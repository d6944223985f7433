"""JSON lines with prompts -> the same lines with a model's answers: generation for scripts."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lumi.chat.messages import MalformedConversation, Message, find_disorder, parse_messages
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.config import UserError, unique_keys
from lumi.host.progress import progress_bar
from lumi.host.storage import check_output_file, is_empty
from lumi.host.text import utf8
from lumi.inference.generation import SamplingConfig, check_prompts, filler_id, generate_ids, text_ids
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

OUTPUT_FIELDS = ("text", "num_tokens", "stopped")


class PromptLine(NamedTuple):
    """One line: its record and the prompt in tokens. `is_chat`: the record holds messages, not plain text."""

    record: dict[str, Any]
    ids: list[int]
    is_chat: bool


def read_prompts(data: bytes, where: str, tokenizer: Tokenizer, max_positions: int) -> list[PromptLine]:
    """Read all prompts, before any work.

    A line holds {"prompt": "..."} or {"messages": [...]}, and any other fields. The model continues a prompt
    as plain text. Messages go through the tokenizer's chat template; the last one must be the user's.

    Args:
        data: the whole file, UTF-8. Blank lines are skipped.
        where: the file's name, for error messages.
        max_positions: the model's. A prompt must be shorter.

    Raises:
        UserError: a line holds something else, or its prompt is too long. The error names the line.
    """
    prompts = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, tokenizer)
            check_prompts([prompt.ids], max_positions)
        except UserError as error:
            raise error.within(f"{where}: line {number}") from error
        except MalformedConversation as error:
            raise UserError(f"{where}: line {number}: {error}") from error
        prompts.append(prompt)
    if not prompts:
        raise UserError(
            f"{where}:", "must hold at least one line, a JSON object with a prompt or messages", got="none"
        )
    return prompts


def _parse(line: bytes, tokenizer: Tokenizer) -> PromptLine:
    record = _read_record(line)
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise UserError("prompt", "must be a string", got=json.dumps(record["prompt"])[:60])
        return PromptLine(record, text_ids(tokenizer, record["prompt"]), is_chat=False)
    return PromptLine(record, conversation_ids(tokenizer, record["messages"]), is_chat=True)


def conversation_ids(tokenizer: Tokenizer, data: Any) -> list[int]:
    """The prompt that asks for the next answer of a conversation.

    Args:
        data: as for `lumi.chat.messages.parse_messages`.

    Raises:
        UserError: the turns are not in order, or the chat template refuses them.
        MalformedConversation: it is none.
    """
    messages = parse_messages(data)
    if find_disorder([*messages, Message("assistant", "")]):
        order = "be at most one of the system first, then of user and assistant in turn, the user's last"
        raise UserError("messages", f"must {order}", got=", ".join(message.role for message in messages))
    return prompt_ids(tokenizer, messages)


def _read_record(line: bytes) -> dict[str, Any]:
    """A line's JSON object: a prompt or messages, and no field named like a result. Raises UserError."""
    try:
        record = json.loads(
            line.decode(), parse_constant=_finite, parse_float=_finite, object_pairs_hook=unique_keys
        )
    except UnicodeDecodeError as error:
        raise UserError(f"must be UTF-8, got byte {line[error.start]:#04x} at {error.start}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"must be a JSON object, got something else: {error}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UserError('must be a JSON object with either "prompt" or "messages"')
    _check_unicode(record)
    if taken := [name for name in OUTPUT_FIELDS if name in record]:
        reason = "must not be there, the result is written under this name"
        raise UserError(f'"{taken[0]}"', reason, remedy="rename the field")
    return record


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise UserError("numbers", "must be finite, JSON has no others", got=number)
    return value


def _check_unicode(value: Any, *place: str) -> None:
    """Raises UserError naming the field with a lone surrogate, which cannot be written to a file."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_unicode(name, *place, "a name")
            _check_unicode(item, *place, name)
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            _check_unicode(item, *place, str(number))
    elif isinstance(value, str):
        try:
            utf8(value)
        except UserError as error:
            raise error.within(": ".join(place)) from error


def check_files(source: str, target: str | None) -> None:
    """Refuse a target that cannot be written or that holds something; None is stdout. Raises UserError."""
    if target is None:
        return
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError("--output", "must be another file than --input", got=f"{target} for both")
    check_output_file(target, "new or empty", is_empty)


def complete_file(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptLine],
    config: SamplingConfig,
    batch_size: int,
    target: str | None,
) -> None:
    """Write the answers of `complete` as JSON lines to a file (None: stdout), batch by batch."""
    with (
        contextlib.nullcontext(sys.stdout.buffer) if target is None else open(target, "wb") as file,
        progress_bar("generate", " lines", total=len(prompts), disable=target is None) as progress,
    ):
        for batch in complete(model, tokenizer, prompts, config, batch_size):
            lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in batch)
            file.writelines(line.encode() + b"\n" for line in lines)
            file.flush()
            progress.update(len(batch))


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptLine],
    config: SamplingConfig,
    batch_size: int,
) -> Iterator[list[dict[str, Any]]]:
    """Answer prompts, `batch_size` at a time.

    Yields:
        A batch's records in the order of the prompts, with `text`, `num_tokens` and `stopped` (the model
        ended the text, not a limit). A sample depends on the seed and the prompt's number, not on the batch
        size.
    """
    for start, batch in _batches(prompts, batch_size):
        completions = generate_ids(
            model,
            [prompt.ids for prompt in batch],
            dataclasses.replace(config, seed=(config.seed + start) % 2**63),
            stop_ids=stop_ids(tokenizer) if batch[0].is_chat else frozenset(tokenizer.eos_ids),
            pad_id=filler_id(tokenizer),
            vocab_size=tokenizer.vocab_size,
        )
        results = (
            (tokenizer.decode(completion.ids, continues=True), len(completion.ids), completion.stopped)
            for completion in completions
        )
        yield [
            prompt.record | dict(zip(OUTPUT_FIELDS, result, strict=True))
            for prompt, result in zip(batch, results, strict=True)
        ]


def _batches(prompts: Sequence[PromptLine], size: int) -> Iterator[tuple[int, list[PromptLine]]]:
    """Batches of neighbours of one kind, each with the number of its first prompt.

    Text and chat do not share a batch, because one set of stop tokens ends all its rows.
    """
    start = 0
    for _, group in groupby(prompts, key=lambda prompt: prompt.is_chat):
        neighbours = list(group)
        for first in range(0, len(neighbours), size):
            yield start + first, neighbours[first : first + size]
        start += len(neighbours)
