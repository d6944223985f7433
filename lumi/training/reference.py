"""The log-probabilities of all answers under the model that a run begins with, computed once.

They stand in the run's folder, so that a run that goes on has them. A file's name holds what decides them and
the hash of its bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumi.data.batches import BatchConfig
from lumi.data.token_store import Split
from lumi.evaluation import evaluating, held_out_batches
from lumi.host.interruption import Interrupted
from lumi.host.progress import progress_bar
from lumi.host.storage import sha256_file
from lumi.host.tensor_files import load_tensors, save_tensors
from lumi.kernels.wide_float import wide_float
from lumi.model.transformer import Transformer
from lumi.parallel.sharding import reshard
from lumi.parallel.world import World
from lumi.training.dpo import answer_log_probabilities


def reference_log_probabilities(
    model: Transformer,
    splits: Sequence[Split],
    config: BatchConfig,
    world: World,
    folder: Path,
    identity: Any,
    say: Callable[[str], None],
) -> list[Tensor]:
    """For each split of pairs, (documents,) float64 on this process's device: the answers' log-probabilities.

    A pair that no row holds has 0. All processes call this together.

    Args:
        model: as the run begins: with the weights that it starts from, and adapters that change nothing yet.
        folder: of the run, for the file.
        identity: all that decides the numbers, as JSON values.
        say: is told of what is done.

    Raises:
        Interrupted: a signal came, to any process.
        UserError: a process cannot read its data, or the file cannot be written; as `World.fail_together`.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    found: dict[str, Tensor] | None = None
    with world.fail_together():
        if world.is_main:
            found = _load(folder, key)
    found = world.gather(found)[0]
    if found is None:
        num_pairs = sum(split.num_documents for split in splits) // 2
        say(f"reference: the log-probabilities of {num_pairs:,} pairs are computed, once for this run")
        found = {str(index): _compute(model, split, config, world) for index, split in enumerate(splits)}
        with world.fail_together():
            if world.is_main:
                _save(folder, key, found)
    return [found[str(index)].to(world.device, wide_float(world.device)) for index in range(len(splits))]


@torch.no_grad()
def _compute(model: Transformer, split: Split, config: BatchConfig, world: World) -> Tensor:
    found = torch.zeros(split.num_documents, dtype=torch.float64)

    def stopping() -> bool:
        return world.sum(world.stop.received)[0] > 0

    with evaluating(model), progress_bar("reference", " batches", disable=not world.is_main) as bar:
        for batch in held_out_batches(split, config, world, None, stopping):
            if batch is None:
                raise Interrupted(max(world.gather(world.stop.received)))
            assert batch.pairs is not None
            losses_BT = model(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, 1.0, True)
            found[batch.pairs.documents.cpu()] = answer_log_probabilities(losses_BT, batch).cpu().double()
            bar.update()
    reshard(model)
    # Each answer was computed by one group of processes, all of which know it.
    return torch.tensor(world.sum(*found.tolist()), dtype=torch.float64) / world.layout.tensor


def _load(folder: Path, key: str) -> dict[str, Tensor] | None:
    """What a file of this key holds; None if there is none, or its bytes have changed."""
    for path in folder.glob(f"reference-{key}-*.safetensors"):
        if sha256_file(path)[:16] == path.stem.rpartition("-")[2]:
            return load_tensors(path)
    return None


def _save(folder: Path, key: str, tensors: dict[str, Tensor]) -> None:
    temporary = folder / "reference.tmp"
    digest = save_tensors(temporary, tensors)["sha256"]
    os.replace(temporary, folder / f"reference-{key}-{digest[:16]}.safetensors")
