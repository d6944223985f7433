"""`README.md` of a model on the hub, written from what is known. What is not known is called that."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lumi.evaluation.report import Figure, figures, figures_table, markdown_table
from lumi.host.hub_cache import HubModel, origin_of
from lumi.model.transformer import ModelConfig
from lumi.provenance.run_facts import RunFacts
from lumi.provenance.run_sections import (
    NOT_KNOWN,
    UNRECORDED,
    data_section,
    headed,
    hub_datasets,
    training_kind,
    training_section,
)
from lumi.provenance.usage import usage
from lumi.tokenizer.tokenizer import Tokenizer

_TAGS: Mapping[str, Sequence[str]] = {
    "pre-training": ["pretraining"],
    "fine-tuning": ["sft"],
    "direct preference optimization": ["dpo"],
    "training": [],
}
_ABSOLUTE = re.compile(r"(?<![\w.:/])/([^\s,;:/]+/)+")  # folders of the machine concern nobody
_SIGNED = re.compile(r"\n<!-- Written by `lumi push`: ([0-9a-f]{64}) -->\n$")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that training began with.

    Attributes:
        model: on the hub; None: it is not there, as far as is known.
        fingerprint: of its weights; None: not known.
    """

    model: HubModel | None
    fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card is written from.

    Attributes:
        target: the repository, and the branch if it is not the main one.
        shape: of the model, with an adapter that of its base; None: the base is not here.
        is_adapter: whether the repository holds an adapter.
        fingerprint: of the weights; of an adapter the SHA-256 of its file.
        base: None: training began with random weights, or nothing is known of it.
        is_recorded: whether its folder says what it was made from.
        runs: those that trained it, the last one first, as far as they are known.
        picture: whether `loss.png` lies beside the card.
        generation_config: whether `generation_config.json` does.
    """

    target: HubModel
    shape: ModelConfig | None
    tokenizer: Tokenizer | None
    is_adapter: bool
    fingerprint: str
    base: Base | None
    is_recorded: bool
    runs: Sequence[RunFacts]
    picture: bool
    generation_config: bool
    evaluations: Sequence[Mapping[str, Any]]
    license: str | None


def model_card(facts: CardFacts) -> str:
    """The whole text, signed: `is_ours` tells it from one that somebody has changed."""
    sections = {
        "": [f"# {facts.target.repo.partition('/')[2]}", "", _opening(facts)],
        "## Use": usage(
            facts.target,
            facts.tokenizer,
            facts.base.model if facts.base and facts.is_adapter else None,
            facts.generation_config,
        ),
        "## Training": list(_training(facts)),
        "## Data": list(data_section(facts.runs)),
        "## Evaluation": list(_evaluation(facts)),
        "## Tokenizer": _tokenizer(facts.tokenizer),
        "## Limits": [f"- {limit}" for limit in _limits(facts)],
        "## Configuration": list(_configuration(facts.runs)),
    }
    lines = [line for title, body in sections.items() for line in (title, "", *body, "")]
    text = "\n".join(["---", _front_matter(facts), "---", *lines[1:]])
    return f"{text}\n<!-- Written by `lumi push`: {_digest(text)} -->\n"


def is_ours(card: str) -> bool:
    """Whether a card is as `lumi push` wrote it, so that another one may take its place."""
    signed = _SIGNED.search(card)
    return signed is not None and signed[1] == _digest(card[: signed.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    base = facts.base.model if facts.base else None
    relation = "adapter" if facts.is_adapter else "finetune"
    data = ModelCardData(
        license=facts.license,
        base_model=base and base.repo,
        base_model_relation=base and relation,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lumi", *_tags(facts)],
        datasets=hub_datasets(facts.runs) or None,
    )
    return data.to_yaml()


def _tags(facts: CardFacts) -> Iterator[str]:
    if facts.is_adapter:
        yield "lora"
    if facts.runs:
        yield from _TAGS[training_kind(facts.runs[0])]


def _opening(facts: CardFacts) -> str:
    what = "A language model"
    if facts.shape is not None:
        shape = facts.shape
        what += (
            f" of {shape.num_parameters:,} parameters ({shape.num_layers} layers, width {shape.model_dim},"
            f" {shape.vocab_size:,} token ids, at most {shape.max_positions:,} tokens)"
        )
    if facts.is_adapter:
        what = f"A LoRA adapter for {_base_name(facts.base)}. Together they are {what[0].lower()}{what[1:]}"
    return f"{what}. Made with Lumi."


def _base_name(base: Base | None) -> str:
    if base is None:
        return f"a model that is {NOT_KNOWN}"
    if base.model is None:
        return "a model that is not on the hub, as far as is known"
    link = f"[{base.model.repo}](https://huggingface.co/{base.model.repo})"
    return link if base.model.revision is None else f"{link} at `{base.model.revision}`"


def _training(facts: CardFacts) -> Iterator[str]:
    named = "SHA-256 of the adapter" if facts.is_adapter else "fingerprint of the weights"
    rows = [(named, f"`{facts.fingerprint}`"), *_start(facts.base, facts.runs[1:])]
    if not facts.runs:
        why = "" if facts.is_recorded else f": {UNRECORDED}, or elsewhere"
        yield from (f"How it was trained is not known here{why}.", "")
        yield from markdown_table(("", ""), rows)
        return
    last, *earlier = facts.runs
    bodies = [training_section(last, rows, is_adapter=facts.is_adapter, picture=facts.picture)]
    for number, run in enumerate(earlier, start=2):
        bodies.append(training_section(run, list(_start(recorded_base(run), facts.runs[number:]))))
    yield from headed(facts.runs, bodies)


def recorded_base(run: RunFacts) -> Base | None:
    """The model that a run began with; None: there was none, or it is not recorded."""
    if run.start is None:
        return None
    fingerprint = run.start.identity if run.start.kind == "model" else None
    return Base(model=origin_of(run.start.path), fingerprint=fingerprint)


def _start(base: Base | None, earlier: Sequence[RunFacts]) -> Iterator[tuple[str, str]]:
    """Rows about what a run began with. `earlier`: the known runs before it."""
    if base is None:
        return
    below = "the model of the run below"
    name = _base_name(base) if base.model or not earlier else below
    yield "began with", f"{name}, {below}" if base.model and earlier else name
    if base.fingerprint is not None:
        yield "fingerprint of those weights", f"`{base.fingerprint}`"


def _evaluation(facts: CardFacts) -> Iterator[str]:
    if not facts.evaluations:
        yield "No evaluation of these weights was given."
    for number, results in enumerate(facts.evaluations):
        yield from [""] * (number > 0)
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        stopped = "" if results["finished"] else " **It was stopped before it had measured everything.**"
        limit = "" if results["limit"] is None else f" The first {results['limit']:,} of each at most."
        yield f"By `lumi evaluate` on {results['date'][:10]}, {results['dtype']}; {versions}.{limit}{stopped}"
        yield ""
        yield from figures_table(
            [Figure(*(_ABSOLUTE.sub("", text) for text in figure)) for figure in figures(results)]
        )


def _tokenizer(tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return ["That of the base."]
    template = "with a chat template" if tokenizer.chat_template else "without a chat template"
    lines = [f"{tokenizer.vocab_size:,} tokens, {template}; fingerprint `{tokenizer.fingerprint}`."]
    return lines + ([f"It does not keep every text as it is: {tokenizer.loss}."] if tokenizer.loss else [])


def _limits(facts: CardFacts) -> Iterator[str]:
    if facts.license is None:
        yield "No licence was given."
    if not facts.runs:
        yield "Training, data and their licences are not known here."
    else:
        folders = [folder for run in facts.runs for folder in run.data]
        is_partial = any(folder.store is None or None in folder.corpora for folder in folders)
        if is_partial or not all(run.data for run in facts.runs):
            yield "Not all of the data is known here, so it may hold what an evaluation asks."
        if facts.base is not None and not facts.runs[-1].from_random:
            yield "What its base had learnt, and under which licences, is not told here."
    if not facts.evaluations:
        yield "What it can do is not measured here."
    yield "Bias, safety and truth of what it writes are not measured here. It states falsehoods fluently."
    if facts.shape is not None:
        yield f"It reads at most {facts.shape.max_positions:,} tokens."


def _configuration(runs: Sequence[RunFacts]) -> Iterator[str]:
    if not runs:
        yield "Not known here."
    yield from headed(runs, map(_details, runs))


def _details(run: RunFacts) -> list[str]:
    summary = "<details><summary>The whole configuration of the run</summary>"
    return [summary, "", "```json", json.dumps(run.config, indent=2), "```", "", "</details>"]
