"""The whole pipeline on text that every Python carries, without a download.

Python's own documentation goes in. A small model that answers questions about it comes out.
"""

import lzma
import os
import sys
import time
from pathlib import Path

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
from lumi.planning.pace import FULL, Pace, pace_of, plan, shipped
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.tokenizer.training import TokenizerConfig, train_tokenizer
from lumi.training.metrics import human, read_metrics
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

VALIDATION_FRACTION = 0.03
NUM_STAGES = 9
QUESTIONS = (
    ("questions_train", "seen", 2),
    ("questions_held_out", "held out", 3),
)  # of each, so many are asked


class Demo:
    """The stages and their folders below `output_dir`. Each stage reuses what it finds finished."""

    def __init__(self, output_dir: Path, minutes: float, device: str):
        self.output_dir, self.minutes, self.device = output_dir, minutes, device
        self.number, self.started = 0, time.monotonic()

    def folder(self, name: str) -> Path:
        """The folder of one stage."""
        return self.output_dir / name

    def run(self) -> int:
        """Run all stages and print the summary. Returns the exit code."""
        tokenizer = self._prepare_data()
        pace = self._pace()
        self._title("pre-train", "tokens -> a language model")
        if code := self._train("pretrain", "tokens", pace):
            return code
        self._title("fine-tune", "the language model and questions -> an adapter (LoRA)")
        if code := self._train("finetune", "questions", pace, self.folder("pretrain") / "final"):
            return code
        self._title("merge", "the model and its adapter -> one model")
        if self.folder("model").is_dir():
            print(f"{self.folder('model')} is there already")
        else:
            print(merge_adapter(self.folder("finetune"), self.folder("model")))
        pretrained = load_pretrained(self.folder("model"), device=self.device)
        self._title("evaluate", "the merged model -> figures, each with its protocol")
        config = load_config(EvaluationConfig, shipped("evaluation"))
        stores = [self.folder("tokens"), self.folder("questions")]
        evaluate(config, pretrained, self.folder("evaluation"), data_dirs=stores)
        self._title("answer", "questions -> answers")
        self._answer(pretrained)
        self._summary(tokenizer, time.monotonic() - self.started)
        return 0

    def _prepare_data(self) -> Tokenizer:
        """Everything that training needs: the token stores of text and of questions."""
        self._title("prepare", "Python's own documentation -> documents")
        corpus, tokenizer_dir = self.folder("corpus"), self.folder("tokenizer")
        prepare(load_config(PrepareConfig, shipped("prepare")), corpus, use_cache=True)
        self._title("tokenizer", "documents -> SentencePiece BPE")
        train_tokenizer(load_config(TokenizerConfig, shipped("tokenizer")), [corpus], tokenizer_dir)
        tokenizer = load_tokenizer(tokenizer_dir)
        self._title("tokenize", "documents -> tokens")
        tokenize([corpus], tokenizer, self.folder("tokens"), validation_fraction=VALIDATION_FRACTION)
        self._title("questions", "the documentation again -> questions and answers, whole modules held out")
        for name, _, _ in QUESTIONS:  # so few that starting processes would take longer
            config = load_config(PrepareConfig, shipped(name))
            prepare(config, self.folder(name), use_cache=True, num_workers=1)
        train_corpus, held_out = (self.folder(name) for name, _, _ in QUESTIONS)
        tokenize([train_corpus], tokenizer, self.folder("questions"), validation_corpus_dirs=[held_out])
        return tokenizer

    def _title(self, stage: str, what: str) -> None:
        self.number += 1
        print(f"\n[{self.number}/{NUM_STAGES}] {stage}: {what}", flush=True)

    def _train(self, name: str, data: str, pace: Pace, model_path: Path | None = None) -> int:
        run, begun = self.folder(name), self.folder(name) / "config.json"
        if (run / "final").is_dir():
            print(f"{run / 'final'} is there already; remove {self.output_dir} to begin anew")
            return 0
        config = pace.config(pace.name if name == "pretrain" else name)
        if begun.is_file():
            config = load_config(TrainConfig, begun)
        resume = "auto" if run.exists() else None
        stores, tokenizer = [str(self.folder(data))], str(self.folder("tokenizer"))
        return train(config, Paths(stores, tokenizer, run, resume=resume, model_path=model_path), self.device)

    def _pace(self) -> Pace:
        """The pace of a pre-training that has begun, or a new one that fits into the minutes."""
        begun = self.folder("pretrain") / "config.json"
        if begun.is_file():
            return pace_of(load_config(TrainConfig, begun))
        if choose_device(self.device) == "cuda":
            return FULL
        splits = [TokenStore.open(self.folder(name)).split("validation") for name in ("tokens", "questions")]
        return plan(self.minutes, self.started, *(split.num_tokens for split in splits))

    def _answer(self, pretrained: Pretrained) -> None:
        """Ask some questions of the corpus. Print the model's answers beside the documentation's."""
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
            ("this model", f"{model_bits:.3f} bits per byte ({_compared(model_bits, xz_bits)})"),
            ("trained on", self._trained_on("pretrain")),
            ("answers", f"{before['tokens']:,} tokens of answers about modules that fine-tuning never saw"),
            ("before", f"{before['loss']:.3f} nats per token"),
            ("after", f"{after['loss']:.3f} nats per token"),
            ("tuned on", self._trained_on("finetune")),
            ("time", f"{seconds:.0f} s for what was done in this call"),
        ]
        stages = ("corpus", "tokenizer", "tokens", "pretrain", "questions", "finetune", "evaluation", "model")
        rows += [(name, str(self.folder(name))) for name in stages]
        print("\n" + "\n".join(f"  {name:<14} {value}" for name, value in rows))
        command = os.path.relpath(Path(sys.executable).with_name("lumi"))
        pretrained, model = self.folder("pretrain"), self.folder("model")
        print(f"\n  talk to it:    {command} chat --model-path {model} --temperature 0")
        print(f"  in a browser:  {command} serve --model-path {model} --open")
        print(f"  more text:     {command} generate --model-path {pretrained} --prompt 'class Path'")
        print(f"  your own data: {command} prepare --help\n")

    def _validations(self, run: str) -> list[dict]:
        records = read_metrics(self.folder(run) / "metrics.jsonl")
        return [record for record in records if record["kind"] == "validation"]

    def _trained_on(self, run: str) -> str:
        config = read_json(self.folder(run) / "config.json")
        steps, batch_tokens = config["num_steps"], config["batches"]["batch_tokens"]
        return f"{human(steps * batch_tokens)} tokens in {steps} steps"


def demo(output_dir: Path, minutes: float, device: str) -> int:
    """Run every stage under `output_dir`. Finished work is reused, and an interrupted training resumes.

    Args:
        minutes: how long the whole demo may take on a CPU. A smaller model and fewer steps make it fit, as
            far as they are worth their time. 0: all steps of the larger model.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        The exit code.
    """
    return Demo(output_dir, minutes, device).run()


def held_out_text(tokens: Path, tokenizer: Tokenizer) -> bytes:
    """The validation documents of a token store, one after the other, in UTF-8."""
    split = TokenStore.open(tokens).split("validation")
    documents = (split.document(index).tolist() for index in range(split.num_documents))
    return b"".join(tokenizer.decode(document).encode() for document in documents)


def _compared(bits: float, others: float) -> str:
    share = 1 - bits / others
    return f"{share:.0%} fewer" if share >= 0 else f"{-share:.0%} more"
