"""Which token sees which, computed once per batch and shared by all layers.

Documents are packed into rows without padding. A token sees itself and the tokens before it in its document,
at most `window` tokens in all (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150). So the keys that a
query sees are an interval, and the queries that see a key are one too. From one token to the next, neither
end ever falls. The reference turns the intervals into a mask; the kernels walk them.

Shape letters: B batch rows, T tokens per row, N = B*T tokens, C = ceil(N / ORDER_BLOCK) tiles of tokens.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

ORDER_BLOCK = 128  # tokens of a tile in the order of work; a kernel's own tile is a part of it


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """For `attention_reference`.

    `mask` (B, 1, T, T) is True where a query sees a key. None means plain causal rows: torch has a faster
    path for them.
    """

    batch: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class IntervalPlan:
    """For `attention`.

    Token t of the N = batch * length sees the keys from `first_key[t]` to t. The queries from t to
    `last_query[t]` see it. Both are (N,) int32. `query_order` and `key_order` (C,) int32 name tiles of
    ORDER_BLOCK tokens, the most work first, so that the multiprocessors finish together.
    """

    batch: int
    length: int
    first_key: Tensor
    last_query: Tensor
    query_order: Tensor
    key_order: Tensor


def attention_plan_reference(
    cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str, window: int | None = None
) -> MaskPlan:
    """Turn document boundaries into a mask.

    Args:
        cu_seqlens: (num_documents + 1,) int32 offsets into the flattened batch * length tokens, from 0 to
            batch * length, non-decreasing. Every row boundary is among them, so no document spans two rows.
            Equal neighbours are an empty document. None: each row is one document.
        batch: B, rows.
        length: T, tokens per row.
        device: where q, k and v will be.
        window: a token sees itself and the window - 1 tokens before it, at least 1; None: its document's
            whole past.

    Returns:
        the plan that `attention_reference` takes.

    Raises:
        ValueError: if cu_seqlens is not int32 of one dimension, does not run from 0 to batch * length without
            falling, or leaves out a row boundary; if window is below 1.
    """
    if cu_seqlens is None and (window is None or window >= length > 0):
        return MaskPlan(batch=batch, length=length, mask=None)
    start_N, _ = _documents(cu_seqlens, batch, length, device)
    position_T = torch.arange(length, device=device)
    first_BT1 = (
        _first_key(start_N, window).view(batch, length, 1)
        - length * torch.arange(batch, device=device)[:, None, None]
    )
    mask_BTT = (position_T >= first_BT1) & (position_T <= position_T[:, None])
    return MaskPlan(batch=batch, length=length, mask=mask_BTT[:, None])


def attention_plan(
    cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str, window: int | None = None
) -> IntervalPlan:
    """Turn document boundaries into intervals. Arguments as `attention_plan_reference`.

    Offsets that are on a GPU already are not read back to be checked: that would wait for it. Wrong ones
    there give wrong documents, but never a token of another row nor an access out of bounds.

    Returns:
        the plan that `attention` takes.

    Raises:
        ValueError: as `attention_plan_reference`; the offsets' values are checked on the CPU only.
    """
    start_N, end_N = _documents(cu_seqlens, batch, length, device)
    first_key_N, last_query_N = _first_key(start_N, window), end_N - 1
    if window is not None:
        last_query_N = torch.minimum(last_query_N, torch.arange(batch * length, device=device) + window - 1)
    tile_first_C = torch.arange(0, batch * length, ORDER_BLOCK, device=device)
    tile_last_C = (tile_first_C + ORDER_BLOCK - 1).clamp(max=batch * length - 1)
    keys_C, queries_C = tile_last_C - first_key_N[tile_first_C], last_query_N[tile_last_C] - tile_first_C
    orders = (work.argsort(descending=True, stable=True).to(torch.int32) for work in (keys_C, queries_C))
    query_order_C, key_order_C = orders
    return IntervalPlan(
        batch=batch,
        length=length,
        first_key=first_key_N.to(torch.int32),
        last_query=last_query_N.to(torch.int32),
        query_order=query_order_C,
        key_order=key_order_C,
    )


def _documents(
    cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Where the document of each of the N tokens begins and ends, int64."""
    token_N = torch.arange(batch * length, device=device)
    row_start_N = token_N // max(length, 1) * length
    if cu_seqlens is None:
        return row_start_N, row_start_N + length
    _check(cu_seqlens, batch, length)
    offsets = cu_seqlens.to(device=device, dtype=torch.int64)
    # A token's document is the number of documents that end at or before it. That skips empty ones by itself.
    document_N = torch.searchsorted(offsets[1:], token_N, right=True).clamp_(max=len(offsets) - 2)
    start_N, end_N = offsets[document_N], offsets[document_N + 1]
    # Unchecked offsets must not lead out of the row.
    start_N = torch.minimum(torch.maximum(start_N, row_start_N), token_N)
    return start_N, torch.maximum(torch.minimum(end_N, row_start_N + length), token_N + 1)


def _first_key(start_N: Tensor, window: int | None) -> Tensor:
    if window is None:
        return start_N
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return torch.maximum(start_N, torch.arange(len(start_N), device=start_N.device) - window + 1)


def _check(cu_seqlens: Tensor, batch: int, length: int) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must be int32 of shape (num_documents + 1,), "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        return  # reading them would wait for the device
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != batch * length or any(a > b for a, b in itertools.pairwise(offsets)):
        ends = f"{offsets[:3]} ... {offsets[-3:]}"
        raise ValueError(
            f"cu_seqlens must go from 0 to batch * length = {batch * length} without falling, got {ends}"
        )
    missing = set(range(0, batch * length, length)) - set(offsets) if length else set()
    if missing:
        raise ValueError(
            f"cu_seqlens must contain every row boundary (multiples of {length}), got none at {min(missing)}"
        )
