"""`lumi tokenize --executor`: the token store of `lumi.data.tokenization`, made by many tasks.

Two stages. `encode`: each shard of a corpus becomes a folder of arrays. `join`: one task writes them, in the
order of the shards, as the store that one process writes. Folders are whole or absent, so a task that was
killed does again only what is not there yet.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumi.chat.templates import TEMPLATES
from lumi.config import UserError, read_json, write_json
from lumi.corpus import CorpusReader
from lumi.corpus.scale.prepare import Executor
from lumi.corpus.scale.stages import Stage
from lumi.data.encoding import Documents, Encoded, encode_all
from lumi.data.store_manifest import Counts, StoreManifest, read_store_manifest
from lumi.data.tokenization import StorePlan, begin_store, held_out_settings, plan_store, write_store
from lumi.host.storage import atomic_folder, make_folder, remove_folder
from lumi.tokenizer.loading import load_tokenizer


class TokenizeWork:
    """What all tasks know of a run.

    Args:
        folder: beside the store; it holds the plan, the logs and the parts.
        output: the store.
        plan: what goes into it.
    """

    def __init__(self, folder: Path, output: Path, plan: StorePlan) -> None:
        self.folder, self.output, self.plan = folder, output, plan
        self.logs, self.parts = folder / "logs", folder / "parts"

    @property
    def shards(self) -> list[tuple[CorpusReader, int, bool]]:
        """(corpus, number of its shard, whether it is held out) in the order of the store."""
        plan = self.plan
        readers = [
            *((each, False) for each in plan.readers),
            *((each, True) for each in plan.validation_readers),
        ]
        return [(reader, number, held) for reader, held in readers for number in range(reader.num_shards)]

    def part(self, number: int) -> Path:
        """The folder of what stage `encode` makes of a shard."""
        return self.parts / f"{number:06d}"


def load_work(folder: str) -> TokenizeWork:
    """The run whose plan lies in `folder`. Raises UserError where the inputs have changed since."""
    call = read_json(Path(folder) / "plan.json")
    plan = _plan(call)
    if (now := _key(plan)) != call["key"]:
        expectation = "must have the tokenizer and the corpora that it was made for"
        raise UserError(f"{folder}:", expectation, got=f"others ({now})", remedy="run lumi tokenize again")
    return TokenizeWork(Path(folder), Path(call["output"]), plan)


def _plan(call: dict[str, Any]) -> StorePlan:
    return plan_store(
        call["corpus_dirs"],
        load_tokenizer(call["tokenizer_dir"]),
        validation_fraction=call["validation_fraction"],
        validation_corpus_dirs=call["validation_corpus_dirs"],
        template=TEMPLATES[call["template"]] if call["template"] else None,
        max_tokens=call["max_tokens"],
    )


def _key(plan: StorePlan) -> str:
    decisive = json.dumps([plan.settings.tokenizer.fingerprint, plan.inputs], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


def encode_shards(work: TokenizeWork, rank: int, num_tasks: int) -> None:
    """Encode every `num_tasks`-th shard, from `rank` on, unless that is done."""
    for number in range(rank, len(work.shards), num_tasks):
        if not work.part(number).exists():
            reader, shard, held_out = work.shards[number]
            settings = held_out_settings(work.plan.settings) if held_out else work.plan.settings
            documents = (Documents(*batch) for batch in reader.iter_documents_of(shard))
            with atomic_folder(work.part(number)) as folder:
                for index, encoded in enumerate(encode_all(documents, settings, 1)):
                    for split, part in encoded.items():
                        _save(folder / f"{index:06d}.{split}", part)


def join_parts(work: TokenizeWork, _rank: int, _num_tasks: int) -> None:
    """Write the store, and delete the parts."""
    write_store(work.output, _parts(work), work.plan)
    remove_folder(work.parts)


def _parts(work: TokenizeWork) -> Iterator[dict[str, Encoded]]:
    for number in range(len(work.shards)):
        for path in sorted(work.part(number).glob("*.json")):
            yield {path.stem.partition(".")[2]: _load(path.with_suffix(""))}


def _save(path: Path, encoded: Encoded) -> None:
    np.save(f"{path}.tokens.npy", encoded.tokens)
    np.save(f"{path}.lengths.npy", encoded.lengths)
    if encoded.mask is not None:
        np.save(f"{path}.mask.npy", encoded.mask)
    counts = {source: dataclasses.asdict(count) for source, count in encoded.counts.items()}
    rest = {"lowest_rank": encoded.lowest_rank, "dropped": encoded.dropped, "truncated": encoded.truncated}
    write_json(f"{path}.json", {"counts": counts, **rest})


def _load(path: Path) -> Encoded:
    rest = read_json(f"{path}.json")
    rest["counts"] = {source: Counts(**count) for source, count in rest["counts"].items()}
    mask = Path(f"{path}.mask.npy")
    return Encoded(
        tokens=np.load(f"{path}.tokens.npy"),
        lengths=np.load(f"{path}.lengths.npy"),
        mask=np.load(mask) if mask.exists() else None,
        **rest,
    )


STAGES = {
    "encode": Stage(encode_shards, lambda work: len(work.shards)),
    "join": Stage(join_parts, lambda _: 1),
}


def tokenize_in_tasks(
    corpus_dirs: Sequence[str | Path],
    tokenizer_dir: str | Path,
    output_dir: str | Path,
    executor: Executor,
    *,
    validation_fraction: float | None = None,
    validation_corpus_dirs: Sequence[str | Path] = (),
    template: str | None = None,
    max_tokens: int | None = None,
) -> StoreManifest | None:
    """Make a token store: the same bytes as `tokenize`, for any number of tasks.

    What an interrupted call left is gone on from, unless the corpora or the tokenizer are others now.

    Args:
        tokenizer_dir: a tokenizer's folder, which all tasks read.
        executor: where the tasks run.
        template: the name of one of Lumi's; the other arguments are as in `tokenize`.

    Returns:
        The manifest; None if the work was submitted to Slurm, whose last job makes the store.

    Raises:
        UserError: as `tokenize`; datatrove is not installed; sbatch refuses.
    """
    from lumi.corpus.scale import executors  # needs datatrove, and takes seconds

    output = Path(output_dir).absolute()
    call: dict[str, Any] = {
        "corpus_dirs": [str(Path(folder).absolute()) for folder in corpus_dirs],
        "tokenizer_dir": str(Path(tokenizer_dir).absolute()),
        "output": str(output),
        "validation_fraction": validation_fraction,
        "validation_corpus_dirs": [str(Path(folder).absolute()) for folder in validation_corpus_dirs],
        "template": template,
        "max_tokens": max_tokens,
    }
    plan = _plan(call)
    if (existing := begin_store(output, plan)) is not None:
        return existing
    prefix, key = f".{output.name}-tasks-", _key(plan)
    work = TokenizeWork(output.with_name(prefix + key), output, plan)
    for other in output.parent.glob(f"{prefix}*"):
        if other != work.folder:
            remove_folder(other)
    make_folder(work.folder)
    write_json(work.folder / "plan.json", call | {"key": key})
    if not executors.run_stages(work, STAGES, load_work, executor, output):
        return None
    remove_folder(work.folder)
    return read_store_manifest(output)
