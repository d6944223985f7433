"""Keys and values of many sequences in pages, for batches whose sequences bring different numbers of tokens.

Shape letters: N new tokens of all sequences, B sequences that bring T tokens each, P pages, S slots of a
page, H query heads, G kv heads, K head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumi.inference.pages import PAGE_SIZE
from lumi.kernels.bundle import DecodeAttention
from lumi.model.model_config import ModelConfig
from lumi.model.transformer import Transformer


class NewTokens(NamedTuple):
    """What a sequence brings to a step: tokens from position `start` on, and the pages that it holds."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]


class _Block(NamedTuple):
    """Neighbouring tokens of a batch: B sequences with T tokens each."""

    batch: int
    length: int
    page_table: Tensor  # (B, pages) int32


class PagedCache:
    """The cache of all layers.

    Args:
        num_pages: P; `lumi.inference.pages.Pages` says which sequence holds which.
    """

    def __init__(self, model: Transformer, num_pages: int):
        self.model, self.device = model, model.output_weight.device
        shape = num_pages, PAGE_SIZE, model.config.num_kv_heads, model.config.head_dim
        # Written once, so that the system hands out all of the memory now and not in the middle of an answer.
        zeros = lambda: torch.empty(shape, dtype=model.compute_dtype, device=self.device).zero_()
        self.layers = [_PagedLayer(self, zeros(), zeros()) for _ in model.layers]
        self.blocks: list[_Block] = []
        self.slots_N = torch.empty(0, dtype=torch.int64)

    def hidden(self, batch: Sequence[NewTokens]) -> Tensor:
        """Store the new tokens of some sequences, and return their hidden states (N, D) in the same order.

        Args:
            batch: sequences that bring one token first: attention takes these together.
        """
        single = sum(len(new.ids) == 1 for new in batch)
        tables = [torch.tensor(new.pages, dtype=torch.int32) for new in batch]
        parts = [tables[:single], *([table] for table in tables[single:])]
        lengths = [1, *(len(new.ids) for new in batch[single:])]
        self.blocks = [
            _Block(len(part), length, torch.nn.utils.rnn.pad_sequence(part, True).to(self.device))
            for part, length in zip(parts, lengths, strict=True)
            if part
        ]
        positions = [torch.arange(new.start, new.start + len(new.ids)) for new in batch]
        slots = [
            table[where // PAGE_SIZE].long() * PAGE_SIZE + where % PAGE_SIZE
            for table, where in zip(tables, positions, strict=True)
        ]
        self.slots_N = torch.cat(slots).to(self.device)
        tokens = torch.tensor([token for new in batch for token in new.ids], device=self.device)
        positions_1N = torch.cat(positions)[None].to(self.device)
        return self.model.hidden(tokens[None], positions_1N, cache=self.layers)[0]


class _PagedLayer:
    """Keys and values (P, S, G, K) of one layer."""

    def __init__(self, cache: PagedCache, k_PSGK: Tensor, v_PSGK: Tensor):
        self.cache, self.k_PSGK, self.v_PSGK = cache, k_PSGK, v_PSGK

    def attend(
        self,
        attention: DecodeAttention,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        positions_BT: Tensor,
        window: int | None,
    ) -> Tensor:
        """As `lumi.model.transformer.LayerCache`, on a single row of all N tokens."""
        for cache, new in ((self.k_PSGK, k_BTGK), (self.v_PSGK, v_BTGK)):
            cache.flatten(0, 1).index_copy_(0, self.cache.slots_N, new[0])
        found, start = [], 0
        for block in self.cache.blocks:
            end = start + block.batch * block.length
            q, positions = (
                t[0, start:end].unflatten(0, (block.batch, block.length)) for t in (q_BTHK, positions_BT)
            )
            y = attention(q, self.k_PSGK, self.v_PSGK, positions, block.page_table, window)
            found.append(y.flatten(0, 1))
            start = end
        return torch.cat(found)[None]


def bytes_per_token(shape: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the cache holds for each token."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
