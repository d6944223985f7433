"""What a model's card tells of its training and its evaluations, found by the records of `lumi verify`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint
from lumi.config import UserError, read_json
from lumi.corpus.folder import Manifest, read_corpus
from lumi.data.store_manifest import STORE, StoreManifest, read_store_manifest
from lumi.evaluation.evaluate import RESULTS_FILE
from lumi.provenance.chain import Link, examine
from lumi.provenance.tree import shown
from lumi.training.metrics import read_metrics
from lumi.training.run_folder import RunFolder
from lumi.training.run_status import read_status

WEIGHTS = ("adapter", "model", "checkpoint")  # kinds; of a merged model's parents the adapter is the first


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """One of the data folders that a run read.

    Attributes:
        weight: its share of the rows; None: not known.
        store: None: it was not found.
        corpora: the manifests of the corpora that the store was made of; None for one that was not found.
    """

    weight: float | None
    store: StoreManifest | None = None
    corpora: Sequence[Manifest | None] = ()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The run that trained a model.

    Attributes:
        config: its `config.json`.
        metrics: the records of `metrics.jsonl`.
        step: whose weights these are; None: no checkpoint is there any more that tells it.
        is_recorded: whether start and data are.
        start: the model that it began with; None: there was none, or it is not recorded.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    step: int | None
    is_recorded: bool
    start: Link | None = None
    data: Sequence[DataFolder] = ()

    @property
    def from_random(self) -> bool:
        """Whether it is known to have begun with random weights."""
        return self.is_recorded and self.start is None

    def validations(self) -> list[dict[str, Any]]:
        """The validations up to the step of the weights, in order."""
        found = [record for record in self.metrics if record["kind"] == "validation"]
        return [record for record in found if self.step is None or record["step"] <= self.step]


def find_runs(model: Link) -> list[RunFacts]:
    """The runs that a model's weights went through, the last one first, as far as they are known.

    Raises:
        UserError: as `find_run` of the last one. An earlier one that cannot be told of is named and left out.
    """
    last = find_run(model)
    runs = [] if last is None else [last]
    while runs and (start := runs[-1].start) is not None:
        try:
            earlier = find_run(start, model)
        except UserError as error:
            print(f"not in the card: the run of {shown(start.path)}: {error}")
            break
        if earlier is None:
            break
        runs.append(earlier)
    return runs


def find_run(model: Link, chain: Link | None = None) -> RunFacts | None:
    """The run that trained a model, or what it was exported or merged from; None: it is not known.

    Args:
        chain: what the model is behind, if it is not the first.

    Raises:
        UserError: that run has not finished, or a file of it is damaged.
    """
    made = model
    while (folder := _run_of(made)) is None:
        before = [parent for parent in made.parents if parent.kind in WEIGHTS]
        if not before:
            return None
        made = before[0]
    run, of_checkpoint = RunFolder(folder), made.kind == "checkpoint"
    config, state = read_json(run.config), _state(made.path if of_checkpoint else None, run)
    best = state.get("best") if config["final"] == "best" and not of_checkpoint else None
    return RunFacts(
        folder=folder,
        config=config,
        metrics=read_metrics(run.metrics),
        step=(best or state).get("step"),
        is_recorded=made.verdict == "ok",
        start=next((parent for parent in made.parents if parent.kind in WEIGHTS), None),
        data=_data(made, state, chain or model),
    )


def _run_of(made: Link) -> Path | None:
    """The run whose `final/` or checkpoint it is; None: it is no run's, or not what it was."""
    path = made.path.resolve()
    run = RunFolder(path.parent.parent if made.kind == "checkpoint" else path.parent)
    if made.is_fault or path not in (run.final, run.checkpoints / path.name):
        return None
    return run.path if run.config.is_file() and run.metrics.is_file() else None


def _state(checkpoint: Path | None, run: RunFolder) -> dict[str, Any]:
    """That of a checkpoint, or of the newest one of a finished run; empty where that has none any more."""
    if checkpoint is not None:
        return open_checkpoint(checkpoint).state
    status = read_status(run.path)
    if status is not None and status["status"] != "finished":
        remedy = "go on with it by --resume-from-checkpoint auto"
        raise UserError(
            f"{run.path}:", "must be a finished run", got=f"one {status['status']}", remedy=remedy
        )
    return next((open_checkpoint(path).state for path in reversed(list_checkpoints(run.checkpoints))), {})


def _data(made: Link, state: dict[str, Any], chain: Link) -> list[DataFolder]:
    """What a run read, as far as it is there: its stores, where they are recorded, in the order of their
    weights."""
    whole = {(link.kind, link.path.resolve(), link.verdict): link for link in chain.all()}
    links = (whole.get((link.kind, link.path.resolve(), link.verdict), link) for link in made.parents)
    stores = [link for link in links if link.kind == STORE]
    weights = state["identity"]["data_weights"] if state else [None] * len(stores)
    found = []
    for store, weight in zip(stores, weights, strict=False):
        corpora = [each for each in store.parents if each.kind == "corpus"]
        manifests = [None if each.is_fault else read_corpus(each.path).manifest for each in corpora]
        manifest = None if store.is_fault else read_store_manifest(store.path)
        found.append(DataFolder(weight=weight, store=manifest, corpora=manifests))
    return found


def find_evaluations(model: Link, given: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The results of the evaluations of a model: of those that were given, and of those near it.

    Raises:
        UserError: one that was given is none, has been changed, or is of other weights.
    """
    path = model.path.resolve()
    near = [
        file.parent for top in (path, *path.parents[:2]) for file in sorted(top.glob(f"*/{RESULTS_FILE}"))
    ]
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for place in [*given, *near]:
        if not (fault := _foreign(place, model)):
            found.setdefault(place.resolve(), (place, read_json(place / RESULTS_FILE)))
        elif place in given:
            expectation, remedy = f"must be of the weights in {model.path}", "evaluate these, or leave it out"
            raise UserError("--evaluations", expectation, got=f"{place}, which {fault}", remedy=remedy)
    return list(found.values())


def _foreign(place: Path, model: Link) -> str:
    """Why a folder is no evaluation of these weights; empty: it is one."""
    finding = examine("evaluation", place)
    if finding.verdict != "ok":
        return f"is {finding.verdict}{finding.detail and f' ({finding.detail})'}"
    is_of_these = any(parent.identity == model.identity for parent in finding.parents[:1])  # then its base
    return "" if is_of_these else "is of other weights"
