"""`lumi evaluate`: a model -> tasks, perplexity and smoke tests -> results as JSON and as a report."""

import dataclasses
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lumi
import lumi.configs
from lumi.config import UserError, to_dict, write_json
from lumi.corpus.sources import Location, describe
from lumi.data.token_cache import check_cache_options, open_or_tokenize
from lumi.data.token_store import Split
from lumi.evaluation.centred_mean import centred_mean
from lumi.evaluation.contamination import Decontamination, TrainedOn, find_decontamination, warn
from lumi.evaluation.examples import EXAMPLES_FILE, example_rows, write_examples
from lumi.evaluation.multiple_choice import (
    Outcome,
    outcomes,
    read_questions,
    result_of,
    score_questions,
)
from lumi.evaluation.perplexity import (
    ScoredDocument,
    TextConfig,
    WindowConfig,
    perplexity,
    store_documents,
    text_documents,
)
from lumi.evaluation.records import tightest
from lumi.evaluation.report import format_table, report
from lumi.evaluation.smoke import SHIPPED, SmokeConfig, encode_smoke_tests, read_smoke_tests, run_smoke_tests
from lumi.evaluation.tasks import TASKS, Question, TaskConfig
from lumi.formats.model_parent import model_parents
from lumi.formats.pretrained import Pretrained
from lumi.host.hub_cache import name_of
from lumi.host.provenance import Parent, write_provenance
from lumi.host.storage import check_output, file_record
from lumi.host.user_cache import is_url
from lumi.tokenizer.tokenizer import Tokenizer

