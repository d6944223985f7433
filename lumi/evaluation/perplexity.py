"""Perplexity by rolling windows, of texts and of the validation split of token stores.

Each document stands alone after BOS. The first window predicts the first `window_tokens` tokens of the
document. Each further one predicts the next `stride_tokens` and reads as many tokens before them as fit
into the window. By default the stride is as long as the window, which is lm-evaluation-harness's
`loglikelihood_rolling` (github.com/EleutherAI/lm-evaluation-harness). A shorter stride gives every token
more context and costs more. EOS is not predicted. In a token store with a loss mask only the trained tokens
count: the answers and the tokens that end them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lumi.config import UserError
from lumi.corpus.raw_records import read_records
from lumi.corpus.sources import Location, describe
from lumi.data.token_store import Split
from lumi.evaluation import wikitext
from lumi.evaluation.likelihood import log_probabilities_of
from lumi.evaluation.records import text_field, tightest
from lumi.host.progress import progress_bar
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

_GROUP_PASSES = 16  # the windows of about 16 passes are sorted by length together


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text to measure.

    `format`: "plain" takes each record as a document, "wikitext" splits WikiText into its pages (see
    `lumi.evaluation.wikitext`). `limit` takes only the first documents.
    """

    # The name in the results.
    name: str
    source: Location
    # The field of a record that holds its text.
    text_field: str = "text"
    format: Literal["plain", "wikitext"] = "plain"
    # Only the first so many documents; null: all.
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.text_field:
            raise ValueError('name and text_field must be names, got ""')
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How many tokens a window reads (None: the model's positions) and moves on by (None: a whole window)."""

    # Tokens that one pass reads; null: as many as the model has positions.
    window_tokens: int | None = None
    # Tokens by which the window moves on; null: the whole window.
    stride_tokens: int | None = None

    def __post_init__(self) -> None:
        window, stride = self.window_tokens, self.stride_tokens
        for name, value in (("window_tokens", window), ("stride_tokens", stride)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if window is not None and stride is not None and stride > window:
            raise ValueError(f"stride_tokens must be at most window_tokens = {window}, got {stride}")

    def resolve(self, max_positions: int) -> tuple[int, int]:
        """Window and stride for a model. Raises UserError where they do not fit its positions."""
        window = self.window_tokens or max_positions
        if window > max_positions:
            expectation = f"must be at most the model's {max_positions} positions"
            raise UserError("windows.window_tokens", expectation, got=window)
        stride = self.stride_tokens or window
        if stride > window:
            expectation = f"must be at most the window, here the model's {window} positions"
            raise UserError("windows.stride_tokens", expectation, got=stride)
        return window, stride


class ScoredDocument(NamedTuple):
    """`tokens` (T,) int64, BOS first; `scored` (T,) bool, which of them count, never the first.

    `words`, `bytes`: of the text that the scored tokens stand for.
    """

    tokens: np.ndarray
    scored: np.ndarray
    words: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """exp of the nats per token, word and byte; None if there are no such units or a float cannot hold it."""

    token_perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None
    nats: float
    documents: int
    tokens: int
    words: int
    bytes: int
    window_tokens: int
    stride_tokens: int


def text_documents(
    config: TextConfig, tokenizer: Tokenizer, limit: int | None = None
) -> list[ScoredDocument]:
    """The documents of a text, without empty ones.

    Args:
        config: the text.
        tokenizer: of the model.
        limit: how many at most, besides the config's own limit.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    most = tightest(config.limit, limit)
    place = f"text {config.name!r}: {describe(config.source)}"
    records = read_records(config.source, most if config.format == "plain" else None)
    originals = [
        text_field(record, config.text_field, f"{place}, record {number}")
        for number, record in enumerate(records, start=1)
    ]
    texts = originals
    if config.format == "wikitext":
        originals = wikitext.pages(originals)[:most]
        texts = [wikitext.detokenize(page) for page in originals]
    documents = []
    for original, text in zip(originals, texts, strict=True):
        tokens = np.array([tokenizer.prefix_id, *tokenizer.encode(text)])
        if len(tokens) > 1:
            scored = np.arange(len(tokens)) > 0
            num_bytes = len(original.encode())
            documents.append(ScoredDocument(tokens, scored, count_words(original), num_bytes))
    if not documents:
        raise UserError(f"{place}:", "must hold text", got="none")
    return documents


def store_documents(split: Split, tokenizer: Tokenizer, limit: int | None = None) -> Iterator[ScoredDocument]:
    """At most `limit` documents of a split of a token store; words and bytes are of the decoded text."""
    for index in range(min(split.num_documents, limit or split.num_documents)):
        start, stop = int(split.offsets[index]), int(split.offsets[index + 1])
        tokens = split.tokens[start:stop].astype(np.int64)
        scored = tokens != tokenizer.eos_id if split.mask is None else split.loss_mask(start, stop)
        scored[0] = False
        places = np.flatnonzero(scored)
        if len(places) == 0:
            continue
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        texts = [tokenizer.decode(tokens[run].tolist(), continues=bool(run[0] > 1)) for run in runs]
        num_bytes = sum(len(text.encode()) for text in texts)
        yield ScoredDocument(tokens, scored, sum(map(count_words, texts)), num_bytes)


def count_words(text: str) -> int:
    """Words as the harness counts them: the pieces between white space, empty ones at the ends included."""
    return len(re.split(r"\s+", text))


@torch.inference_mode()
def perplexity(
    model: Transformer,
    documents: Iterable[ScoredDocument],
    config: WindowConfig,
    *,
    batch_tokens: int,
    name: str = "perplexity",
) -> PerplexityResult:
    """Measure a model on documents.

    Args:
        model: in evaluation mode.
        documents: with token ids that the model knows.
        config: of the windows.
        batch_tokens: how many tokens one pass holds, padding included; it decides speed and memory, not the
            result.
        name: of the progress line.

    Raises:
        UserError: the window does not fit the model, there is nothing to count, or the model's output is
            not finite.
    """
    window, stride = config.resolve(model.config.max_positions)
    nats, counts = 0.0, np.zeros(4, dtype=np.int64)
    with progress_bar(name, " tokens", unit_scale=True) as progress:
        for group in _groups(documents, window, stride, _GROUP_PASSES * batch_tokens):
            for batch in _batches([part for _, parts in group for part in parts], batch_tokens):
                nats -= _log_probability(model, batch)
                progress.update(sum(int(part.scored.sum()) for part in batch))
            counts += np.sum(
                [(1, int(document.scored.sum()), document.words, document.bytes) for document, _ in group],
                axis=0,
            )
    number, tokens, words, num_bytes = counts.tolist()
    if tokens == 0:
        raise UserError(f"{name}:", "must hold at least one token to count", got="none")
    return PerplexityResult(
        token_perplexity=_exp(nats, tokens),
        word_perplexity=_exp(nats, words),
        byte_perplexity=_exp(nats, num_bytes),
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        nats=nats,
        documents=number,
        tokens=tokens,
        words=words,
        bytes=num_bytes,
        window_tokens=window,
        stride_tokens=stride,
    )


class Window(NamedTuple):
    """The tokens that one window reads, the tokens that it predicts, and which of these count; (T,) each."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


def rolling_windows(document: ScoredDocument, window: int, stride: int) -> Iterator[Window]:
    """Windows that together count every scored token once."""
    last = len(document.tokens) - 1  # no window needs to read the last token
    done = 0
    while done < last:
        end = min(done + (stride if done else window), last)
        begin = max(0, end - window)
        scored = document.scored[begin + 1 : end + 1].copy()
        scored[: done - begin] = False
        if scored.any():
            yield Window(document.tokens[begin:end], document.tokens[begin + 1 : end + 1], scored)
        done = end


def _groups(
    documents: Iterable[ScoredDocument], window: int, stride: int, group_tokens: int
) -> Iterator[list[tuple[ScoredDocument, list[Window]]]]:
    """Documents with their windows, together about `group_tokens` tokens."""
    group: list[tuple[ScoredDocument, list[Window]]] = []
    size = 0
    for document in documents:
        parts = list(rolling_windows(document, window, stride))
        group.append((document, parts))
        size += sum(len(part.inputs) for part in parts)
        if size >= group_tokens:
            yield group
            group, size = [], 0
    if group:
        yield group


def _batches(windows: list[Window], batch_tokens: int) -> Iterator[Sequence[Window]]:
    windows.sort(key=lambda part: len(part.inputs), reverse=True)
    start = 0
    while start < len(windows):
        rows = max(1, batch_tokens // len(windows[start].inputs))
        yield windows[start : start + rows]
        start += rows


def _log_probability(model: Transformer, windows: Sequence[Window]) -> float:
    device = model.output_weight.device
    inputs_BT, targets_BT, scored_BT = (_pad(arrays).to(device) for arrays in zip(*windows, strict=True))
    hidden_BTD = model.hidden(inputs_BT)
    return float(log_probabilities_of(model, hidden_BTD[scored_BT], targets_BT[scored_BT]).sum())


def _pad(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return pad_sequence([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays], batch_first=True)


def _exp(nats: float, units: int) -> float | None:
    return math.exp(nats / units) if units and nats / units < 700 else None
