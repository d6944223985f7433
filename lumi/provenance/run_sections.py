"""The sections of a model card that a run's own facts give: its training and its data."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumi.corpus.counts import from_manifest
from lumi.evaluation.report import markdown_table
from lumi.provenance.run_facts import DataFolder, RunFacts

NOT_KNOWN = "not known"
Rows = Sequence[tuple[str, str]]


def training_section(
    run: RunFacts | None, of_weights: Rows, *, is_adapter: bool, picture: bool
) -> Iterator[str]:
    """How a model was trained, its curve and its validations.

    Args:
        run: None: it is not known.
        of_weights: rows about the weights, and about those that training began with.
        picture: whether `loss.png` lies beside the card.
    """
    if run is None:
        yield from ("How it was trained is not known here.", "")
        yield from markdown_table(("", ""), of_weights)
        return
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


def hub_datasets(run: RunFacts | None) -> list[str]:
    """Datasets on the hub that the corpora of a run were made of."""
    sources = [
        source
        for folder in (run.data if run else ())
        for manifest in folder.corpora
        for source in (manifest["config"]["sources"] if manifest else ())
    ]
    return sorted({source["dataset"] for source in sources if source["kind"] == "hub"})


def _validation(run: RunFacts) -> Iterator[str]:
    """The first, the best and the last validation."""
    measured = [record for record in run.validations() if record["loss"] is not None]
    if not measured:
        yield "It was not validated while it was trained."
        return
    unit = "nats per pair" if "pairs" in measured[0] else "nats per token"
    chosen = {
        "first": measured[0],
        "best": min(measured, key=lambda each: each["loss"]),
        "last": measured[-1],
    }
    names = [name for name in measured[0] if name not in ("step", "kind", "time")]
    header = (
        "validation",
        "step",
        *(f"loss ({unit})" if name == "loss" else name.replace("_", " ") for name in names),
    )
    rows = [
        (which, f"{record['step']:,}", *(_number(record[name]) for name in names))
        for which, record in chosen.items()
    ]
    yield from markdown_table(header, rows)


def _number(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def data_section(run: RunFacts | None) -> Iterator[str]:
    """What a model was trained on, source by source."""
    if run is None or not run.data:
        yield "The data is not known here."
        return
    for number, folder in enumerate(run.data, start=1):
        if len(run.data) > 1:
            share = NOT_KNOWN if folder.weight is None else f"{folder.weight:.1%}"
            yield from (f"### Part {number}: share of the rows {share}", "")
        yield from (*_data_folder(folder), "")
    yield "The licences of the sources are not recorded; the texts stay under them."


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


def _origin(source: Mapping[str, Any], origin: str) -> str:
    """Where a source lies, without the folders of the machine that it lay on."""
    if "paths" not in source:
        return origin
    return f"{source['kind']}: " + ", ".join(Path(path).name for path in source["paths"])
