"""The `lumi` command: one subcommand for each stage. A subcommand imports what it needs when it is called."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lumi import __version__
from lumi.command_line import (
    add_cache_dir,
    add_config,
    add_model,
    add_numbers,
    add_whole_model,
    extra,
    from_options,
    option_name,
    parse,
    parser,
    run,
    split_overrides,
)
from lumi.config import UserError, load_config

if TYPE_CHECKING:
    from lumi.formats.export_form import ExportForm
    from lumi.formats.pretrained import Pretrained
    from lumi.inference.generation import SamplingConfig


def prepare(argv: list[str]) -> int:
    """raw text -> a corpus folder: cleaned, filtered, de-duplicated"""
    from lumi import corpus

    arguments = parser("lumi prepare", _summary(prepare))
    add_config(arguments)
    arguments.add_argument("--output-dir", required=True, type=Path)
    cache = "reuse finished work, go on after an interruption"
    arguments.add_argument("--use-cache", action="store_true", help=cache)
    arguments.add_argument("--analyze-only", action="store_true", help="print the plan, write nothing")
    arguments.add_argument("--num-workers", type=int, help="processes; default: one per core")
    options = parse(arguments, argv)
    corpus.prepare(
        load_config(corpus.PrepareConfig, options.config, options.overrides),
        options.output_dir,
        use_cache=options.use_cache,
        analyze_only=options.analyze_only,
        num_workers=options.num_workers,
    )
    return 0


def tokenizer(argv: list[str]) -> int:
    """corpus folders -> a SentencePiece tokenizer"""
    from lumi.tokenizer.training import TokenizerConfig, train_tokenizer

    arguments = parser("lumi tokenizer", _summary(tokenizer))
    add_config(arguments)
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--output-dir", required=True, type=Path)
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
        "workers": "threads; default: one per core",
    }
    arguments = parser("lumi tokenize", _summary(tokenize))
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--tokenizer-dir", "--tokenizer-path", required=True, help=texts["tokenizer"])
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument("--validation-fraction", type=float, help=texts["fraction"])
    arguments.add_argument("--validation-corpus-dirs", nargs="+", metavar="DIR", help=texts["corpora"])
    arguments.add_argument("--template", choices=tuple(TEMPLATES), help=texts["template"])
    arguments.add_argument("--max-tokens", type=int, metavar="N", help=texts["max_tokens"])
    arguments.add_argument("--num-workers", type=int, help=texts["workers"])
    options = arguments.parse_args(argv)
    manifest = tokenization.tokenize(
        options.corpus_dirs,
        load_tokenizer(local_folder(options.tokenizer_dir, weights=False)),
        options.output_dir,
        validation_fraction=options.validation_fraction,
        validation_corpus_dirs=options.validation_corpus_dirs or (),
        template=TEMPLATES[options.template] if options.template else None,
        max_tokens=options.max_tokens,
        num_workers=options.num_workers,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.describe(manifest.pairs)}")
    return 0


def generate(argv: list[str]) -> int:
    """continue texts, streamed; or answer JSON lines"""
    from lumi.inference.generation import SamplingConfig

    texts = {
        "prompt": "one or more, several run as a batch; without it, stdin is the prompt",
        "input": 'JSON lines, {"prompt": TEXT} or {"messages": [...]}; - is stdin',
        "output": "with --input: the file for the JSON lines with the results; default: stdout",
        "batch_size": "with --input: lines at a time; default: 8",
    }
    arguments = parser("lumi generate", _summary(generate))
    add_model(arguments)
    prompts = arguments.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help=texts["prompt"])
    prompts.add_argument("--input", metavar="FILE", help=texts["input"])
    arguments.add_argument("--output", metavar="FILE", help=texts["output"])
    arguments.add_argument("--batch-size", type=int, metavar="N", help=texts["batch_size"])
    _add_sampling(arguments, SamplingConfig())
    options = arguments.parse_args(argv)
    sampling = from_options(SamplingConfig, options)
    if options.input is not None:
        return _complete_lines(options, sampling)
    for name in ("output", "batch_size"):
        if getattr(options, name) is not None:
            remedy = "pass --input FILE"
            raise UserError(option_name(name), "must come with --input", got="none", remedy=remedy)
    return _continue_texts(options, sampling)


def _continue_texts(options: argparse.Namespace, sampling: "SamplingConfig") -> int:
    """Print one prompt and its continuation as it comes, or several when all are complete."""
    from lumi.inference.generation import check_prompts, generate, text_ids

    texts = [_prompt_from_stdin()] if options.prompt is None else options.prompt
    model, tokenizer, *_ = _load(options)
    for number, text in enumerate(texts, start=1):  # before anything is printed
        try:
            check_prompts([text_ids(tokenizer, text)], model.config.max_positions)
        except UserError as error:
            if len(texts) == 1:
                raise
            raise error.within(f"prompt {number}") from error
    if len(texts) > 1:
        completed = generate(model, tokenizer, texts, sampling)
        print("\n\n".join(prompt + text for prompt, text in zip(texts, completed, strict=True)))
        return 0
    print(texts[0], end="", flush=True)
    try:
        generate(model, tokenizer, texts, sampling, lambda _row, text: print(text, end="", flush=True))
    finally:
        print()  # an error begins on a line of its own
    return 0


def _prompt_from_stdin() -> str:
    if sys.stdin.isatty():
        print("type the prompt, then Ctrl-D on a line of its own (or use --prompt)", file=sys.stderr)
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin must be UTF-8, got another byte at {error.start}") from error
    if not text.strip():
        raise UserError('the prompt on stdin must hold text, got none; to begin from nothing use --prompt ""')
    return text.removesuffix("\n").removesuffix("\r")  # the line end that `echo` and editors add


def _complete_lines(options: argparse.Namespace, sampling: "SamplingConfig") -> int:
    """Answer a file of JSON lines."""
    from lumi.inference.completions import check_files, complete_file, read_prompts

    batch_size = 8 if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise UserError("--batch-size", "must be at least 1", got=batch_size)
    target = None if options.output == "-" else options.output
    check_files(options.input, target)
    try:
        data = sys.stdin.buffer.read() if options.input == "-" else Path(options.input).read_bytes()
    except OSError as error:
        got = f"{options.input}: {error.strerror}"
        raise UserError("--input", "must be a file that can be read", got=got) from error
    model, tokenizer, *_ = _load(options)
    where = "stdin" if options.input == "-" else options.input
    prompts = read_prompts(data, where, tokenizer, model.config.max_positions)
    complete_file(model, tokenizer, prompts, sampling, batch_size, target)
    return 0


def chat(argv: list[str]) -> int:
    """talk to a model that was fine-tuned on conversations"""
    from lumi.inference.dialogue import Dialogue, converse
    from lumi.inference.generation import SamplingConfig

    arguments = parser("lumi chat", _summary(chat))
    add_model(arguments)
    system = "the system message, which stands before every conversation"
    arguments.add_argument("--system", metavar="TEXT", help=system)
    _add_sampling(arguments, SamplingConfig(max_new_tokens=512))
    options = arguments.parse_args(argv)
    sampling = from_options(SamplingConfig, options)
    model, tokenizer, *_ = _load(options)
    return converse(Dialogue(model, tokenizer, sampling, options.system))


def serve(argv: list[str]) -> int:
    """the OpenAI HTTP API for a model, and a chat page"""
    from lumi.server.limits import Limits

    texts = {
        "max_batch": "choices that are generated at the same time",
        "max_queue": "choices that wait for their turn; others get 429",
        "max_choices": "choices of one request: n for each of its prompts",
        "max_tokens": "tokens that one choice may generate",
        "max_body_bytes": "bytes of a request",
        "request_seconds": "seconds that a request may take",
    }
    cache = "tokens of all running choices together; default: 1,024 for each of --max-batch"
    key = "what clients must send; better in LUMI_API_KEY, where other users of the machine do not see it"
    arguments = parser("lumi serve", _summary(serve))
    add_model(arguments)
    arguments.add_argument("--host", default="127.0.0.1", help="others need --api-key")
    arguments.add_argument("--port", type=int, default=8000, help="0: any free one")
    arguments.add_argument("--api-key", metavar="KEY", help=key)
    arguments.add_argument("--model-name", metavar="NAME", help="for clients; default: that of its folder")
    arguments.add_argument("--open", action="store_true", help="open the chat page in a browser")
    add_numbers(arguments, Limits, texts)
    arguments.add_argument("--cache-tokens", type=int, metavar="N", help=cache)
    options = arguments.parse_args(argv)
    with extra("serve"):
        from lumi.server import serve as server
    return server.serve(
        lambda: _load(options),
        options.model_name or server.default_name(options.model_path, options.adapter_path),
        from_options(Limits, options),
        host=options.host,
        port=options.port,
        api_key=os.environ.get("LUMI_API_KEY") or None if options.api_key is None else options.api_key,
        opens_browser=options.open,
    )


def _load(options: argparse.Namespace) -> "Pretrained":
    """The model that the options of `add_model` name."""
    import torch

    from lumi.formats.pretrained import load_pretrained

    return load_pretrained(
        options.model_path,
        adapter_path=options.adapter_path,
        tokenizer_path=options.tokenizer_path,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )


def _add_sampling(arguments: argparse.ArgumentParser, defaults: "SamplingConfig") -> None:
    texts = {
        "max_new_tokens": "where to stop at the latest",
        "temperature": "0 is greedy",
        "top_k": "0 is off",
        "top_p": "1 is off",
        "repetition_penalty": "1 is off",
        "seed": "the same seed gives the same text",
    }
    add_numbers(arguments, defaults, texts)


def evaluate(argv: list[str]) -> int:
    """a model -> tasks, perplexity and smoke tests, with the protocol of each figure"""
    from lumi.evaluation.evaluate import CONFIGS, EvaluationConfig
    from lumi.evaluation.evaluate import evaluate as run_evaluation

    standard, with_data = CONFIGS / "standard.json", CONFIGS / "data_dirs.json"
    data = "token stores, or corpus folders: perplexity on their validation splits"
    limit = "at most so many examples of each task and documents of each text"
    arguments = parser("lumi evaluate", _summary(evaluate))
    add_config(arguments, f"{standard}, or {with_data.name} beside it where --data-dirs is given")
    add_model(arguments)
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument("--data-dirs", nargs="+", metavar="DIR", help=data)
    add_cache_dir(arguments)
    arguments.add_argument("--limit", type=int, help=limit)
    options = parse(arguments, argv)
    path = options.config or (with_data if options.data_dirs else standard)
    config = load_config(EvaluationConfig, path, options.overrides)
    run_evaluation(
        config,
        _load(options),
        options.output_dir,
        data_dirs=options.data_dirs or (),
        cache_dir=options.cache_dir,
        limit=options.limit,
    )
    return 0


def export(argv: list[str]) -> int:
    """a model in another precision, in several files, or as GGUF"""
    from lumi.formats.export import export_model

    arguments = parser("lumi export", _summary(export))
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

    arguments = parser("lumi merge", _summary(merge))
    adapter = "the adapter's folder, or the run that made it"
    arguments.add_argument("--model-path", required=True, type=Path, help=adapter)
    arguments.add_argument("--base-path", type=Path, help="default: the base that the adapter names")
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
    arguments.add_argument("--output-dir", required=True, type=Path, help="new or empty")
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
    arguments = parser("lumi verify", f"{_summary(verify)}. {more}")
    arguments.add_argument("path", type=Path, metavar="PATH", help=texts["path"])
    arguments.add_argument("--search", nargs="+", default=[], type=Path, metavar="DIR", help=texts["search"])
    arguments.add_argument("--json", action="store_true", help=texts["json"])
    options = arguments.parse_args(argv)
    link = chain.verify(options.path, options.search)
    print(to_json(link) if options.json else tree(link))
    return 1 if link.is_broken else 0


def plan(argv: list[str]) -> int:
    """memory, communication, time and checkpoints of a config on many GPUs, on paper"""
    from lumi.host.devices import GPUS
    from lumi.planning.cluster import Cluster
    from lumi.planning.scale_report import describe_scale
    from lumi.training.run_config import TrainConfig

    texts = {
        "mfu": "what one GPU reaches by itself, as share of its peak; measured: mfu in metrics.jsonl",
        "link_share": "what collectives reach of the bandwidths",
        "network_gbps": "gigabits/s from each GPU to other nodes",
        "nvlink_gbps": "gigabits/s from each GPU to those of its node; default: the data sheet's",
        "disk_gb_per_second": "gigabytes/s to the shared disk, from all nodes together",
        "host_gb_per_second": "gigabytes/s from each GPU to its host's memory",
    }
    arguments = parser("lumi plan", _summary(plan))
    add_config(arguments)
    arguments.add_argument("--nodes", type=int, required=True)
    arguments.add_argument("--gpus-per-node", type=int, required=True)
    arguments.add_argument("--gpu", choices=tuple(GPUS), default=Cluster.gpu)
    add_numbers(arguments, Cluster, texts)
    options = parse(arguments, argv)
    cluster = from_options(Cluster, options)
    config = load_config(TrainConfig, options.config, options.overrides)
    print(describe_scale(config, cluster, Path(options.config).stem))
    return 0


def report(argv: list[str]) -> int:
    """curves, figures and evaluations of runs on one HTML page"""
    from lumi.reporting.page import write_report

    texts = {
        "run": "a run folder; several are drawn over each other",
        "output": "default: report.html in the first run's folder",
        "evaluations": "folders of evaluations, beside those found in and next to the runs",
    }
    arguments = parser("lumi report", _summary(report))
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=texts["run"])
    arguments.add_argument("--output", type=Path, metavar="FILE", help=texts["output"])
    arguments.add_argument(
        "--evaluations", nargs="+", type=Path, default=(), metavar="DIR", help=texts["evaluations"]
    )
    options = arguments.parse_args(argv)
    output = options.output or options.runs[0] / "report.html"
    for note in write_report(options.runs, output, options.evaluations):
        print(note)
    print(f"wrote {output}")
    return 0


def demo(argv: list[str]) -> int:
    """all stages on Python's own documentation, without a download, in a few minutes"""
    import lumi.demo

    arguments = parser("lumi demo", _summary(demo))
    minutes = "what the whole demo may take on a CPU; training is cut to fit; 0: all steps of the config"
    arguments.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    arguments.add_argument("--minutes", type=float, default=4.0, help=minutes)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = arguments.parse_args(argv)
    return lumi.demo.demo(options.output_dir, options.minutes, options.device)


