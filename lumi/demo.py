"""The whole pipeline on text that every Python carries: documentation in, a language model out. No download."""

import dataclasses
import lzma
import os
import sys
import time
from pathlib import Path

import torch

import lumi.configs
from lumi.config import load_config, read_json
from lumi.corpus import PrepareConfig, prepare
from lumi.generate import SamplingConfig, generate
from lumi.hf_format import load_model
from lumi.kernels.bundle import select
from lumi.metrics import human, read_metrics
from lumi.model import Transformer
from lumi.parallel import choose_device
from lumi.run_config import Paths, TrainConfig
from lumi.shards import TokenStore, tokenize
from lumi.tokenizer import Tokenizer
from lumi.tokenizer_training import TokenizerConfig, train_tokenizer
from lumi.train import train

CONFIGS = Path(lumi.configs.__file__).parent / "demo"
VALIDATION_FRACTION = 0.03
LEAST_STEPS = 300  # with fewer, measured, the model does not beat xz by a clear margin
PROMPT = "Return the number of"


def demo(output_dir: Path, minutes: float, device: str) -> int:
    """Run every stage under `output_dir`; finished work is reused, an interrupted training goes on as it was begun.

    Args:
        minutes: how long training should take: on a slow machine its number of steps is cut, but not below LEAST_STEPS. 0: all steps.
        device: "auto", "cpu" or "cuda".

    Returns:
        The exit code.
    """
    started = time.monotonic()
    corpus, tokenizer_dir, tokens, run = (output_dir / name for name in ("corpus", "tokenizer", "tokens", "pretrain"))
    _title(1, "prepare", "Python's own documentation -> documents")
    prepare(load_config(PrepareConfig, CONFIGS / "prepare.json"), corpus, use_cache=True)
    _title(2, "tokenizer", "documents -> SentencePiece BPE")
    train_tokenizer(load_config(TokenizerConfig, CONFIGS / "tokenizer.json"), [corpus], tokenizer_dir)
    _title(3, "tokenize", "documents -> tokens")
    tokenizer = Tokenizer.load(tokenizer_dir)
    tokenize([corpus], tokenizer, tokens, validation_fraction=VALIDATION_FRACTION)
    _title(4, "pre-train", "tokens -> a language model")
    if not (run / "final").is_dir():
        config = _train_config(run, minutes, device)
        resume = "auto" if run.exists() else None
        code = train(config, Paths([str(tokens)], str(tokenizer_dir), run, resume=resume), device)
        if code:
            return code
    else:
        print(f"{run / 'final'} is there already; remove {output_dir} to begin anew")
    _title(5, "generate", "a prompt -> text")
    _sample(run / "final", tokenizer)
    _summary(output_dir, tokens, run, tokenizer, time.monotonic() - started)
    return 0


def _title(number: int, stage: str, what: str) -> None:
    print(f"\n[{number}/5] {stage}: {what}", flush=True)


def _train_config(run: Path, minutes: float, device: str) -> TrainConfig:
    """The demo's config, its dtype and number of steps fitted to this machine by a rehearsal; an interrupted run keeps its own."""
    if (run / "config.json").is_file():
        return load_config(TrainConfig, run / "config.json")
    config = load_config(TrainConfig, CONFIGS / "train.json")
    if choose_device(device) == "cuda":
        return config
    choices = [dataclasses.replace(config, dtype="float32"), dataclasses.replace(config, dtype="bfloat16")]
    seconds = [_step_seconds(choice) for choice in choices]
    best = choices[seconds.index(min(seconds))]
    fitting = int(minutes * 60 / min(seconds)) if minutes else config.num_steps
    steps = min(config.num_steps, max(fitting, LEAST_STEPS))
    measured = ", ".join(f"{choice.dtype} {value:.2f} s/step" for choice, value in zip(choices, seconds, strict=True))
    print(f"rehearsal: {measured} -> {best.dtype}, {steps} steps")
    return dataclasses.replace(best, num_steps=steps)


def _step_seconds(config: TrainConfig) -> float:
    """Seconds of one optimizer step's forward and backward passes: the second of two micro-batches of random tokens, times their number."""
    model = Transformer(config.model, select("reference", "cpu"), compute_dtype=getattr(torch, config.dtype)).init_weights(0)
    size, length = config.batches.micro_batch_size, config.batches.sequence_length
    tokens = torch.randint(config.model.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.arange(0, size * length + 1, length, dtype=torch.int32)
    for _ in range(2):
        begin = time.perf_counter()
        model(tokens, tokens, None, cu_seqlens).backward()
        seconds = time.perf_counter() - begin
    return seconds * config.batches.rows / size


def _sample(final: Path, tokenizer: Tokenizer) -> None:
    model = load_model(final, select("auto", "cpu")).eval()
    config = SamplingConfig(max_new_tokens=120, temperature=0.7, top_p=0.95, repetition_penalty=1.1)
    print(PROMPT, end="", flush=True)
    generate(model, tokenizer, [PROMPT], config, lambda row, text: print(text, end="", flush=True))
    print()


def held_out_text(tokens: Path, tokenizer: Tokenizer) -> bytes:
    """The validation documents of a token store, one after the other, in UTF-8."""
    split = TokenStore.open(tokens).split("validation")
    return b"".join(tokenizer.decode(split.document(index).tolist()).encode() for index in range(split.num_documents))


def _summary(output_dir: Path, tokens: Path, run: Path, tokenizer: Tokenizer, seconds: float) -> None:
    text = held_out_text(tokens, tokenizer)
    xz_bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    validation = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "validation"][-1]
    model_bits = validation["bits_per_byte"]
    config = read_json(run / "config.json")
    rows = [
        ("held-out text", f"{len(text):,} bytes that training never saw"),
        ("xz -9e", f"{xz_bits:.3f} bits per byte"),
        ("this model", f"{model_bits:.3f} bits per byte ({1 - model_bits / xz_bits:.0%} fewer)"),
        ("trained on", f"{human(config['num_steps'] * config['batches']['batch_tokens'])} tokens in {config['num_steps']} steps"),
        ("time", f"{seconds:.0f} s for what was done in this call"),
        ("corpus", output_dir / "corpus"),
        ("tokenizer", output_dir / "tokenizer"),
        ("tokens", tokens),
        ("loss curve", run / "loss.png"),
        ("metrics", run / "metrics.jsonl"),
        ("checkpoints", run / "checkpoints"),
        ("model", run / "final"),
    ]
    print("\n" + "\n".join(f"  {name:<14} {value}" for name, value in rows))
    command = os.path.relpath(Path(sys.executable).with_name("lumi"))
    print(f"\n  more text:     {command} generate --model-path {run} --prompt 'class Path'\n")
