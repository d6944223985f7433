"""Text from a model: a KV cache, sampling, batched decoding, and a stream of whole characters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lumi.config import UserError
from lumi.kernels.bundle import DecodeAttention
from lumi.kernels.wide_float import wide_float
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.8  # 0: greedy
    top_k: int = 0  # choose among the k likeliest tokens; 0: among all
    # Choose among the likeliest tokens that together have this probability (Holtzman et al. 2020,
    # arXiv:1904.09751).
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # of tokens that are there already (Keskar et al. 2019, arXiv:1909.05858)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError("max_new_tokens", "must be at least 1", got=self.max_new_tokens)
        if (
            self.temperature != 0 and not 1e-4 <= self.temperature < math.inf
        ):  # less would overflow the logits
            raise UserError("temperature", "must be 0 (greedy) or at least 0.0001", got=self.temperature)
        if self.top_k < 0:
            raise UserError("top_k", "must be at least 0 (0 is off)", got=self.top_k)
        if not 1e-6 <= self.top_p <= 1:
            raise UserError("top_p", "must be between 0.000001 and 1 (off)", got=self.top_p)
        if not 0 <= self.seed < 2**63:
            raise UserError("seed", "must be between 0 and 2**63 - 1", got=self.seed)
        if not 0.01 <= self.repetition_penalty <= 100:
            expectation = "must be between 0.01 and 100 (1 is off)"
            raise UserError("repetition_penalty", expectation, got=self.repetition_penalty)


class LayerCache:
    """Keys and values of one layer, each at its position in a tensor of fixed size."""

    def __init__(self, batch: int, length: int, model: Transformer, device: torch.device):
        shape = (batch, length, model.config.num_kv_heads, model.config.head_dim)
        self.k_BSGK = torch.zeros(shape, dtype=model.compute_dtype, device=device)
        self.v_BSGK = torch.zeros_like(self.k_BSGK)
        self.first_slot_B1 = length * torch.arange(batch, device=device)[:, None]

    def attend(
        self,
        attention: DecodeAttention,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        positions_BT: Tensor,
        window: int | None,
    ) -> Tensor:
        """As `lumi.model.transformer.LayerCache`. New tokens overwrite the padding of short prompts."""
        slot_N = (self.first_slot_B1 + positions_BT).flatten()
        for cache_BSGK, new_BTGK in ((self.k_BSGK, k_BTGK), (self.v_BSGK, v_BTGK)):
            cache_BSGK.flatten(0, 1).index_copy_(0, slot_N, new_BTGK.flatten(0, 1))
        return attention(q_BTHK, self.k_BSGK, self.v_BSGK, positions_BT, None, window)

    def keep(self, kept: "Kept") -> None:
        """Drop the rows of sequences that have ended."""
        self.k_BSGK, self.v_BSGK = kept.of(self.k_BSGK), kept.of(self.v_BSGK)
        self.first_slot_B1 = self.first_slot_B1[: kept.count]


class Kept:
    """The rows of a batch that go on. They move to its front: each takes the place of one that has ended."""

    def __init__(self, goes_on: Sequence[bool]):
        self.count = sum(goes_on)
        self.sources = [row for row in range(self.count, len(goes_on)) if goes_on[row]]
        self.targets = [row for row in range(self.count) if not goes_on[row]]

    def of(self, t: Tensor) -> Tensor:
        """A view of the first rows, after the move."""
        if self.targets:
            t[self.targets] = t[self.sources]
        return t[: self.count]


class Completion(NamedTuple):
    """The new tokens of one row."""

    ids: list[int]
    stopped: bool  # by a stop token, not by the limit of tokens or positions


@torch.inference_mode()
def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    stop_ids: frozenset[int],
    pad_id: int,
    vocab_size: int | None = None,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Continue every prompt until a stop token, `max_new_tokens`, or the model's `max_positions`.

    Args:
        prompts: token ids, at least one each. Their lengths may differ.
        stop_ids: they end a row and are not returned.
        pad_id: fills up short prompts; its value changes nothing.
        vocab_size: the tokenizer's. Ids from here on are never chosen: a model's vocabulary may be padded.
        use_cache: False computes every step from the start, which is slow. Tests compare the cache with it.
        on_token: called with (row, token) for each new token.

    Returns:
        A completion for each row. It depends on the seed and the row's number, not on the other rows.

    Raises:
        UserError: a prompt is empty or as long as the model's positions, or the model's output is not finite.
    """
    check_prompts(prompts, model.config.max_positions)
    device = model.output_weight.device
    capacity = min(max(map(len, prompts)) + config.max_new_tokens, model.config.max_positions)
    tokens_BS = _padded(prompts, capacity, pad_id).to(device)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    draws_BN = None if config.temperature == 0 else _draws(len(prompts), config, device)
    cache = [LayerCache(len(prompts), capacity, model, device) for _ in model.layers] if use_cache else None

    outputs: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    running_B = torch.arange(len(prompts))  # the prompts' numbers
    for new in range(config.max_new_tokens):
        hidden_BD = _last_hidden(model, tokens_BS, length_B, cache, is_first=new == 0)
        draw_B = None if draws_BN is None else draws_BN[:, new]
        next_B = sample(model.logits(hidden_BD)[:, :vocab_size], tokens_BS, length_B, config, draw_B)
        goes_on = []
        for row, token in zip(running_B.tolist(), next_B.tolist(), strict=True):
            stopped[row] = token in stop_ids
            if not stopped[row]:
                outputs[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            count = len(outputs[row])
            has_room = len(prompts[row]) + count < capacity and count < config.max_new_tokens
            goes_on.append(has_room and not stopped[row])
        if not all(goes_on):
            kept = Kept(goes_on)
            if not kept.count:
                break
            running_B, next_B, tokens_BS, length_B = map(kept.of, (running_B, next_B, tokens_BS, length_B))
            draws_BN = None if draws_BN is None else kept.of(draws_BN)
            for layer in cache or ():
                layer.keep(kept)
        tokens_BS[torch.arange(len(next_B), device=device), length_B] = next_B
        length_B += 1
    return [Completion(ids, stop) for ids, stop in zip(outputs, stopped, strict=True)]


def _draws(num_rows: int, config: SamplingConfig, device: torch.device) -> Tensor:
    """(rows, max_new_tokens) of `wide_float`: each row's `draws`, of its own seed."""
    drawn = [draws(config.seed + row, config.max_new_tokens) for row in range(num_rows)]
    return torch.stack(drawn).to(device, wide_float(device))


def draws(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), one for each new token of a row.

    They are drawn on the CPU, so that a seed gives the same sample on every device.
    """
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _last_hidden(
    model: Transformer,
    tokens_BS: Tensor,
    length_B: Tensor,
    cache: Sequence[LayerCache] | None,
    is_first: bool,
) -> Tensor:
    """(B, D), of each row's last token. Only the first call of a cache computes the tokens before it."""
    row_B, last_B = torch.arange(len(length_B), device=length_B.device), length_B - 1
    if cache is None or is_first:
        block = tokens_BS[:, : int(length_B.max())]
        return model.hidden(block, _positions(block), cache=cache)[row_B, last_B]
    return model.hidden(tokens_BS[row_B, last_B][:, None], last_B[:, None], cache=cache)[:, 0]


def check_prompts(prompts: Sequence[Sequence[int]], max_positions: int) -> None:
    """Raises UserError without a prompt, for an empty one, and for one as long as the model's positions."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UserError("a prompt", "must hold at least one token", got="an empty one")
    if max(lengths) >= max_positions:
        expectation = f"must be shorter than the model's {max_positions} positions"
        raise UserError("a prompt", expectation, got=f"{max(lengths)} tokens")


def require_finite(values: Tensor) -> None:
    """Raises UserError where a model's output has NaN or infinity."""
    if values.numel() and not all(end.isfinite() for end in values.aminmax()):  # NaN is at both ends
        got = "NaN or infinity: its weights are broken, or --dtype is too narrow for them"
        raise UserError("the model's output", "must be finite", got=got)


def _padded(prompts: Sequence[Sequence[int]], length: int, pad_id: int) -> Tensor:
    tokens = torch.full((len(prompts), length), pad_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    return tokens


def _positions(block: Tensor) -> Tensor:
    return torch.arange(block.shape[1], device=block.device).expand(block.shape)


def sample(
    logits: Tensor, tokens: Tensor, lengths: Tensor, config: SamplingConfig, draws: Tensor | None
) -> Tensor:
    """Choose a token per row.

    Args:
        logits: (B, V) float32.
        tokens: (B, S) int64. The repetition penalty looks at the first `lengths[b]` of row b.
        lengths: (B,) int64.
        draws: (B,) of `wide_float`, uniform in [0, 1). The chosen token is the first whose cumulative
            probability is above. A temperature of 0 does not look at them.

    Returns:
        (B,) int64.

    Raises:
        UserError: the logits are not finite.
    """
    require_finite(logits)
    if config.repetition_penalty != 1.0:
        seen = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        mentioned = torch.zeros_like(logits, dtype=torch.int64).scatter_add_(1, tokens, seen.long()) > 0
        penalty = config.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(mentioned, penalised, logits)
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    assert draws is not None
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], float("-inf"))
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # The token that crosses the line stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= config.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    cumulative_BV = logits.softmax(dim=-1).to(draws.dtype).cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # Below the total, whatever is rounded: a token without probability must not be chosen.
    line_B1 = torch.minimum(draws[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, line_B1, right=True)[:, 0]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt for continuing a text: it is the beginning of a document."""
    return [*tokenizer.begin_ids, *tokenizer.encode(text)] or [tokenizer.prefix_id]


def filler_id(tokenizer: Tokenizer) -> int:
    """The token that fills up short prompts: <pad>, or EOS where an imported tokenizer has none."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continue texts, each to the end of a document. Raises UserError as `generate_ids`.

    Args:
        on_text: called with (row, piece of text) for each new piece, in whole characters.

    Returns:
        The continuations, without the prompts.
    """
    decoders = [StreamDecoder(tokenizer) for _ in prompts]

    def on_token(row: int, token: int) -> None:
        if on_text is not None and (text := decoders[row].feed(token)):
            on_text(row, text)

    outputs = generate_ids(
        model,
        [text_ids(tokenizer, prompt) for prompt in prompts],
        config,
        stop_ids=frozenset(tokenizer.eos_ids),
        pad_id=filler_id(tokenizer),
        vocab_size=tokenizer.vocab_size,
        on_token=on_token,
    )
    for row, decoder in enumerate(decoders):
        if on_text is not None and (text := decoder.flush()):
            on_text(row, text)
    return [tokenizer.decode(output.ids, continues=True) for output in outputs]
