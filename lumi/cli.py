"""The `lumi` command: one subcommand a stage. Each imports what it needs when it is called."""

import sys
from pathlib import Path

from lumi import __version__
from lumi.command_line import add_config, parse, parser, run
from lumi.config import UserError, load_config


def prepare(argv: list[str]) -> int:
    """raw text -> a corpus folder: cleaned, filtered, de-duplicated"""
    from lumi import corpus

    arguments = parser("lumi prepare", _summary(prepare))
    add_config(arguments)
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument("--use-cache", action="store_true", help="reuse finished work, go on after an interruption")
    arguments.add_argument("--analyze-only", action="store_true", help="print the plan, write nothing")
    arguments.add_argument("--num-workers", type=int, help="processes; default: one per core")
    options = parse(arguments, argv)
    config = load_config(corpus.PrepareConfig, options.config, options.overrides)
    corpus.prepare(
        config, options.output_dir, use_cache=options.use_cache, analyze_only=options.analyze_only, num_workers=options.num_workers
    )
    return 0


def tokenizer(argv: list[str]) -> int:
    """corpus folders -> a SentencePiece tokenizer"""
    from lumi.tokenizer_training import TokenizerConfig, train_tokenizer

    arguments = parser("lumi tokenizer", _summary(tokenizer))
    add_config(arguments)
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--output-dir", required=True, type=Path)
    options = parse(arguments, argv)
    trained = train_tokenizer(load_config(TokenizerConfig, options.config, options.overrides), options.corpus_dirs, options.output_dir)
    print(f"{options.output_dir}: {trained.vocab_size:,} pieces, fingerprint {trained.fingerprint}")
    return 0


def tokenize(argv: list[str]) -> int:
    """corpus folders -> a token store, split into train and validation by document"""
    from lumi import shards
    from lumi.tokenizer import Tokenizer

    arguments = parser("lumi tokenize", _summary(tokenize))
    arguments.add_argument("--corpus-dirs", nargs="+", required=True, metavar="DIR")
    arguments.add_argument("--tokenizer-dir", "--tokenizer-path", required=True, help="tokenizer folder or model file")
    arguments.add_argument("--output-dir", required=True, type=Path)
    arguments.add_argument("--validation-fraction", type=float, default=0.005, help="share of the documents that is held out")
    arguments.add_argument("--num-workers", type=int, help="threads; default: one per core")
    options = arguments.parse_args(argv)
    manifest = shards.tokenize(
        options.corpus_dirs,
        Tokenizer.load(options.tokenizer_dir),
        options.output_dir,
        validation_fraction=options.validation_fraction,
        num_workers=options.num_workers,
    )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes / split.tokens:.2f} bytes per token")
    return 0


def generate(argv: list[str]) -> int:
    """continue a text, streamed"""
    from lumi import generate as generation
    from lumi.hf_format import load_model, model_folder
    from lumi.kernels.bundle import select
    from lumi.parallel import choose_device
    from lumi.tokenizer import Tokenizer

    defaults = generation.SamplingConfig()
    arguments = parser("lumi generate", _summary(generate))
    arguments.add_argument("--model-path", required=True, type=Path, help="a run folder, or its final/")
    arguments.add_argument("--tokenizer-path", "--tokenizer-dir", help="default: the one in the model's folder")
    arguments.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more; several run as a batch")
    arguments.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    arguments.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    arguments.add_argument("--top-k", type=int, default=defaults.top_k, help="0 is off")
    arguments.add_argument("--top-p", type=float, default=defaults.top_p, help="1 is off")
    arguments.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, help="1 is off")
    arguments.add_argument("--seed", type=int, default=defaults.seed)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = arguments.parse_args(argv)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    try:
        config = generation.SamplingConfig(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 2)}") from error
    device = choose_device(options.device)
    folder = model_folder(options.model_path)
    tokenizer = Tokenizer.load(options.tokenizer_path or folder)
    model = load_model(folder, select("auto", device), tokenizer=tokenizer).to(device).eval()
    single = len(options.prompt) == 1
    if single:
        print(options.prompt[0], end="", flush=True)
    stream = (lambda row, text: print(text, end="", flush=True)) if single else None
    texts = generation.generate(model, tokenizer, options.prompt, config, stream)
    if single:
        print()
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(options.prompt, texts, strict=True)))
    return 0


def demo(argv: list[str]) -> int:
    """all stages on Python's own documentation, without a download, in a few minutes"""
    from lumi import demo as pipeline

    arguments = parser("lumi demo", _summary(demo))
    arguments.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    arguments.add_argument("--minutes", type=float, default=2.3, help="training is cut to fit; 0: all steps of the config")
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = arguments.parse_args(argv)
    return pipeline.demo(options.output_dir, options.minutes, options.device)


COMMANDS = {command.__name__: command for command in (prepare, tokenizer, tokenize, generate, demo)}


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
