"""What a finished run knows of itself, and what proves to belong to it: data and evaluations.

A folder of data is the run's only if its files have the hashes that the run recorded. A corpus is a store's
only if the store names the hash of its shards. An evaluation is the model's only if it names the model's
folder and is younger than the weights. Nothing is taken by its name.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint
from lumi.config import UserError, read_json
from lumi.corpus.folder import Manifest, is_corpus, read_corpus
from lumi.data.store_manifest import StoreManifest, is_token_store, read_store_manifest
from lumi.evaluation.evaluate import RESULTS_FILE
from lumi.formats.hub import name_of
from lumi.training.metrics import read_metrics
from lumi.training.run_folder import RunFolder
from lumi.training.run_status import read_status


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """One of the data folders that a run read.

    Attributes:
        weight: its share of the rows.
        store: None: no folder with its hashes was found.
        corpora: the manifests of the corpora that the store was made of; None for one that was not found.
    """

    weight: float
    store: StoreManifest | None = None
    corpora: Sequence[Manifest | None] = ()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A finished run.

    Attributes:
        config: its `config.json`.
        state: that of its newest checkpoint; None: it has none any more.
        metrics: the records of `metrics.jsonl`.
    """

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    data: Sequence[DataFolder] = field(default=())

    @property
    def identity(self) -> dict[str, Any]:
        """What decided weights and data, as the checkpoint's state has it."""
        return self.state["identity"] if self.state else {}

    @property
    def final_step(self) -> int | None:
        """The step whose weights `final/` holds; None: not known."""
        if self.state is None:
            return None
        best = self.state["best"]
        return best["step"] if self.config["final"] == "best" and best else self.state["step"]

    def validations(self) -> list[dict[str, Any]]:
        """The validations up to the final step, in order."""
        last = self.final_step
        found = [record for record in self.metrics if record["kind"] == "validation"]
        return [record for record in found if last is None or record["step"] <= last]


def run_of(path: Path) -> Path | None:
    """The run that a run folder, or its `final/`, belongs to; None: the folder is no run's."""
    for folder in (path, path.resolve().parent):
        run = RunFolder(folder)
        if run.config.is_file() and run.metrics.is_file() and run.final.is_dir():
            return folder if folder == path or run.final.resolve() == path.resolve() else None
    return None


def read_run(folder: Path) -> RunFacts:
    """Read a run. Raises UserError if it has not finished, or a file is damaged."""
    run, status = RunFolder(folder), read_status(folder)
    if status is not None and status["status"] != "finished":
        remedy = "go on with it by --resume-from-checkpoint auto"
        raise UserError(f"{folder}:", "must be a finished run", got=f"one {status['status']}", remedy=remedy)
    checkpoints = list_checkpoints(run.checkpoints)
    state = open_checkpoint(checkpoints[-1]).state if checkpoints else None
    return RunFacts(
        folder=folder, config=read_json(run.config), state=state, metrics=read_metrics(run.metrics)
    )


def find_data(run: RunFacts, given: Sequence[Path]) -> tuple[list[DataFolder], list[Path]]:
    """The data of a run, from folders that were given and folders beside the run; and which of them it is.

    Raises:
        UserError: a folder that was given is not the run's.
    """
    folders = [*given, *_beside(run.folder)]
    stores = dict(_stores(folders))
    corpora: dict[str, tuple[Path, Manifest]] = {}
    for folder in folders:
        with contextlib.suppress(UserError):
            if is_corpus(folder):
                reader = read_corpus(folder)
                corpora.setdefault(reader.fingerprint, (folder, reader.manifest))
    found, taken = [], []
    weights = run.identity.get("data_weights", [])
    for hashes, weight in zip(run.identity.get("data", []), weights, strict=True):
        place = next((place for place, store in stores.items() if _hashes(store) == hashes), None)
        if place is None:
            found.append(DataFolder(weight=weight))
            continue
        names = [value for key, value in stores[place].inputs.items() if key.startswith("corpus ")]
        made_of = [corpora.get(name) for name in names]
        taken += [place, *(each[0] for each in made_of if each)]
        manifests = [each and each[1] for each in made_of]
        found.append(DataFolder(weight=weight, store=stores[place], corpora=manifests))
    for folder in given:
        if not any(folder == place or folder in place.parents for place in taken):
            got = f"{folder}, whose hashes the run does not name"
            raise UserError("--data-dirs", f"must be data of {run.folder}", got=got, remedy="leave it out")
    return found, list(dict.fromkeys(taken))


def _stores(folders: Iterable[Path]) -> Iterator[tuple[Path, StoreManifest]]:
    """The token stores among folders, and those that corpora keep inside."""
    for folder in folders:
        for place in (folder, *sorted(folder.glob(".tokens/*"))):
            with contextlib.suppress(UserError):
                if is_token_store(place):
                    yield place, read_store_manifest(place)


def _hashes(store: StoreManifest) -> dict[str, str]:
    return {name: file.sha256 for name, file in store.splits["train"].files.items()}


def _beside(folder: Path) -> list[Path]:
    """The folders inside a folder, and beside it, that may be read."""
    found = []
    for parent in (folder, folder.resolve().parent):
        with contextlib.suppress(OSError):
            found += sorted(Path(entry.path) for entry in os.scandir(parent) if entry.is_dir())
    return found


def find_evaluations(folder: Path, given: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The results of evaluations of a model folder: of those that were given, and of those near it.

    Args:
        folder: of the model or adapter.

    Raises:
        UserError: one that was given is no evaluation, or one of another model or of older weights.
    """
    found = {}
    for place in given:
        results = _read_results(place)
        if fault := _foreign(results, folder):
            remedy = "evaluate this one, or leave it out"
            raise UserError("--evaluations", f"must be of {folder}", got=f"{place}, {fault}", remedy=remedy)
        found[place.resolve()] = (place, results)
    for place in _beside(folder) + _beside(folder.resolve().parent):
        if os.path.isfile(place / RESULTS_FILE):
            with contextlib.suppress(UserError):
                if not _foreign(results := _read_results(place), folder):
                    found.setdefault(place.resolve(), (place, results))
    return list(found.values())


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    results = read_json(path) if path.is_file() else None
    if not isinstance(results, dict) or not {"model", "adapter", "date", "tasks"} <= results.keys():
        remedy = "pass the --output-dir of `lumi evaluate`"
        expectation = f"must be a folder with {RESULTS_FILE}"
        raise UserError("--evaluations", expectation, got=folder, remedy=remedy)
    return results


def _foreign(results: dict[str, Any], folder: Path) -> str:
    """Why results are not of the weights in a folder; empty: they are."""
    measured = results["adapter"] or results["model"]
    if measured != name_of(folder.resolve()) and Path(measured).resolve() != folder.resolve():
        return f"which is of {measured}"
    written = max(path.stat().st_mtime for path in folder.glob("*.safetensors"))
    if datetime.fromisoformat(results["date"]).timestamp() < int(written):
        return "which is older than the weights"
    return ""
