"""The whole pipeline on text that every Python carries: documentation in, a model that answers out. No download."""

import dataclasses
import lzma
import os
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import lumi.configs
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.config import load_config, read_json
from lumi.corpus import PrepareConfig, prepare, read_corpus
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize
from lumi.evaluation.evaluate import EvaluationConfig, evaluate
from lumi.formats.export import merge_adapter
from lumi.formats.pretrained import Pretrained, load_pretrained
from lumi.host.devices import choose_device
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.kernels.bundle import REFERENCE
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.training.metrics import human, read_metrics
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

CONFIGS = Path(lumi.configs.__file__).parent / "demo"
VALIDATION_FRACTION = 0.03
LEAST_SHARE = 0.577  # of the steps of the configs: 300 of 520. With fewer, measured, the model does not beat xz by a clear margin
STAGES = 9
QUESTIONS = (
    ("questions_train", "seen", 2),
    ("questions_held_out", "held out", 3),
)  # corpus, its name in the output, how many are asked


class Pace(NamedTuple):
    """The dtype in which this machine is fastest, and the share of the configs' steps that fits into the minutes."""

    dtype: Literal["float32", "bfloat16", "float16"]
    share: float


class Demo:
    """The stages and their folders below `output_dir`; each reuses what it finds finished."""

    def __init__(self, output_dir: Path, minutes: float, device: str):
        self.output_dir, self.minutes, self.device = output_dir, minutes, device
        self.number = 0

    def folder(self, name: str) -> Path:
        """The folder of one stage."""
        return self.output_dir / name

    def run(self) -> int:
        """All stages, then the summary. Returns the exit code."""
        started = time.monotonic()
        self._title("prepare", "Python's own documentation -> documents")
        prepare(load_config(PrepareConfig, CONFIGS / "prepare.json"), self.folder("corpus"), use_cache=True)
        self._title("tokenizer", "documents -> SentencePiece BPE")
        train_tokenizer(
            load_config(TokenizerConfig, CONFIGS / "tokenizer.json"),
            [self.folder("corpus")],
            self.folder("tokenizer"),
        )
        tokenizer = Tokenizer.load(self.folder("tokenizer"))
        self._title("tokenize", "documents -> tokens")
        tokenize(
            [self.folder("corpus")], tokenizer, self.folder("tokens"), validation_fraction=VALIDATION_FRACTION
        )
        self._title("pre-train", "tokens -> a language model")
        if code := self._train("pretrain", "tokens"):
            return code
        self._title("questions", "the documentation again -> questions and answers, whole modules held out")
        for name, _, _ in QUESTIONS:
            prepare(load_config(PrepareConfig, CONFIGS / f"{name}.json"), self.folder(name), use_cache=True)
        train_corpus, held_out = (self.folder(name) for name, _, _ in QUESTIONS)
        tokenize([train_corpus], tokenizer, self.folder("questions"), validation_corpus_dirs=[held_out])
        self._title("fine-tune", "the language model and questions -> an adapter (LoRA)")
        if code := self._train("finetune", "questions", self.folder("pretrain") / "final"):
            return code
        self._title("merge", "the model and its adapter -> one model")
        if self.folder("model").is_dir():
            print(f"{self.folder('model')} is there already")
        else:
            print(merge_adapter(self.folder("finetune"), self.folder("model")))
        pretrained = load_pretrained(self.folder("model"), device=self.device)
        self._title("evaluate", "the merged model -> figures, each with its protocol")
        config = load_config(EvaluationConfig, CONFIGS / "evaluation.json")
        evaluate(
            config,
            pretrained,
            self.folder("evaluation"),
            data_dirs=[self.folder("tokens"), self.folder("questions")],
        )
        self._title("answer", "questions -> answers")
        self._answer(pretrained)
        self._summary(tokenizer, time.monotonic() - started)
        return 0

    def _title(self, stage: str, what: str) -> None:
        self.number += 1
        print(f"\n[{self.number}/{STAGES}] {stage}: {what}", flush=True)

    def _train(self, name: str, data: str, model_path: Path | None = None) -> int:
        run = self.folder(name)
        if (run / "final").is_dir():
            print(f"{run / 'final'} is there already; remove {self.output_dir} to begin anew")
            return 0
        config, resume = self.config(name), "auto" if run.exists() else None
        paths = Paths(
            [str(self.folder(data))], str(self.folder("tokenizer")), run, resume=resume, model_path=model_path
        )
        return train(config, paths, self.device)

    def config(self, name: str) -> TrainConfig:
        """The config of a training: of a run that has begun its own, or the shipped one at the pace of this machine."""
        if (begun := self.folder(name) / "config.json").is_file():
            return load_config(TrainConfig, begun)
        config, pace = load_config(TrainConfig, CONFIGS / f"{name}.json"), self._pace()
        return dataclasses.replace(
            config, dtype=pace.dtype, num_steps=max(1, round(config.num_steps * pace.share))
        )

    def _pace(self) -> Pace:
        """Of pre-training that has begun already, or measured."""
        pretrain = load_config(TrainConfig, CONFIGS / "pretrain.json")
        begun = self.folder("pretrain") / "config.json"
        if begun.is_file():
            config = load_config(TrainConfig, begun)
            return Pace(config.dtype, config.num_steps / pretrain.num_steps)
        if choose_device(self.device) == "cuda":
            return Pace(pretrain.dtype, 1.0)
        return rehearse(pretrain, self.minutes)

    def _answer(self, pretrained: Pretrained) -> None:
        """Ask some of the questions that are asked of the corpus, and print what it says beside what the model says."""
        model, tokenizer = pretrained.model, pretrained.tokenizer
        for name, side, count in QUESTIONS:
            asked = [
                messages
                for batch in read_corpus(self.folder(name)).iter_conversations()
                for messages in batch.conversations
            ]
            chosen = [asked[(2 * index + 1) * len(asked) // (2 * count)] for index in range(count)]
            prompts = [prompt_ids(tokenizer, messages[:-1]) for messages in chosen]
            greedy = SamplingConfig(max_new_tokens=80, temperature=0.0)
            answers = generate_ids(
                model, prompts, greedy, stop_ids=stop_ids(tokenizer), pad_id=filler_id(tokenizer)
            )
            for messages, answer in zip(chosen, answers, strict=True):
                end = "" if answer.stopped else " ... [cut]"
                print(f"\n  [{side}] {messages[-2].content}")
                print(f"    model:         {tokenizer.decode(answer.ids, continues=True)}{end}")
                print(f"    documentation: {messages[-1].content}")

    def _summary(self, tokenizer: Tokenizer, seconds: float) -> None:
        text = held_out_text(self.folder("tokens"), tokenizer)
        xz_bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
        model_bits = self._validations("pretrain")[-1]["bits_per_byte"]
        before, *_, after = self._validations("finetune")
        rows = [
            ("held-out text", f"{len(text):,} bytes that training never saw"),
            ("xz -9e", f"{xz_bits:.3f} bits per byte"),
            ("this model", f"{model_bits:.3f} bits per byte ({1 - model_bits / xz_bits:.0%} fewer)"),
            ("trained on", self._trained_on("pretrain")),
            ("answers", f"{before['tokens']:,} tokens of answers about modules that fine-tuning never saw"),
            ("before", f"{before['loss']:.3f} nats per token"),
            ("after", f"{after['loss']:.3f} nats per token"),
            ("tuned on", self._trained_on("finetune")),
            ("time", f"{seconds:.0f} s for what was done in this call"),
            *(
                (name, self.folder(name))
                for name in (
                    "corpus",
                    "tokenizer",
                    "tokens",
                    "pretrain",
                    "questions",
                    "finetune",
                    "evaluation",
                )
            ),
            ("model", self.folder("model")),
        ]
        print("\n" + "\n".join(f"  {name:<14} {value}" for name, value in rows))
        command = os.path.relpath(Path(sys.executable).with_name("lumi"))
        print(f"\n  talk to it:    {command} chat --model-path {self.folder('model')} --temperature 0")
        print(
            f"  more text:     {command} generate --model-path {self.folder('pretrain')} --prompt 'class Path'\n"
        )

    def _validations(self, run: str) -> list[dict]:
        return [
            record
            for record in read_metrics(self.folder(run) / "metrics.jsonl")
            if record["kind"] == "validation"
        ]

    def _trained_on(self, run: str) -> str:
        config = read_json(self.folder(run) / "config.json")
        return f"{human(config['num_steps'] * config['batches']['batch_tokens'])} tokens in {config['num_steps']} steps"


def demo(output_dir: Path, minutes: float, device: str) -> int:
    """Run every stage under `output_dir`; finished work is reused, an interrupted training goes on as it was begun.

    Args:
        minutes: how long pre-training should take: on a slow machine the steps of both trainings are cut, but not below LEAST_SHARE of
            those in the configs. 0: all steps.
        device: "auto", "cpu" or "cuda".

    Returns:
        The exit code.
    """
    return Demo(output_dir, minutes, device).run()


def rehearse(config: TrainConfig, minutes: float) -> Pace:
    """Measure a step in float32 and in bfloat16: the faster of them, and the share of the steps that fits into the minutes (0: all)."""
    choices = [dataclasses.replace(config, dtype="float32"), dataclasses.replace(config, dtype="bfloat16")]
    seconds = [step_seconds(choice) for choice in choices]
    best = choices[seconds.index(min(seconds))]
    share = min(1.0, max(minutes * 60 / min(seconds) / config.num_steps, LEAST_SHARE)) if minutes else 1.0
    measured = ", ".join(
        f"{choice.dtype} {value:.2f} s/step" for choice, value in zip(choices, seconds, strict=True)
    )
    print(f"rehearsal: {measured} -> {best.dtype}, {share:.0%} of {config.num_steps} steps")
    return Pace(best.dtype, share)


def step_seconds(config: TrainConfig) -> float:
    """Seconds of one optimizer step's forward and backward passes: the second of two micro-batches of random tokens, times their number."""
    assert config.model is not None
    model = Transformer(config.model, REFERENCE, compute_dtype=getattr(torch, config.dtype)).init_weights(0)
    size, length = config.batches.micro_batch_rows, config.batches.sequence_length
    tokens = torch.randint(
        config.model.vocab_size, (size, length), generator=torch.Generator().manual_seed(0)
    )
    cu_seqlens = torch.arange(0, size * length + 1, length, dtype=torch.int32)
    for _ in range(2):
        begin = time.perf_counter()
        model(tokens, tokens, None, cu_seqlens).backward()
        seconds = time.perf_counter() - begin
    return seconds * config.batches.rows / size


def held_out_text(tokens: Path, tokenizer: Tokenizer) -> bytes:
    """The validation documents of a token store, one after the other, in UTF-8."""
    split = TokenStore.open(tokens).split("validation")
    return b"".join(
        tokenizer.decode(split.document(index).tolist()).encode() for index in range(split.num_documents)
    )