def finetune(argv: list[str]) -> int:
    """a model and chat data -> a fine-tuned model, all settings chosen"""
    import lumi.finetune

    texts = {
        "model": "a model folder, a finished run, or org/name on the hub",
        "data": ".jsonl, .json or .parquet files of conversations or of pairs, or one dataset on the hub",
        "split": "of a dataset on the hub; default: train",
        "epochs": "passes over the data; default: 3 for few conversations down to 1 for many",
        "merge": "also write OUTPUT_DIR/model, with the adapter merged",
        "chatml": "add the tokens of ChatML to a copy of a model that has no chat template",
    }
    changes = "Settings are changed by key.subkey=value, such as optimizer.peak_lr=3e-4."
    arguments = parser("lumi finetune", f"{_summary(finetune)}. {changes}")
    arguments.add_argument("model", type=Path, metavar="MODEL", help=texts["model"])
    arguments.add_argument("data", nargs="+", metavar="DATA", help=texts["data"])
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument("--split", help=texts["split"])
    arguments.add_argument("--epochs", type=float, help=texts["epochs"])
    arguments.add_argument("--merge", action="store_true", help=texts["merge"])
    arguments.add_argument("--add-chatml", action="store_true", help=texts["chatml"])
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    overrides, others = split_overrides(argv)
    options = arguments.parse_args(others)
    return lumi.finetune.finetune(
        options.model,
        options.data,
        options.output_dir,
        split=options.split,
        epochs=options.epochs,
        merge=options.merge,
        add_chatml=options.add_chatml,
        device=options.device,
        overrides=overrides,
    )


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
    arguments = parser("lumi push", _summary(push))
    arguments.add_argument("run", type=Path, metavar="RUN", help=texts["run"])
    arguments.add_argument("repo", metavar="OWNER/NAME")
    for name in ("dry_run", "private", "replace_card"):
        arguments.add_argument(option_name(name), action="store_true", help=texts[name])
    arguments.add_argument("--branch", help=texts["branch"])
    arguments.add_argument("--license", metavar="ID", help=texts["license"])
    arguments.add_argument("--base-model", metavar="OWNER/NAME", help=texts["base_model"])
    for name in ("search", "evaluations"):
        folders = arguments.add_argument(option_name(name), nargs="+", type=Path, metavar="DIR", default=[])
        folders.help = texts[name]
    options = arguments.parse_args(argv)
    push_model(options.run, options.repo, from_options(PushOptions, options))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    command.__name__: command
    for command in (
        prepare,
        tokenizer,
        tokenize,
        plan,
        generate,
        chat,
        serve,
        evaluate,
        export,
        merge,
        verify,
        finetune,
        report,
        push,
        demo,
    )
}


def _summary(command: Callable[[list[str]], int]) -> str:
    return command.__doc__ or ""


def dispatch(argv: list[str]) -> int:
    """Hand over to a subcommand."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv == ["--version"]:
        print(f"lumi {__version__}")
        return 0
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError("the command", f"must be one of {', '.join(COMMANDS)}", got=repr(argv[0]))
    print("usage: lumi COMMAND ... (lumi COMMAND --help shows its options)\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<10} {_summary(command)}")
    print("\nTraining: torchrun lumi/train.py --help")
    return 0 if argv else 2


def main() -> int:
    """The console script."""
    return run(dispatch)


if __name__ == "__main__":
    sys.exit(main())
