"""The log-likelihood of continuations, by which multiple choice tasks are scored.

Texts become tokens as in lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness,
`_encode_pair`). White space at the end of the context moves to the continuation. Context + continuation is
encoded as one text, and the continuation's tokens are those after the context's. A token may reach over the
boundary, so that the whole does not begin with the context's tokens. The harness then loses a piece of the
continuation; here the two are encoded one after the other instead. BOS comes first. A text longer than the
model's positions is cut from the left, BOS included. The last token is predicted and never read.

A context is run once for all its continuations: its last position gives the first token of each, and the
rest of each is run on a copy of the context's keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lumi.config import UserError
from lumi.inference.generation import LayerCache, require_finite
from lumi.kernels.wide_float import wide_float
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

_LOGIT_ROWS = 512  # at once: with 32,768 ids that is 64 MiB


class ScoringRequest(NamedTuple):
    """Token ids of a context (at least one) and of the continuations to score after it (none empty)."""

    context: list[int]
    continuations: list[list[int]]

    def is_cut(self, max_positions: int) -> bool:
        """Whether the context loses tokens, because it does not fit before every continuation."""
        return len(self.context) + max(map(len, self.continuations)) - 1 > max_positions


class Scored(NamedTuple):
    """The log-likelihood of a continuation, in nats, and whether greedy decoding would give it."""

    nats: float
    is_greedy: bool


def encode_request(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> ScoringRequest:
    """Texts to tokens, as the module says. Raises UserError for a continuation of no tokens."""
    kept = context.rstrip()
    space = context[len(kept) :]
    context_ids = tokenizer.encode(kept)
    encoded = []
    for continuation in continuations:
        whole = tokenizer.encode(kept + space + continuation)
        joins = whole[: len(context_ids)] == context_ids
        ids = whole[len(context_ids) :] if joins else tokenizer.encode(space + continuation, "text")
        if not ids:
            got = f"{continuation!r} after {kept[-40:]!r}"
            raise UserError("a continuation", "must hold at least one token", got=got)
        encoded.append(ids)
    begin = tokenizer.begin_ids if context_ids else tokenizer.begin_ids or (tokenizer.prefix_id,)
    return ScoringRequest([*begin, *context_ids], encoded)


@torch.inference_mode()
def score(
    model: Transformer,
    requests: Sequence[ScoringRequest],
    *,
    batch_tokens: int,
    on_done: Callable[[int], object] | None = None,
) -> list[list[Scored]]:
    """How likely every continuation of every request is, in order.

    Args:
        model: in evaluation mode, on its device.
        requests: contexts with their continuations.
        batch_tokens: how many tokens one pass holds, padding included; it decides speed and memory, not the
            result.
        on_done: called with the number of continuations scored since the last call.

    Raises:
        UserError: a continuation is longer than the model's positions, or the model's output is not finite.
    """
    jobs = list(_jobs(requests, model.config.max_positions))
    # The largest first, so that a lack of memory shows early.
    jobs.sort(key=lambda job: (len(job.context), max(map(len, job.continuations))), reverse=True)
    results = [[Scored(0.0, True)] * len(request.continuations) for request in requests]
    for batch in _batches(jobs, batch_tokens):
        done = 0
        for job, scores in zip(batch, _score_batch(model, batch, batch_tokens), strict=True):
            for place, result in zip(job.places, scores, strict=True):
                results[job.request][place] = result
            done += len(scores)
        if on_done is not None:
            on_done(done)
    return results


class _Job(NamedTuple):
    """Continuations `places` of request number `request`, with the context cut to the model's positions."""

    context: list[int]
    continuations: list[list[int]]
    request: int
    places: list[int]


def _jobs(requests: Sequence[ScoringRequest], max_positions: int) -> Iterator[_Job]:
    for index, request in enumerate(requests):
        context, continuations = request
        longest = max(map(len, continuations))
        if longest > max_positions:
            expectation = f"must be at most as long as the model's {max_positions} positions"
            raise UserError("a continuation", expectation, got=f"{longest} tokens")
        if not request.is_cut(max_positions):
            yield _Job(context, continuations, index, list(range(len(continuations))))
        else:  # how much of the context stays depends on the continuation
            for place, continuation in enumerate(continuations):
                kept = context[-(max_positions + 1 - len(continuation)) :]
                yield _Job(kept, [continuation], index, [place])


