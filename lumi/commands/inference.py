"""A model answers: `lumi generate`, `lumi chat`, `lumi serve`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lumi.command_line import add_numbers, extra, from_options, option_name, parser, summary
from lumi.commands.model_options import add_model, load_model
from lumi.config import UserError

if TYPE_CHECKING:
    from lumi.inference.generation import SamplingConfig


def generate(argv: list[str]) -> int:
    """continue texts, streamed; or answer JSON lines"""
    from lumi.inference.generation import SamplingConfig

    texts = {
        "prompt": "one or more, several run as a batch; without it, stdin is the prompt",
        "input": 'JSON lines, {"prompt": TEXT} or {"messages": [...]}; - is stdin',
        "output": "with --input: the file for the JSON lines with the results; default: stdout",
        "batch_size": "with --input: lines at a time; default: 8",
    }
    arguments = parser("lumi generate", summary(generate))
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
    model, tokenizer, *_ = load_model(options)
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
    model, tokenizer, *_ = load_model(options)
    where = "stdin" if options.input == "-" else options.input
    prompts = read_prompts(data, where, tokenizer, model.config.max_positions)
    complete_file(model, tokenizer, prompts, sampling, batch_size, target)
    return 0


def chat(argv: list[str]) -> int:
    """talk to a model that was fine-tuned on conversations"""
    from lumi.inference.dialogue import Dialogue, converse
    from lumi.inference.generation import SamplingConfig

    arguments = parser("lumi chat", summary(chat))
    add_model(arguments)
    system = "the system message, which stands before every conversation"
    arguments.add_argument("--system", metavar="TEXT", help=system)
    _add_sampling(arguments, SamplingConfig(max_new_tokens=512))
    options = arguments.parse_args(argv)
    sampling = from_options(SamplingConfig, options)
    model, tokenizer, *_ = load_model(options)
    return converse(Dialogue(model, tokenizer, sampling, options.system))


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


def serve(argv: list[str]) -> int:
    """the OpenAI HTTP API for a model, and a chat page"""
    from lumi.server.limits import Limits

    texts = {
        "max_batch": "choices that are generated at the same time",
        "max_queue": "choices that wait for their turn; others get 429",
        "max_tokens": "tokens that one choice may generate",
        "max_body_bytes": "bytes of a request",
        "request_seconds": "seconds that a request may take",
    }
    cache = "tokens of all running choices together; default: 1,024 for each of --max-batch"
    choices = "choices of one request: n for each of its prompts; default: 16, or all that may run and wait"
    key = "what clients must send; better in LUMI_API_KEY, where other users of the machine do not see it"
    arguments = parser("lumi serve", summary(serve))
    add_model(arguments)
    arguments.add_argument("--host", default="127.0.0.1", help="others need --api-key")
    arguments.add_argument("--port", type=int, default=8000, help="0: any free one")
    arguments.add_argument("--api-key", metavar="KEY", help=key)
    arguments.add_argument("--model-name", metavar="NAME", help="for clients; default: that of its folder")
    arguments.add_argument("--open", action="store_true", help="open the chat page in a browser")
    add_numbers(arguments, Limits, texts)
    arguments.add_argument("--max-choices", type=int, metavar="N", help=choices)
    arguments.add_argument("--cache-tokens", type=int, metavar="N", help=cache)
    options = arguments.parse_args(argv)
    if options.model_name is not None and not options.model_name.strip():
        remedy = "leave it out for the name of the model's folder"
        raise UserError("--model-name", "must not be empty", got=repr(options.model_name), remedy=remedy)
    with extra("serve"):
        from lumi.server import serve as server
    return server.serve(
        lambda: load_model(options),
        options.model_name or server.default_name(options.model_path, options.adapter_path),
        from_options(Limits, options),
        host=options.host,
        port=options.port,
        api_key=os.environ.get("LUMI_API_KEY") or None if options.api_key is None else options.api_key,
        opens_browser=options.open,
    )
