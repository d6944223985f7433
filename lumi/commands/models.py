"""A model is judged and passed on: `lumi evaluate`, `compare`, `export`, `merge`, `verify` and `push`."""

import argparse
import sys
from typing import TYPE_CHECKING

from lumi.command_line import (
    add_cache_dir,
    add_config,
    from_options,
    given_path,
    option_name,
    parse,
    parser,
    summary,
)
from lumi.commands.model_options import add_model, add_whole_model, load_model
from lumi.config import load_config

if TYPE_CHECKING:
    from lumi.formats.export_form import ExportForm


def evaluate(argv: list[str]) -> int:
    """a model -> tasks, perplexity and smoke tests, with the protocol of each figure"""
    from lumi.evaluation.evaluate import CONFIGS, EvaluationConfig
    from lumi.evaluation.evaluate import evaluate as run_evaluation
    from lumi.provenance.training_corpora import training_corpora

    standard, with_data = CONFIGS / "standard.json", CONFIGS / "data_dirs.json"
    data = "token stores, also behind a URL, or corpus folders: perplexity on their validation splits"
    limit = "at most so many examples of each task and documents of each text"
    arguments = parser("lumi evaluate", summary(evaluate))
    add_config(arguments, f"{standard}, or {with_data.name} beside it where --data-dirs is given")
    add_model(arguments)
    arguments.add_argument("--output-dir", required=True, type=given_path)
    arguments.add_argument("--data-dirs", nargs="+", metavar="DIR", help=data)
    add_cache_dir(arguments)
    arguments.add_argument("--limit", type=int, help=limit)
    options = parse(arguments, argv)
    path = options.config or (with_data if options.data_dirs else standard)
    config = load_config(EvaluationConfig, path, options.overrides)
    pretrained = load_model(options)
    run_evaluation(
        config,
        pretrained,
        options.output_dir,
        data_dirs=options.data_dirs or (),
        cache_dir=options.cache_dir,
        limit=options.limit,
        trained_on=training_corpora(pretrained) if config.parts else None,
    )
    return 0


def compare(argv: list[str]) -> int:
    """two evaluations of the same tasks -> is the difference more than luck?"""
    from lumi.evaluation import comparison

    more = "Less is better in bits per byte, more in the others; p: how often luck alone gives as much."
    arguments = parser("lumi compare", f"{summary(compare)} {more}")
    for name in ("a", "b"):
        arguments.add_argument(name, type=given_path, metavar=f"EVALUATION_{name.upper()}", help="a folder")
    options = arguments.parse_args(argv)
    differences, notes = comparison.compare(options.a, options.b)
    print(f"A: {options.a}\nB: {options.b}\n\n{comparison.format_differences(differences)}")
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def export(argv: list[str]) -> int:
    """a model in another precision, in several files, or as GGUF"""
    from lumi.formats.export import export_model

    arguments = parser("lumi export", summary(export))
    add_whole_model(arguments)
    _add_export(arguments)
    options = arguments.parse_args(argv)
    exported = export_model(
        options.model_path,
        options.output_dir,
        form=_export_form(options),
        tokenizer_path=options.tokenizer_path,
    )
    print(f"{options.output_dir}: {exported}")
    return 0


def merge(argv: list[str]) -> int:
    """an adapter and its base -> one model"""
    from lumi.formats.export import merge_adapter

    arguments = parser("lumi merge", summary(merge))
    adapter = "the adapter's folder, or the run that made it"
    arguments.add_argument("--model-path", required=True, type=given_path, help=adapter)
    arguments.add_argument("--base-path", type=given_path, help="default: the base that the adapter names")
    _add_export(arguments)
    options = arguments.parse_args(argv)
    merged = merge_adapter(
        options.model_path,
        options.output_dir,
        base_path=options.base_path,
        form=_export_form(options),
    )
    print(f"{options.output_dir}: {merged}")
    return 0