def _batches(jobs: Sequence[_Job], batch_tokens: int) -> Iterator[list[_Job]]:
    start = 0
    while start < len(jobs):
        rows = max(1, batch_tokens // len(jobs[start].context))
        yield list(jobs[start : start + rows])
        start += rows


def _score_batch(model: Transformer, jobs: Sequence[_Job], batch_tokens: int) -> list[list[Scored]]:
    device = model.output_weight.device
    context_BT = _pad([job.context for job in jobs]).to(device)
    last_B = torch.tensor([len(job.context) - 1 for job in jobs], device=device)
    continuations = [ids for job in jobs for ids in job.continuations]
    row_C = torch.tensor([row for row, job in enumerate(jobs) for _ in job.continuations], device=device)
    # Sorted by length; a continuation of one token needs no second pass.
    longer = sorted(
        (index for index, ids in enumerate(continuations) if len(ids) > 1),
        key=lambda index: len(continuations[index]),
    )
    cache = None
    if longer:
        cache = [LayerCache(len(jobs), context_BT.shape[1], model, device) for _ in model.layers]
    hidden_BD = model.hidden(context_BT, cache=cache)[torch.arange(len(jobs), device=device), last_B]
    first_C = torch.tensor([ids[0] for ids in continuations]).to(device)
    nats_C, is_greedy_C = _token_scores(model.logits(hidden_BD), first_C, row_C)
    found = list(map(Scored, nats_C.tolist(), is_greedy_C.tolist()))
    while longer:
        assert cache is not None
        # The last is the longest: take as many as fit with its length.
        count = max(1, batch_tokens // (context_BT.shape[1] + len(continuations[longer[-1]])))
        chosen, longer = longer[-count:], longer[:-count]
        rows = row_C[chosen]
        rest = _score_rest(model, cache, rows, last_B[rows] + 1, [continuations[index] for index in chosen])
        for index, (nats, is_greedy) in zip(chosen, rest, strict=True):
            found[index] = Scored(found[index].nats + nats, found[index].is_greedy and is_greedy)
    scores = iter(found)
    return [[next(scores) for _ in job.continuations] for job in jobs]


def _score_rest(
    model: Transformer,
    cache: Sequence[LayerCache],
    row_C: Tensor,
    start_C: Tensor,
    continuations: Sequence[list[int]],
) -> list[Scored]:
    """Scores of continuations without their first tokens.

    Continuation number c begins at position `start_C[c]` of row `row_C[c]` of the cache.
    """
    device = row_C.device
    inputs_CT = _pad([ids[:-1] for ids in continuations]).to(device)
    targets_CT = _pad([ids[1:] for ids in continuations]).to(device)
    length = inputs_CT.shape[1]
    positions_CT = start_C[:, None] + torch.arange(length, device=device)
    capacity = cache[0].k_BSGK.shape[1] + length
    hidden_CTD = model.hidden(
        inputs_CT, positions_CT, cache=[_copy(layer, row_C, capacity, model) for layer in cache]
    )
    lengths = [len(ids) - 1 for ids in continuations]
    is_real_CT = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
    parts = _logits_in_parts(model, hidden_CTD[is_real_CT], targets_CT[is_real_CT])
    nats, is_greedy = zip(*(_token_scores(*part) for part in parts), strict=True)
    nats_C, is_greedy_C = (torch.cat(column).cpu().split(lengths) for column in (nats, is_greedy))
    return [Scored(float(n.sum()), bool(g.all())) for n, g in zip(nats_C, is_greedy_C, strict=True)]


def _copy(layer: LayerCache, row_C: Tensor, capacity: int, model: Transformer) -> LayerCache:
    """The keys and values of some rows, with room for more tokens."""
    copy = LayerCache(len(row_C), capacity, model, row_C.device)
    length = layer.k_BSGK.shape[1]
    copy.k_BSGK[:, :length], copy.v_BSGK[:, :length] = layer.k_BSGK[row_C], layer.v_BSGK[row_C]
    return copy


def log_probabilities_of(model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probabilities (N,) float64 of tokens after hidden states.

    Raises:
        UserError: the model's output is not finite.
    """
    return torch.cat(
        [token_log_probabilities(*part) for part in _logits_in_parts(model, hidden_ND, targets_N)]
    )


def _logits_in_parts(
    model: Transformer, hidden_ND: Tensor, targets_N: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    for hidden, targets in zip(hidden_ND.split(_LOGIT_ROWS), targets_N.split(_LOGIT_ROWS), strict=True):
        yield model.logits(hidden), targets


def _token_scores(logits_NV: Tensor, targets_N: Tensor, row_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and whether a target is the likeliest id; arguments of `token_log_probabilities`."""
    best_N = logits_NV.argmax(dim=-1)
    is_greedy_N = (best_N if row_N is None else best_N[row_N]) == targets_N
    return token_log_probabilities(logits_NV, targets_N, row_N), is_greedy_N


def token_log_probabilities(logits_NV: Tensor, targets_N: Tensor, row_N: Tensor | None = None) -> Tensor:
    """As `log_probabilities_of`, from float32 logits (rows, V); target n belongs to row `row_N[n]` or n."""
    row_N = torch.arange(len(targets_N), device=targets_N.device) if row_N is None else row_N
    log_probabilities_N = logits_NV[row_N, targets_N] - logits_NV.logsumexp(dim=-1)[row_N]
    log_probabilities_N = log_probabilities_N.to(wide_float(logits_NV.device))
    require_finite(log_probabilities_N)
    return log_probabilities_N


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
