"""Prompts as JSON lines -> the same lines with what a model says to them: generation for scripts."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lumi.chat import rendering as chat
from lumi.chat.messages import MalformedConversation, Message, find_disorder, parse_messages
from lumi.config import UserError
from lumi.host.text import utf8
from lumi.inference.generation import SamplingConfig, check_prompts, filler_id, generate_ids, text_ids
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

OUTPUT_FIELDS = ("text", "num_tokens", "stopped")


class Request(NamedTuple):
    """One line: its record, and the prompt in tokens; `is_chat` tells messages from plain text."""

    record: dict[str, Any]
    ids: list[int]
    is_chat: bool


def read_requests(data: bytes, where: str, tokenizer: Tokenizer, max_positions: int) -> list[Request]:
    """Read all prompts, before any work: one {"prompt": "..."} or {"messages": [...]} a line, with any other fields.

    A prompt is continued as plain text; messages, which end with the user's, are asked through the tokenizer's chat template.

    Args:
        data: the whole file, UTF-8; blank lines are skipped.
        where: its name, for messages.
        max_positions: the model's; a prompt must be shorter.

    Raises:
        UserError: naming the first line that is none of these, or too long.
    """
    requests = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            request = _parse(line, tokenizer)
            check_prompts([request.ids], max_positions)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: line {number}: must be UTF-8, got byte {line[error.start]:#04x} at {error.start}"
            ) from error
        except ValueError as error:  # a conversation's, the tokenizer's, the template's, ours
            raise UserError(f"{where}: line {number}: {error}") from error
        requests.append(request)
    if not requests:
        raise UserError(
            f"{where}: must hold at least one line, a JSON object with a prompt or messages, got none"
        )
    return requests


def _parse(line: bytes, tokenizer: Tokenizer) -> Request:
    try:
        record = json.loads(line.decode(), parse_constant=_finite, parse_float=_finite)
        _check_unicode(record)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"must be a JSON object, got something else: {error}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UserError('must be a JSON object with either "prompt" or "messages"')
    if taken := [name for name in OUTPUT_FIELDS if name in record]:
        raise UserError(
            f'"{taken[0]}" must not be there, the result is written under this name; rename the field'
        )
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise UserError(f"prompt must be a string, got {json.dumps(record['prompt'])[:60]}")
        return Request(record, text_ids(tokenizer, record["prompt"]), is_chat=False)
    messages = parse_messages(record["messages"])
    if disorder := find_disorder([*messages, Message("assistant", "")]):
        expected = "messages must be at most one of the system first, then of user and assistant in turn, the user's last"
        raise MalformedConversation(
            disorder, f"{expected}; got {', '.join(message.role for message in messages)}"
        )
    return Request(record, chat.prompt_ids(tokenizer, messages), is_chat=True)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise UserError(f"numbers must be finite, which is all that JSON has, got {number}")
    return value


def _check_unicode(value: Any, place: str = "") -> None:
    """Raises UserError naming the field of a lone surrogate, which could not be written."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_unicode(name, f"{place}a name: ")
            _check_unicode(item, f"{place}{name}: ")
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            _check_unicode(item, f"{place}{number}: ")
    elif isinstance(value, str):
        try:
            utf8(value)
        except UserError as error:
            raise UserError(f"{place}{error}") from error


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    config: SamplingConfig,
    batch_size: int,
) -> Iterator[list[dict[str, Any]]]:
    """Answer requests, `batch_size` at a time.

    Yields:
        A batch's records in the order of the requests, with `text`, `num_tokens` and `stopped` (by itself, not by a limit) added.
        A request's sample depends on the seed and its number, not on the batch size.
    """
    for start, batch in _batches(requests, batch_size):
        completions = generate_ids(
            model,
            [request.ids for request in batch],
            dataclasses.replace(config, seed=(config.seed + start) % 2**63),
            stop_ids=chat.stop_ids(tokenizer) if batch[0].is_chat else frozenset({tokenizer.eos_id}),
            pad_id=filler_id(tokenizer),
            vocab_size=tokenizer.vocab_size,
        )
        results = (
            (tokenizer.decode(completion.ids, continues=True), len(completion.ids), completion.stopped)
            for completion in completions
        )
        yield [
            request.record | dict(zip(OUTPUT_FIELDS, result, strict=True))
            for request, result in zip(batch, results, strict=True)
        ]


def _batches(requests: Sequence[Request], size: int) -> Iterator[tuple[int, list[Request]]]:
    """Neighbours of one kind, since a batch has one set of tokens that end a row; each with the number of its first request."""
    start = 0
    for _, group in groupby(requests, key=lambda request: request.is_chat):
        neighbours = list(group)
        for first in range(0, len(neighbours), size):
            yield start + first, neighbours[first : first + size]
        start += len(neighbours)