def _add_export(arguments: argparse.ArgumentParser) -> None:
    from lumi.formats.export_options import FORMATS
    from lumi.formats.gguf_weights import QUANTISATIONS

    texts = {
        "format": "hf: a folder for transformers; gguf: a file for llama.cpp and Ollama",
        "dtype": "hf: dtype of the weights on disk; default: float32",
        "size": "hf: such as 2GB; larger weights are cut into several files",
        "quantize": "gguf: type of the matrices; default: f32",
        "license": "gguf: such as apache-2.0; default: what the model's README.md names",
    }
    dtypes = ("float32", "bfloat16", "float16")
    arguments.add_argument("--output-dir", required=True, type=given_path, help="new or empty")
    arguments.add_argument("--format", choices=FORMATS, default="hf", help=texts["format"])
    arguments.add_argument("--dtype", choices=dtypes, help=texts["dtype"])
    arguments.add_argument("--max-shard-size", metavar="SIZE", help=texts["size"])
    arguments.add_argument("--quantize", choices=QUANTISATIONS, help=texts["quantize"])
    arguments.add_argument("--license", metavar="NAME", help=texts["license"])


def _export_form(options: argparse.Namespace) -> "ExportForm":
    from lumi.formats.export_options import form_of

    return form_of(
        options.format,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        quantize=options.quantize,
        licence=options.license,
    )


def verify(argv: list[str]) -> int:
    """what a folder was made from, back to the texts, by the recorded hashes"""
    from lumi.provenance import chain
    from lumi.provenance.tree import to_json, tree

    texts = {
        "path": "a corpus, tokenizer, token store, checkpoint, model, adapter or evaluation, or a run",
        "search": "where to look for what has moved",
        "json": "print the tree as JSON",
    }
    more = "Exit code 1: something is missing, changed or from another chain. Nothing is modified."
    arguments = parser("lumi verify", f"{summary(verify)}. {more}")
    arguments.add_argument("path", type=given_path, metavar="PATH", help=texts["path"])
    arguments.add_argument(
        "--search", nargs="+", default=[], type=given_path, metavar="DIR", help=texts["search"]
    )
    arguments.add_argument("--json", action="store_true", help=texts["json"])
    options = arguments.parse_args(argv)
    link = chain.verify(options.path, options.search)
    if (made := chain.made_by(options.path)) != options.path:
        other = "its own files, such as config.json and metrics.jsonl, are not in the chain"
        print(f"{options.path}: looked at {made}, which the run made; {other}", file=sys.stderr)
    print(to_json(link) if options.json else tree(link))
    return 1 if link.is_broken else 0


def push(argv: list[str]) -> int:
    """a model or an adapter -> the Hugging Face hub, with a model card"""
    from lumi.provenance.push import PushOptions
    from lumi.provenance.push import push as push_model

    texts = {
        "run": "a finished run, or the folder of a model or an adapter",
        "dry_run": "show files and card; ask and send nothing",
        "private": "make the new repository private",
        "branch": "of the repository, made where it is missing; default: main",
        "license": "of the model, as the hub spells it, such as apache-2.0",
        "base_model": "what the base is called on the hub, where it came from a folder here",
        "search": "where to look for what has moved, as in lumi verify",
        "evaluations": "folders of `lumi evaluate` that do not lie near the model",
        "replace_card": "also replace a README.md that lumi push has not written",
    }
    arguments = parser("lumi push", summary(push))
    arguments.add_argument("run", type=given_path, metavar="RUN", help=texts["run"])
    arguments.add_argument("repo", metavar="OWNER/NAME")
    for name in ("dry_run", "private", "replace_card"):
        arguments.add_argument(option_name(name), action="store_true", help=texts[name])
    arguments.add_argument("--branch", help=texts["branch"])
    arguments.add_argument("--license", metavar="ID", help=texts["license"])
    arguments.add_argument("--base-model", metavar="OWNER/NAME", help=texts["base_model"])
    for name in ("search", "evaluations"):
        folders = arguments.add_argument(
            option_name(name), nargs="+", type=given_path, metavar="DIR", default=[]
        )
        folders.help = texts[name]
    options = arguments.parse_args(argv)
    push_model(options.run, options.repo, from_options(PushOptions, options))
    return 0
