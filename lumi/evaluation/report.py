"""Results of an evaluation: a table for the terminal, and Markdown with the protocol of every figure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lumi.config import UserError
from lumi.evaluation.tasks import TASKS


class Figure(NamedTuple):
    """One line of the table, as text. `number`: how many examples, tokens or prompts the value rests on."""

    name: str
    metric: str
    value: str
    baseline: str
    number: str
    protocol: str


def figures(results: Mapping[str, Any]) -> list[Figure]:
    """Every figure of the results. Raises UserError where an earlier version of Lumi wrote them."""
    if "centred_mean" not in results:
        got, remedy = "those of an earlier version", "evaluate again"
        raise UserError("evaluation results", "must be of this version of Lumi", got=got, remedy=remedy)
    return [
        *_task_figures(results["tasks"]),
        *_centred_figures(results),
        *_perplexity_figures(results["perplexity"]),
        *_smoke_figures(results),
    ]


def format_table(results: Mapping[str, Any]) -> str:
    """Columns for a terminal, without the protocols."""
    return columns([("", "metric", "value", "baseline", "of"), *(figure[:5] for figure in figures(results))])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows for a terminal, in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def report(results: Mapping[str, Any]) -> str:
    """A Markdown page."""
    limit = ""
    if results["limit"] is not None:
        limit = f" The first {results['limit']:,} of each task and text at most (--limit)."
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    adapter = f" with the adapter `{results['adapter']}`" if results["adapter"] else ""
    lines = [
        f"# Evaluation of {results['model']}",
        "",
        f"{results['parameters']:,} parameters{adapter}, {results['dtype']} on {results['device']},"
        f" tokenizer `{results['tokenizer_fingerprint'][:16]}`; {versions}; {results['date']},"
        f" {results['seconds']:.0f} s.{limit}",
        "",
    ]
    if not results["finished"]:
        lines += ["**Not finished**: the evaluation was stopped before it had measured everything.", ""]
    lines += figures_table(figures(results))
    if results["smoke_tests"]:
        lines += ["", "## Smoke tests that failed", ""]
        rows = []
        for answer in results["smoke_tests"]["answers"]:
            failed = ", ".join(name for name, met in answer["checks"].items() if not met)
            if failed:
                rows.append((answer["category"], answer["prompt"], answer["answer"], failed))
        lines += markdown_table(("category", "prompt", "answer", "failed"), rows) if rows else ["None."]
    return "\n".join(lines) + "\n"


def _task_figures(tasks: Mapping[str, Any]) -> Iterator[Figure]:
    for name, task in tasks.items():
        protocol = _task_protocol(task)
        number = _count(task["examples"], "example")
        if cut := task["cut_contexts"]:
            number += f", {cut:,} cut"
            protocol += f"; {_count(cut, 'context')} cut from the left to the model's positions"
        guessing = f"chance {task['chance']:.2%}" if task["chance"] else ""
        if task["majority"] is not None:
            guessing = f"majority {task['majority']:.2%}, {guessing}"
        metrics = (
            ("bits_per_byte", "", "{:.4f}".format),
            ("margin", "chance 0", "{:+.4f}".format),
            ("perplexity", "", _number),
            ("acc", guessing, "{:.2%}".format),
            ("acc_norm", guessing, "{:.2%}".format),
        )
        for metric, baseline, show in metrics:
            if task[metric] is not None:
                value = _with_error(task[metric], task[f"{metric}_stderr"], show)
                yield Figure(name, metric.replace("_per_", " per "), value, baseline, number, protocol)


def _task_protocol(task: Mapping[str, Any]) -> str:
    shots = "zero-shot"
    if task["few_shot"] is not None:
        how = "drawn from" if task["few_shot"]["sampler"] == "random" else "the first of"
        shots = f"{task['few_shot']['num_fewshot']}-shot, {how} {task['few_shot']['source']}"
    parts = [_data(task, "example"), f"{shots}, without chat template, {TASKS[task['kind']].protocol}"]
    if task["margin"] is None:
        parts += ["bits per byte and perplexity: of the answer", "acc: greedy decoding gives the answer"]
    else:
        parts += [
            "bits per byte: of the right choice",
            "margin: mean of the wrong choices' minus the right one's",
        ]
        parts += ["acc: highest log-likelihood"]
    if task["acc_norm"] is not None:
        parts += ["acc_norm: the same per character of the choice"]
    return "; ".join([*parts, *_decontamination(task)])


def _centred_figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    centred = results["centred_mean"]
    if centred is None:
        return
    protocol = (
        f"mean of (acc - chance) / (1 - chance) over {', '.join(centred['tasks'])}, as DataComp-LM's CORE is"
        " over its own tasks; it compares with the same tasks alone"
    )
    value = _with_error(centred["value"], centred["stderr"], "{:.4f}".format)
    number = _count(len(centred["tasks"]), "task")
    yield Figure("all tasks", "centred acc", value, "chance 0", number, protocol)


def _perplexity_figures(texts: Mapping[str, Any]) -> Iterator[Figure]:
    for name, text in texts.items():
        sizes = f"windows of {_count(text['window_tokens'], 'token')}, stride {text['stride_tokens']:,}"
        what = "answers alone, with what ends them" if text["answers_only"] else "EOS not counted"
        is_wikitext = text["format"] == "wikitext"
        original = "; words and bytes of the file before detokenisation" if is_wikitext else ""
        documents = "the document" if text["documents"] == 1 else f"each of {text['documents']:,} documents"
        parts = [_data(text, "document"), f"{sizes}, {documents} after BOS", what + original]
        protocol = "; ".join([*parts, *_decontamination(text)])
        words = f"{protocol}; words: the pieces between white space"
        units = (
            ("token", text["tokens"], protocol),
            ("word", text["words"], words),
            ("byte", text["bytes"], protocol),
        )
        for unit, number, how in units:
            value = _number(text[f"{unit}_perplexity"])
            yield Figure(name, f"{unit} perplexity", value, "", _count(number, unit), how)
        num_bytes = _count(text["bytes"], "byte")
        yield Figure(name, "bits per byte", _number(text["bits_per_byte"]), "", num_bytes, protocol)


def _smoke_figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    smoke = results["smoke_tests"]
    if not smoke:
        return
    tokens = results["config"]["smoke_tests"]["max_new_tokens"]
    how = "asked through the chat template" if smoke["style"] == "chat" else "continued as text"
    for name, (passed, prompts) in smoke["categories"].items():
        protocol = f"{smoke['source']}; greedy, at most {_count(tokens, 'token')}, {how}; all checks met"
        yield Figure(f"smoke: {name}", "passed", str(passed), "", _count(prompts, "prompt"), protocol)


def figures_table(of: Sequence[Figure]) -> list[str]:
    """Figures as Markdown: each protocol once, in a list below; no baselines where there is none."""
    protocols = list(dict.fromkeys(figure.protocol for figure in of))
    has_baseline = any(figure.baseline for figure in of)
    rows = []
    for figure in of:
        baseline = [figure.baseline] * has_baseline
        note = str(protocols.index(figure.protocol) + 1)
        rows.append([figure.name, figure.metric, figure.value, *baseline, figure.number, note])
    header = ["", "metric", "value", *["baseline"] * has_baseline, "of", "protocol"]
    notes = [f"{number}. {_cell(protocol)}" for number, protocol in enumerate(protocols, start=1)]
    return [*markdown_table(header, rows), *["", "Protocols:", ""] * bool(notes), *notes]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; text that Markdown would read is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(text) for text in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").split())


def _data(part: Mapping[str, Any], unit: str) -> str:
    if part["limit"] is None:
        return str(part["source"])
    return f"the first {_count(part['limit'], unit)} of {part['source']}"


def _decontamination(part: Mapping[str, Any]) -> list[str]:
    """Nothing where it is not known, as in results of an earlier version."""
    known = part.get("decontaminated")
    return [] if known is None else [f"training data {'' if known else 'NOT '}decontaminated against it"]


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" + ("" if number == 1 else "s")


def _with_error(value: float, error: float | None, show: Callable[[float], str]) -> str:
    return show(value) + ("" if error is None else f" ± {show(error).lstrip('+')}")


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    if value < 9999.5:  # from 10,000 on, %g is exponential
        return f"{value:.4g}"
    return f"{value:,.1f}" if value < 1e6 else f"{value:.3e}"
