"""The sections of a model card that a run's own facts give: its training and its data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumi.corpus.counts import from_manifest
from lumi.corpus.evaluation_sets import names_against
from lumi.evaluation.report import markdown_table
from lumi.provenance.run_facts import DataFolder, RunFacts

NOT_KNOWN = "not known"
UNRECORDED = "the model was made before records were kept"
Rows = Sequence[tuple[str, str]]


def training_section(
    run: RunFacts, of_weights: Rows, *, is_adapter: bool = False, picture: bool = False
) -> Iterator[str]:
    """How a run trained a model, its curve and its validations.

    Args:
        of_weights: rows about the weights, and about those that training began with.
        picture: whether `loss.png` lies beside the card.
    """
    trained = "all parameters"
    if run.config["lora"] is not None:
        trained = "an adapter" if is_adapter else "an adapter, merged into its base"
    kind = f"{training_kind(run)} of {trained}"
    yield from markdown_table(("", ""), [("kind", kind), *_settings(run), *of_weights])
    if picture:
        yield from ("", "![Loss of training and validation by step](loss.png)")
    yield from ("", *_validation(run))


def _settings(run: RunFacts) -> Iterator[tuple[str, str]]:
    config, batches, step = run.config, run.config["batches"], run.step
    optimizer, batch_tokens = config["optimizer"], batches["batch_tokens"]
    schedule = f"{optimizer['schedule']['kind']} schedule, peak {optimizer['peak_lr']:g}"
    skipped = sum(bool(record.get("skipped")) for record in run.metrics if record["kind"] == "train")
    yield "steps", NOT_KNOWN if step is None else f"{step:,} of {config['num_steps']:,}"
    yield "tokens", NOT_KNOWN if step is None else f"{step * batch_tokens:,} in the batches of these steps"
    yield "tokens in a step", f"{batch_tokens:,} in rows of {batches['sequence_length']:,}"
    yield "optimizer", f"{optimizer['kind']}, {schedule}"
    yield "precision", f"{config['dtype']} compute, float32 master weights"
    yield "seed", str(config["seed"])
    yield "steps that were skipped", f"{skipped:,}"
    if run.from_random:
        yield "began with", "random weights"


def training_kind(run: RunFacts) -> str:
    """What kind of training a run was."""
    if run.config["dpo"] is not None:
        return "direct preference optimization"
    if any(folder.store is not None and folder.store.template for folder in run.data):
        return "fine-tuning"
    return "pre-training" if run.from_random else "training"


def headed(runs: Sequence[RunFacts], bodies: Iterable[Iterable[str]]) -> Iterator[str]:
    """What there is to say of each run, the last one first; several runs each have a heading."""
    for number, (run, body) in enumerate(zip(runs, bodies, strict=True)):
        if len(runs) > 1:
            yield from [""] * (number > 0)
            yield from (f"### {'Before it' if number else 'The last run'}: {training_kind(run)}", "")
        yield from body


def hub_datasets(runs: Sequence[RunFacts]) -> list[str]:
    """Datasets on the hub that the corpora of runs were made of."""
    sources = [
        source
        for run in runs
        for folder in run.data
        for manifest in folder.corpora
        for source in (manifest["config"]["sources"] if manifest else ())
    ]
    return sorted({source["dataset"] for source in sources if source["kind"] == "hub"})


def _validation(run: RunFacts) -> Iterator[str]:
    """The first, the best and the last validation, each once."""
    measured = [record for record in run.validations() if record["loss"] is not None]
    if not measured:
        yield "It was not validated while it was trained."
        return
    unit = "nats per pair" if "pairs" in measured[0] else "nats per token"
    best = min(measured, key=lambda each: each["loss"])
    named: dict[int, list[str]] = {}
    for name, record in (("first", measured[0]), ("best", best), ("last", measured[-1])):
        named.setdefault(measured.index(record), []).append(name)
    chosen = [("the only one" if len(measured) == 1 else ", ".join(named[at]), measured[at]) for at in named]
    names = [name for name in measured[0] if name not in ("step", "kind", "time")]
    header = (
        "validation",
        "step",
        *(f"loss ({unit})" if name == "loss" else name.replace("_", " ") for name in names),
    )
    rows = [
        (which, f"{record['step']:,}", *(_number(record[name]) for name in names)) for which, record in chosen
    ]
    yield from markdown_table(header, rows)


def _number(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def data_section(runs: Sequence[RunFacts]) -> Iterator[str]:
    """What a model was trained on, run by run and source by source."""
    if not runs:
        yield "The data is not known here."
        return
    level = "####" if len(runs) > 1 else "###"
    yield from headed(runs, (_data(run, level) for run in runs))
    if any(run.data for run in runs):
        yield from ("", "The licences of the sources are not recorded; the texts stay under them.")


def _data(run: RunFacts, level: str) -> Iterator[str]:
    if not run.data:
        why = "no data is recorded" if run.is_recorded else UNRECORDED
        yield f"The data is not known here: {why}."
    for number, folder in enumerate(run.data, start=1):
        yield from [""] * (number > 1)
        if len(run.data) > 1:
            share = NOT_KNOWN if folder.weight is None else f"{folder.weight:.1%}"
            yield from (f"{level} Part {number}: share of the rows {share}", "")
        yield from _data_folder(folder)


def _data_folder(folder: DataFolder) -> Iterator[str]:
    if folder.store is None:
        yield "Nothing is known of this data but its hash, which the run recorded."
        return
    for name, split in folder.store.splits.items():
        yield f"- {name}: {split.describe(folder.store.pairs)}"
    yield ""
    rows: list[tuple[str, ...]] = []
    for manifest in folder.corpora:
        if manifest is None:
            rows.append((NOT_KNOWN, "the corpus was not found", "", "", ""))
            continue
        for source, counts in zip(manifest["config"]["sources"], from_manifest(manifest), strict=True):
            amounts = (f"{counts.read:,}", f"{counts.kept:,}", f"{counts.num_bytes / 1e6:,.2f}")
            rows.append((counts.name, _origin(source, counts.origin), *amounts))
    yield from markdown_table(("source", "from", "records read", "kept", "MB kept"), rows)
    against = [set(names_against(manifest)) if manifest else set() for manifest in folder.corpora]
    if names := sorted(set.intersection(*against)) if against else []:
        yield from ("", f"Decontaminated against {', '.join(names)}.")


def _origin(source: Mapping[str, Any], origin: str) -> str:
    """Where a source lies, without the folders of the machine that it lay on."""
    if "paths" not in source:
        return origin
    return f"{source['kind']}: " + ", ".join(Path(path).name for path in source["paths"])
