"""Texts become what training reads: `lumi prepare`, `lumi tokenizer`, `lumi tokenize`."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from lumi.command_line import add_config, given_path, parse, parser, summary
from lumi.config import UserError, load_config

if TYPE_CHECKING:
    from lumi.corpus import PrepareConfig
    from lumi.corpus.scale.prepare import Executor
    from lumi.data.store_manifest import StoreManifest


def prepare(argv: list[str]) -> int:
    """raw text -> a corpus folder: cleaned, filtered, de-duplicated"""
    from lumi import corpus

    arguments = parser("lumi prepare", summary(prepare))
    add_config(arguments)
    arguments.add_argument("--output-dir", required=True, type=given_path)
    cache = "reuse finished work, go on after an interruption"
    arguments.add_argument("--use-cache", action="store_true", help=cache)
    arguments.add_argument("--analyze-only", action="store_true", help="print the plan, write nothing")
    page = "the page of lengths, reasons and examples, which a corpus folder holds; with --analyze-only"
    arguments.add_argument("--report", type=given_path, metavar="FILE", help=page)
    arguments.add_argument("--num-workers", type=int, help="processes; default: one per core")
    against = "drop documents that share text with the tasks and texts of a config of lumi evaluate"
    arguments.add_argument("--decontaminate", metavar="EVALUATION", help=against)
    _add_executor(arguments)
    options = parse(arguments, argv)
    _check_analysis(options)
    executor = _executor(options)
    config = load_config(corpus.PrepareConfig, options.config, options.overrides)
    if options.decontaminate is not None:
        config = _decontaminated(config, options.decontaminate)
    if executor is not None:
        from lumi.corpus.scale.prepare import prepare_in_tasks

        prepare_in_tasks(config, options.output_dir, executor, use_cache=options.use_cache)
        return 0
    corpus.prepare(
        config,
        options.output_dir,
        use_cache=options.use_cache,
        analyze_only=options.analyze_only,
        num_workers=options.num_workers,
        report=options.report,
    )
    return 0


def _decontaminated(config: "PrepareConfig", evaluation: str) -> "PrepareConfig":
    """The config with all tasks and texts of an evaluation in its `decontamination`. Raises UserError."""
    from lumi.corpus.evaluation_sets import DecontaminationConfig, EvaluationSetConfig
    from lumi.evaluation.evaluate import EvaluationConfig

    if config.decontamination is not None:
        given = "must be left out where the config has decontamination"
        raise UserError("--decontaminate", given, got=evaluation)
    parts = load_config(EvaluationConfig, evaluation).parts
    try:
        against = tuple(EvaluationSetConfig(name=part.name, source=part.source) for part in parts)
        return dataclasses.replace(config, decontamination=DecontaminationConfig(against=against))
    except ValueError as error:
        raise UserError(f"--decontaminate {evaluation}: {error}") from error


def _add_executor(arguments: argparse.ArgumentParser) -> None:
    where = "cut the work into tasks: processes here, or array jobs of Slurm (extra `scale`)"
    arguments.add_argument("--executor", choices=("local", "slurm"), help=where)
    arguments.add_argument("--tasks", type=int, metavar="N", help="how many tasks; with --executor")
    sbatch = 'options for --executor slurm: "--partition=P --time=8:00:00 ..."'
    arguments.add_argument("--sbatch", default="", metavar="OPTIONS", help=sbatch)


def _check_analysis(options: argparse.Namespace) -> None:
    """Raises UserError where `lumi prepare` is to analyze, or to report, in tasks."""
    if options.executor is None:
        return
    if options.analyze_only:
        raise UserError(
            "--analyze-only",
            "must be used without --executor: tasks leave their results on disk",
            remedy="take a part of the data, by max_documents of each source",
        )
    if options.report is not None:
        remedy = "leave it out: the corpus folder gets DATA_REPORT.html"
        expectation = "must come with --analyze-only, and without --executor"
        raise UserError("--report", expectation, got=options.report, remedy=remedy)


def _executor(options: argparse.Namespace) -> "Executor | None":
    """The executor that the options of `_add_executor` name. Raises UserError for those that do not fit."""
    if options.executor is None:
        for name in ("tasks", "sbatch"):
            if getattr(options, name):
                raise UserError(f"--{name}", "must come with --executor", got=getattr(options, name))
        return None
    if options.tasks is None:
        raise UserError("--executor", f"must come with --tasks N, got {options.executor} alone")
    from lumi.corpus.scale.prepare import Executor

    return Executor(
        kind=options.executor,
        num_tasks=options.tasks,
        num_workers=options.num_workers,
        sbatch=options.sbatch,
    )


def tokenizer(argv: list[str]) -> int:
    """corpus folders -> a SentencePiece tokenizer"""
    from lumi.tokenizer.training import TokenizerConfig, train_tokenizer

    arguments = parser("lumi tokenizer", summary(tokenizer))
    add_config(arguments)
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--output-dir", required=True, type=given_path)
    options = parse(arguments, argv)
    config = load_config(TokenizerConfig, options.config, options.overrides)
    trained = train_tokenizer(config, options.corpus_dirs, options.output_dir)
    print(f"{options.output_dir}: {trained.vocab_size:,} pieces, fingerprint {trained.fingerprint}")
    return 0


def tokenize(argv: list[str]) -> int:
    """corpus folders -> a token store, split into train and validation by document"""
    from lumi.chat.templates import TEMPLATES
    from lumi.data import tokenization
    from lumi.formats.hub import local_folder
    from lumi.tokenizer.loading import load_tokenizer

    texts = {
        "tokenizer": "tokenizer folder or model file",
        "fraction": "share of the documents to hold out for validation; default: 0.005",
        "corpora": "hold out these corpora instead, whole",
        "template": "layout of conversations; default: the tokenizer's",
        "max_tokens": "end conversations at the last answer within so many tokens; drop longer pairs",
        "workers": "threads, or with --executor tasks at a time; default: one per core",
    }
    arguments = parser("lumi tokenize", summary(tokenize))
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--tokenizer-dir", "--tokenizer-path", required=True, help=texts["tokenizer"])
    arguments.add_argument("--output-dir", required=True, type=given_path)
    arguments.add_argument("--validation-fraction", type=float, help=texts["fraction"])
    arguments.add_argument("--validation-corpus-dirs", nargs="+", metavar="DIR", help=texts["corpora"])
    arguments.add_argument("--template", choices=tuple(TEMPLATES), help=texts["template"])
    arguments.add_argument("--max-tokens", type=int, metavar="N", help=texts["max_tokens"])
    arguments.add_argument("--num-workers", type=int, help=texts["workers"])
    _add_executor(arguments)
    options = arguments.parse_args(argv)
    executor = _executor(options)
    tokenizer_dir = local_folder(options.tokenizer_dir, weights=False)
    settings = {
        "validation_fraction": options.validation_fraction,
        "validation_corpus_dirs": options.validation_corpus_dirs or (),
        "max_tokens": options.max_tokens,
    }
    manifest: StoreManifest | None
    if executor is None:
        manifest = tokenization.tokenize(
            options.corpus_dirs,
            load_tokenizer(tokenizer_dir),
            options.output_dir,
            template=TEMPLATES[options.template] if options.template else None,
            num_workers=options.num_workers,
            **settings,
        )
    else:
        from lumi.data.tokenize_tasks import tokenize_in_tasks

        manifest = tokenize_in_tasks(
            options.corpus_dirs,
            tokenizer_dir,
            options.output_dir,
            executor,
            template=options.template,
            **settings,
        )
        if manifest is None:
            return 0
    for name, split in manifest.splits.items():
        print(f"{name}: {split.describe(manifest.pairs)}")
    return 0
