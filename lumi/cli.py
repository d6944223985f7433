"""The `lumi` command: one subcommand a stage. Each imports what it needs when it is called."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lumi import __version__
from lumi.command_line import add_config, parse, parser, run
from lumi.config import UserError, load_config

if TYPE_CHECKING:
    from lumi.formats.pretrained import Pretrained
    from lumi.inference.generation import SamplingConfig


def prepare(argv: list[str]) -> int:
    """raw text -> a corpus folder: cleaned, filtered, de-duplicated"""
    from lumi import corpus

    arguments = parser("lumi prepare", _summary(prepare))
    add_config(arguments)
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument(
        "--use-cache", action="store_true", help="reuse finished work, go on after an interruption"
    )
    arguments.add_argument("--analyze-only", action="store_true", help="print the plan, write nothing")
    arguments.add_argument("--num-workers", type=int, help="processes; default: one per core")
    options = parse(arguments, argv)
    config = load_config(corpus.PrepareConfig, options.config, options.overrides)
    corpus.prepare(
        config,
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
    trained = train_tokenizer(
        load_config(TokenizerConfig, options.config, options.overrides),
        options.corpus_dirs,
        options.output_dir,
    )
    print(f"{options.output_dir}: {trained.vocab_size:,} pieces, fingerprint {trained.fingerprint}")
    return 0


def tokenize(argv: list[str]) -> int:
    """corpus folders -> a token store, split into train and validation by document"""
    from lumi.chat.rendering import TEMPLATES
    from lumi.data import tokenization as shards
    from lumi.tokenizer.tokenizer import Tokenizer

    arguments = parser("lumi tokenize", _summary(tokenize))
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument(
        "--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or model file"
    )
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument(
        "--validation-fraction", type=float, help="share of the documents that is held out; default: 0.005"
    )
    arguments.add_argument(
        "--validation-corpus-dirs", nargs="+", metavar="DIR", help="corpora that are held out instead, whole"
    )
    arguments.add_argument(
        "--template", choices=tuple(TEMPLATES), help="layout of conversations; default: the tokenizer's"
    )
    arguments.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="end conversations at the last answer within so many tokens",
    )
    arguments.add_argument("--num-workers", type=int, help="threads; default: one per core")
    options = arguments.parse_args(argv)
    manifest = shards.tokenize(
        options.corpus_dirs,
        Tokenizer.load(options.tokenizer_dir),
        options.output_dir,
        validation_fraction=options.validation_fraction,
        validation_corpus_dirs=options.validation_corpus_dirs or (),
        template=TEMPLATES[options.template] if options.template else None,
        max_tokens=options.max_tokens,
        num_workers=options.num_workers,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.describe()}")
    return 0


def generate(argv: list[str]) -> int:
    """continue texts, streamed; or answer JSON lines"""
    from lumi.inference import generation

    arguments = parser("lumi generate", _summary(generate))
    _add_model(arguments)
    prompts = arguments.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="one or more, several run as a batch; without it, stdin is the prompt",
    )
    prompts.add_argument(
        "--input", metavar="FILE", help='JSON lines, {"prompt": TEXT} or {"messages": [...]}; - is stdin'
    )
    arguments.add_argument(
        "--output",
        metavar="FILE",
        help="with --input: where the JSON lines with the results go; default: stdout",
    )
    arguments.add_argument(
        "--batch-size", type=int, metavar="N", help="with --input: lines at a time; default: 8"
    )
    _add_sampling(arguments, generation.SamplingConfig())
    options = arguments.parse_args(argv)
    config = _sampling(options)
    if options.input is not None:
        return _complete(options, config)
    for name in ("output", "batch_size"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} must come with --input, got none; pass --input FILE")
    texts = [_prompt_from_stdin()] if options.prompt is None else options.prompt
    model, tokenizer, *_ = _load(options)
    for number, text in enumerate(texts, start=1):  # before anything is printed
        try:
            generation.check_prompts([generation.text_ids(tokenizer, text)], model.config.max_positions)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}" if len(texts) > 1 else str(error)) from error
    if len(texts) > 1:
        completed = generation.generate(model, tokenizer, texts, config)
        print("\n\n".join(prompt + text for prompt, text in zip(texts, completed, strict=True)))
        return 0
    print(texts[0], end="", flush=True)
    try:
        generation.generate(
            model, tokenizer, texts, config, lambda row, text: print(text, end="", flush=True)
        )
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
    return text.removesuffix("\n").removesuffix(
        "\r"
    )  # `echo` and editors put it there, it is not part of the text


def _complete(options: argparse.Namespace, config: "SamplingConfig") -> int:
    """JSON lines in, JSON lines out. A finished batch is written at once."""
    from lumi.host.progress import progress_bar
    from lumi.inference.completions import complete, read_requests

    batch_size = 8 if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    to_stdout = options.output in (None, "-")
    if not to_stdout and os.path.realpath(options.output) == os.path.realpath(options.input):
        raise UserError(f"--output must be another file than --input, got {options.output} for both")
    if not to_stdout and (
        not options.output
        or os.path.isdir(options.output)
        or not os.path.isdir(os.path.dirname(options.output) or ".")
    ):
        raise UserError(
            f"--output must be a file in a folder that exists, got {options.output}; make the folder or mend the path"
        )
    try:
        data = sys.stdin.buffer.read() if options.input == "-" else Path(options.input).read_bytes()
    except OSError as error:
        raise UserError(
            f"--input must be a file that can be read, got {options.input}: {error.strerror}"
        ) from error
    model, tokenizer, *_ = _load(options)
    requests = read_requests(
        data, "stdin" if options.input == "-" else options.input, tokenizer, model.config.max_positions
    )
    with (
        contextlib.nullcontext(sys.stdout.buffer) if to_stdout else open(options.output, "wb") as file,
        progress_bar("generate", " lines", total=len(requests), disable=to_stdout) as progress,
    ):
        for batch in complete(model, tokenizer, requests, config, batch_size):
            file.writelines(
                json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n" for record in batch
            )
            file.flush()
            progress.update(len(batch))
    return 0


def chat(argv: list[str]) -> int:
    """talk to a model that was fine-tuned on conversations"""
    from lumi.inference.dialogue import Dialogue, converse
    from lumi.inference.generation import SamplingConfig

    arguments = parser("lumi chat", _summary(chat))
    _add_model(arguments)
    arguments.add_argument(
        "--system", metavar="TEXT", help="the system message, which stands before every conversation"
    )
    _add_sampling(arguments, SamplingConfig(max_new_tokens=512))
    options = arguments.parse_args(argv)
    config = _sampling(options)
    model, tokenizer, *_ = _load(options)
    return converse(Dialogue(model, tokenizer, config, options.system))


def _add_model(arguments: argparse.ArgumentParser) -> None:
    """Which model, and where and how it computes; `_load` reads these options."""
    arguments.add_argument(
        "--model-path", required=True, type=Path, help="a run folder, its final/, or a Hugging Face folder"
    )
    arguments.add_argument(
        "--adapter-path",
        metavar="PATH",
        help="a LoRA adapter, or the run that made it; the model is then its base",
    )
    arguments.add_argument(
        "--tokenizer-path", "--tokenizer-dir", help="default: the one in the model's folder"
    )
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of activations and matrix products",
    )


def _load(options: argparse.Namespace) -> "Pretrained":
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
    """How tokens are chosen; `_sampling` reads these options."""
    arguments.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, help="where to stop at the latest"
    )
    arguments.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    arguments.add_argument("--top-k", type=int, default=defaults.top_k, help="0 is off")
    arguments.add_argument("--top-p", type=float, default=defaults.top_p, help="1 is off")
    arguments.add_argument(
        "--repetition-penalty", type=float, default=defaults.repetition_penalty, help="1 is off"
    )
    arguments.add_argument(
        "--seed", type=int, default=defaults.seed, help="the same seed gives the same text"
    )


def _sampling(options: argparse.Namespace) -> "SamplingConfig":
    from lumi.inference.generation import SamplingConfig

    try:
        return SamplingConfig(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingConfig)}
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 2)}") from error


def evaluate(argv: list[str]) -> int:
    """a model -> tasks, perplexity and smoke tests, with the protocol of each figure"""
    from lumi.evaluation.evaluate import CONFIGS, EvaluationConfig
    from lumi.evaluation.evaluate import evaluate as run_evaluation

    arguments = parser("lumi evaluate", _summary(evaluate))
    add_config(
        arguments, f"{CONFIGS / 'standard.json'}, or data_dirs.json beside it where --data-dirs is given"
    )
    _add_model(arguments)
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument(
        "--data-dirs",
        nargs="+",
        metavar="DIR",
        help="token stores, or corpus folders: perplexity on their validation splits",
    )
    arguments.add_argument(
        "--limit", type=int, help="at most so many examples of each task and documents of each text"
    )
    options = parse(arguments, argv)
    path = options.config or CONFIGS / ("data_dirs.json" if options.data_dirs else "standard.json")
    config = load_config(EvaluationConfig, path, options.overrides)
    run_evaluation(
        config, _load(options), options.output_dir, data_dirs=options.data_dirs or (), limit=options.limit
    )
    return 0


def export(argv: list[str]) -> int:
    """a model in another precision, or in several files"""
    from lumi.formats import export as exporting

    arguments = parser("lumi export", _summary(export))
    arguments.add_argument(
        "--model-path", required=True, type=Path, help="a run folder, its final/, or a Hugging Face folder"
    )
    arguments.add_argument(
        "--tokenizer-path", "--tokenizer-dir", help="default: the one in the model's folder"
    )
    _add_export(arguments)
    options = arguments.parse_args(argv)
    max_shard_bytes = exporting.parse_size(options.max_shard_size) if options.max_shard_size else None
    exported = exporting.export(
        options.model_path,
        options.output_dir,
        dtype=options.dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_path=options.tokenizer_path,
    )
    print(f"{options.output_dir}: {exported}")
    return 0


def merge(argv: list[str]) -> int:
    """an adapter and its base -> one model"""
    from lumi.formats import export as exporting

    arguments = parser("lumi merge", _summary(merge))
    arguments.add_argument(
        "--model-path", required=True, type=Path, help="the adapter's folder, or the run that made it"
    )
    arguments.add_argument("--base-path", type=Path, help="default: the base that the adapter names")
    _add_export(arguments)
    options = arguments.parse_args(argv)
    max_shard_bytes = exporting.parse_size(options.max_shard_size) if options.max_shard_size else None
    exported = exporting.merge(
        options.model_path,
        options.output_dir,
        base_path=options.base_path,
        dtype=options.dtype,
        max_shard_bytes=max_shard_bytes,
    )
    print(f"{options.output_dir}: {exported}")
    return 0


def _add_export(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("--output-dir", required=True, type=Path, help="new or empty")
    arguments.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights on disk",
    )
    arguments.add_argument(
        "--max-shard-size", metavar="SIZE", help="such as 2GB; larger weights are cut into several files"
    )


def plan(argv: list[str]) -> int:
    """memory, communication, time and checkpoints of a config on many GPUs, on paper"""
    from lumi.host.devices import GPUS
    from lumi.planning.cluster import Cluster
    from lumi.planning.scale_report import describe_scale
    from lumi.training.run_config import TrainConfig

    default = {field.name: field.default for field in dataclasses.fields(Cluster)}
    arguments = parser("lumi plan", _summary(plan))
    add_config(arguments)
    arguments.add_argument("--nodes", type=int, required=True)
    arguments.add_argument("--gpus-per-node", type=int, required=True)
    arguments.add_argument("--gpu", choices=tuple(GPUS), default=default["gpu"])
    shares = {
        "mfu": "what one GPU reaches by itself, as share of its peak; measured: mfu in metrics.jsonl",
        "link-share": "what collectives reach of the bandwidths",
    }
    bandwidths = {
        "network-gbps": "gigabits/s from each GPU to other nodes",
        "nvlink-gbps": "gigabits/s from each GPU to those of its node; default: the data sheet's",
        "disk-gb-per-second": "gigabytes/s to the shared disk, from all nodes together",
        "host-gb-per-second": "gigabytes/s from each GPU to its host's memory",
    }
    for name, text in (shares | bandwidths).items():
        arguments.add_argument(f"--{name}", type=float, default=default[name.replace("-", "_")], help=text)
    options = parse(arguments, argv)
    try:
        cluster = Cluster(**{name: getattr(options, name) for name in default})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from error
    print(
        describe_scale(
            load_config(TrainConfig, options.config, options.overrides), cluster, Path(options.config).stem
        )
    )
    return 0


def demo(argv: list[str]) -> int:
    """all stages on Python's own documentation, without a download, in a few minutes"""
    from lumi import demo as pipeline

    arguments = parser("lumi demo", _summary(demo))
    arguments.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    arguments.add_argument(
        "--minutes", type=float, default=2.3, help="training is cut to fit; 0: all steps of the config"
    )
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = arguments.parse_args(argv)
    return pipeline.demo(options.output_dir, options.minutes, options.device)


COMMANDS = {
    command.__name__: command
    for command in (prepare, tokenizer, tokenize, plan, generate, chat, evaluate, export, merge, demo)
}


def _summary(command) -> str:
    return command.__doc__


def dispatch(argv: list[str]) -> int:
    """Hand over to a subcommand."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv == ["--version"]:
        print(f"lumi {__version__}")
        return 0
    usage = "\n".join(f"  {name:<10} {_summary(command)}" for name, command in COMMANDS.items())
    text = f"usage: lumi COMMAND ... (lumi COMMAND --help shows its options)\n\n{usage}\n\nTraining: torchrun lumi/train.py --help"
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"the command must be one of {', '.join(COMMANDS)}, got {argv[0]!r}")
    print(text)
    return 0 if argv else 2


def main() -> int:
    """The console script."""
    return run(dispatch)


if __name__ == "__main__":
    sys.exit(main())