CONFIGS = Path(lumi.configs.__file__).parent / "evaluation"
RESULTS_FILE, REPORT_FILE = "evaluation_results.json", "evaluation_report.md"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured.

    `batch_tokens`: how many tokens one pass holds; it decides speed and memory, not results. None: 16,384
    on CUDA, and 1,024 on the CPU, where a larger batch falls out of the caches (measured: 8,192 is 1.4
    times slower).
    """

    tasks: tuple[TaskConfig, ...] = ()
    texts: tuple[TextConfig, ...] = ()
    windows: WindowConfig = field(default_factory=WindowConfig)
    smoke_tests: SmokeConfig | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        for key in ("tasks", "texts"):
            names = Counter(part.name for part in getattr(self, key))
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"{key} must have different names, got {twice[0]!r} twice")

    @property
    def parts(self) -> list[TaskConfig | TextConfig]:
        """Tasks and texts."""
        return [*self.tasks, *self.texts]


class _Text(NamedTuple):
    """Documents to measure under a name: those of a text, or the first `limit` of a split of a token store.

    `format`: of the text, or "store". `source`: where the documents come from, for the report. `store`: that
    they come from, if they do. `decontaminated`: whether the model's corpora were; None: not known.
    """

    name: str
    format: str
    source: str
    limit: int | None
    documents: list[ScoredDocument] | Split
    store: Parent | None = None
    decontaminated: bool | None = None


def evaluate(
    config: EvaluationConfig,
    pretrained: Pretrained,
    output_dir: str | Path,
    *,
    data_dirs: Sequence[str | Path] = (),
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    trained_on: TrainedOn | None = None,
) -> dict[str, Any]:
    """Measure a model; write results, a report and examples into `output_dir`, and print a table.

    All data is read before the model is run, so that what is missing shows at once. The files are written
    after each task and text, with `finished` false until the end. An error or Ctrl-C before the end prints
    what they hold to stderr.

    Args:
        config: what to measure.
        pretrained: the model, its tokenizer and its folder.
        output_dir: is made; results of an earlier evaluation in it are replaced.
        data_dirs: token stores, also behind URLs, or corpus folders, of the model's tokenizer; their
            validation splits are measured.
        cache_dir: as in `lumi.data.token_cache.open_or_tokenize`.
        limit: how many examples of each task and documents of each text at most.
        trained_on: the corpora behind the model; one that was not decontaminated against what is measured
            gives a warning. None: they are not known.

    Returns:
        What the results file holds.

    Raises:
        UserError: nothing to do, two texts of one name, data that cannot be read, or a model whose output
            is not finite.
    """
    started = time.monotonic()
    output_dir = Path(output_dir)
    folders = [str(folder) if is_url(folder) else Path(folder) for folder in data_dirs]
    _check(config, output_dir, folders, limit)
    check_cache_options(cache_dir, folders)
    model, tokenizer = pretrained.model, pretrained.tokenizer
    batch_tokens = config.batch_tokens or (16_384 if model.output_weight.is_cuda else 1024)
    config.windows.resolve(model.config.max_positions)
    questions = [read_questions(task, limit) for task in config.tasks]
    clean = {part.source: find_decontamination(part.source, trained_on or {}) for part in config.parts}
    warn([(part.name, clean[part.source]) for part in config.parts])
    texts = [
        *_read_texts(config, tokenizer, limit, clean),
        *_open_stores(folders, tokenizer, cache_dir, limit),
    ]
    smoke, tests = config.smoke_tests, None
    if smoke is not None:
        tests = encode_smoke_tests(smoke, read_smoke_tests(smoke), tokenizer, model.config.max_positions)
    parents = [*model_parents(pretrained), *(text.store for text in texts if text.store is not None)]
    output_dir.mkdir(parents=True, exist_ok=True)

    results = _facts(pretrained) | {"limit": limit, "config": to_dict(config)}
    results |= {"finished": False, "tasks": {}, "centred_mean": None, "perplexity": {}, "smoke_tests": None}
    examples: list[dict[str, Any]] = []
    try:
        for task, asked in zip(config.tasks, questions, strict=True):
            results["tasks"][task.name], found = _run_task(task, asked, pretrained, batch_tokens, limit)
            results["tasks"][task.name]["decontaminated"] = clean[task.source].value
            results["centred_mean"] = centred_mean(results["tasks"])
            examples += example_rows(task.name, asked, found)
            _save(results, examples, parents, output_dir, started)
        for text in texts:
            results["perplexity"][text.name] = _run_text(text, config.windows, pretrained, batch_tokens)
            _save(results, examples, parents, output_dir, started)
        if smoke is not None and tests is not None:
            source = f"prompts of {smoke.path or 'the shipped ' + SHIPPED.name}"
            measured = dataclasses.asdict(run_smoke_tests(smoke, tests, model, tokenizer))
            results["smoke_tests"] = {"source": source, **measured}
    except (KeyboardInterrupt, UserError):
        print(_kept(results, output_dir), file=sys.stderr)
        raise
    results["finished"] = True
    _save(results, examples, parents, output_dir, started)
    print(format_table(results))
    print(f"{output_dir / REPORT_FILE} has the protocol of each figure, {RESULTS_FILE} everything")
    return results


def _read_texts(
    config: EvaluationConfig,
    tokenizer: Tokenizer,
    limit: int | None,
    clean: Mapping[Location, Decontamination],
) -> Iterator[_Text]:
    for text in config.texts:
        most, documents = tightest(text.limit, limit), text_documents(text, tokenizer, limit)
        source, decontaminated = describe(text.source), clean[text.source].value
        yield _Text(text.name, text.format, source, most, documents, decontaminated=decontaminated)


def _open_stores(
    folders: Sequence[str | Path], tokenizer: Tokenizer, cache_dir: str | Path | None, limit: int | None
) -> Iterator[_Text]:
    for folder in folders:
        store = open_or_tokenize(folder, tokenizer, cache_dir=cache_dir)
        if store.manifest.pairs:
            raise UserError(
                "--data-dirs",
                "must hold texts or conversations",
                got=f"the pairs of {folder}, of which half are bad answers",
                remedy="a run with dpo measures them at each validation",
            )
        split = store.split("validation")
        yield _Text(str(folder), "store", f"store: {folder} / validation", limit, split, store.as_parent)


def _check(
    config: EvaluationConfig, output_dir: Path, data_dirs: Sequence[str | Path], limit: int | None
) -> None:
    """Refuse what can be refused before anything is read."""
    if limit is not None and limit < 1:
        raise UserError("--limit", "must be at least 1", got=limit)
    if not (config.tasks or config.texts or config.smoke_tests or data_dirs):
        expectation = "must name at least one of tasks, texts and smoke_tests"
        raise UserError("the config", expectation, got="none", remedy="or pass --data-dirs")
    places = {folder.resolve() if isinstance(folder, Path) else folder for folder in data_dirs}
    if len(places) < len(data_dirs):
        got = " ".join(map(str, data_dirs))
        raise UserError("--data-dirs", "must be different folders", got=got, remedy="leave one out")
    names = Counter([*(text.name for text in config.texts), *map(str, data_dirs)])
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            "texts and --data-dirs",
            "must have different names",
            got=f"{twice[0]!r} twice",
            remedy="leave one out or rename the text",
        )
    check_output(output_dir, renamed=False)
    if any(output_dir.glob("*.safetensors")):  # whose record that of the results would replace
        got = f"{output_dir}, which holds weights"
        raise UserError("--output-dir", "must be a folder for results", got=got, remedy="choose another")


def _save(
    results: dict[str, Any],
    examples: Sequence[dict[str, Any]],
    parents: Sequence[Parent],
    output_dir: Path,
    started: float,
) -> None:
    results["seconds"] = _seconds(started)
    write_json(output_dir / RESULTS_FILE, results)
    (output_dir / REPORT_FILE).write_text(report(results), encoding="utf-8")
    write_examples(output_dir, examples)
    names = [RESULTS_FILE, REPORT_FILE, *[EXAMPLES_FILE] * bool(examples)]
    files = {name: file_record(output_dir / name) for name in names}
    write_provenance(output_dir, "evaluation", parents, files)


def _kept(results: dict[str, Any], output_dir: Path) -> str:
    """What an evaluation that was stopped has written, as one line."""
    measured = [*results["tasks"], *results["perplexity"]]
    if not measured:
        return "stopped before anything was measured; nothing was written"
    return f"stopped; {', '.join(measured)} measured, kept in {output_dir / RESULTS_FILE} and {REPORT_FILE}"


def _run_task(
    task: TaskConfig,
    questions: Sequence[Question],
    pretrained: Pretrained,
    batch_tokens: int,
    limit: int | None,
) -> tuple[dict[str, Any], list[Outcome]]:
    begun, kind = time.monotonic(), TASKS[task.kind]
    scores = score_questions(questions, pretrained.model, pretrained.tokenizer, batch_tokens, task.name)
    found = outcomes(questions, scores.scored, kind.normalised)
    shots = task.few_shot
    data = {
        "source": describe(task.source),
        "limit": tightest(task.limit, limit),
        "few_shot": None if shots is None else to_dict(shots) | {"source": describe(shots.source)},
    }
    more = {"cut_contexts": scores.num_cut, "seconds": _seconds(begun)}
    return {"kind": task.kind, **data, **result_of(kind, questions, found).to_plain(), **more}, found


def _run_text(
    text: _Text, windows: WindowConfig, pretrained: Pretrained, batch_tokens: int
) -> dict[str, Any]:
    begun = time.monotonic()
    documents: Iterable[ScoredDocument]
    if isinstance(text.documents, Split):
        documents = store_documents(text.documents, pretrained.tokenizer, text.limit)
        answers_only = text.documents.mask is not None
    else:
        documents, answers_only = text.documents, False
    result = perplexity(pretrained.model, documents, windows, batch_tokens=batch_tokens, name=text.name)
    data = {"format": text.format, "source": text.source, "limit": text.limit, "answers_only": answers_only}
    data |= {"decontaminated": text.decontaminated}
    return {**data, **dataclasses.asdict(result), "seconds": _seconds(begun)}


def _facts(pretrained: Pretrained) -> dict[str, Any]:
    model, device = pretrained.model, pretrained.model.output_weight.device
    return {
        "model": name_of(pretrained.folder),
        "adapter": None if pretrained.adapter is None else name_of(pretrained.adapter),
        "parameters": model.config.num_parameters,
        "tokenizer_fingerprint": pretrained.tokenizer.fingerprint,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "operators": model.ops.name,
        "versions": {
            "lumi": lumi.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _seconds(begun: float) -> float:
    return round(time.monotonic() - begun, 2)
