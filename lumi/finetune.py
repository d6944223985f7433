"""A model and chat data -> a model that has learnt from them, by one command.

It calls the stages one after the other and leaves their folders and configs, from which each can be called
again by hand. Each stage reuses what it finds finished, so an interrupted call goes on.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lumi.chat.foreign_template import TemplateRefusal
from lumi.chat.messages import Conversation, canonical
from lumi.chat.pairs import Pair
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.chat.templates import CHATML
from lumi.config import UserError, differences, load_config, read_json, to_dict, write_json
from lumi.corpus import PrepareConfig, prepare, read_corpus
from lumi.corpus.recognition import FoundSource, find_source, recognise
from lumi.data.encoding import key_of, split_of
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import tokenize
from lumi.formats.adapter_format import is_adapter
from lumi.formats.added_tokens import add_tokens
from lumi.formats.export import merge_adapter
from lumi.formats.hf_format import read_shape
from lumi.formats.hub import as_before
from lumi.formats.pretrained import load_pretrained, locate
from lumi.host.devices import choose_device, fast_bfloat16
from lumi.host.hub_cache import name_of
from lumi.host.storage import check_output, remove_folder
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.planning.finetuning import choose, estimated_seconds
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.tokenizer import Tokenizer
from lumi.training.run import train
from lumi.training.run_config import Paths, TrainConfig

CALL = "finetune.json"  # records what the folder is the fine-tuning of
MARKERS = ("<|im_start|>", "<|im_end|>")
VALIDATION_CONVERSATIONS = 32  # held out, if that is no more than a tenth and no less than 2%
NUM_ANSWERS, ANSWER_TOKENS = 3, 96


class FineTuning:
    """The stages and their folders below `output_dir`."""

    def __init__(self, model: Path, output_dir: Path, device: str):
        record, self.output_dir, self.device = output_dir / CALL, output_dir, device
        before = read_json(record).get("model") if record.is_file() else None
        self.model = locate(as_before(model, before))
        if is_adapter(self.model):
            remedy = "`lumi merge` makes one of it and its base"
            raise UserError("MODEL", "must be a whole model", got=f"the adapter {self.model}", remedy=remedy)
        self.base = self.model  # with --add-chatml a copy that has more tokens
        self.corpus, self.tokens = output_dir / "corpus", output_dir / "tokens"
        self.run, self.merged = output_dir / "run", output_dir / "model"

    def claim(self, call: dict[str, Any]) -> None:
        """Record what the folder is the fine-tuning of.

        Raises:
            UserError: it is one of something else, or cannot be written to.
        """
        check_output(self.output_dir, renamed=False)
        path, call = self.output_dir / CALL, {"model": name_of(self.model.resolve())} | call
        if path.is_file() and (changed := differences(read_json(path), call)):
            remedy = "choose another --output-dir, or remove that one"
            got = f"other arguments ({'; '.join(changed)})"
            raise UserError(f"{self.output_dir}:", "must be of the same fine-tuning", got=got, remedy=remedy)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, call)

    def prepare(self, source: FoundSource) -> None:
        """The data -> a corpus of conversations or pairs."""
        found = recognise(source)
        kind = "pairs of answers" if isinstance(found.example, Pair) else "conversations"
        settings = {key: value for key, value in to_dict(found.format).items() if value is not None}
        print(f"format: {settings}, which reads {found.num_read} of the first {found.num_records} records")
        print(f"{kind}; the first is:\n{_show(found.example)}\n", flush=True)
        config = {"sources": [to_dict(source) | {"conversation": to_dict(found.format)}]}
        write_json(self.output_dir / "prepare.json", config)
        prepare(load_config(PrepareConfig, self.output_dir / "prepare.json"), self.corpus, use_cache=True)

    def tokenizer(self, add_chatml: bool) -> tuple[Tokenizer, tuple[str, ...]]:
        """The tokenizer with a chat template, and the control tokens that the model has to learn.

        Raises:
            UserError: the model has no chat template, nor the tokens of ChatML; or it needs none of them.
        """
        tokenizer = load_tokenizer(self.model)
        missing = [name for name in MARKERS if tokenizer.control_id(name) is None]
        if tokenizer.chat_template or not missing:
            if add_chatml:
                got = "a chat template" if tokenizer.chat_template else "its tokens"
                remedy = "leave --add-chatml out"
                raise UserError(f"{self.model}: the tokenizer", "must lack ChatML", got=got, remedy=remedy)
            if tokenizer.chat_template:
                return tokenizer, ()
            return tokenizer.with_chat_template(CHATML.jinja), MARKERS
        if not add_chatml:
            expectation = "must have a chat template or the tokens of ChatML"
            remedy = f"pass --add-chatml, which adds {' and '.join(missing)} to a copy of the model"
            raise UserError(f"{self.model}: the tokenizer", expectation, got="neither", remedy=remedy)
        self.base = self.output_dir / "base"
        if not (self.base / "config.json").is_file():
            ids = add_tokens(self.model, self.base, MARKERS, CHATML.jinja)
            print(f"{self.base}: a copy of the model with {' and '.join(MARKERS)} as {ids}")
        return load_tokenizer(self.base), MARKERS

    def tokenize(self, tokenizer: Tokenizer) -> TokenStore:
        """The corpus -> tokens, a part of them held out. A hash decides which, so few may give none."""
        documents = len(read_corpus(self.corpus))
        fraction = min(0.1, max(0.02, VALIDATION_CONVERSATIONS / documents))
        while True:
            try:
                tokenize([self.corpus], tokenizer, self.tokens, validation_fraction=fraction)
                return TokenStore.open(self.tokens)
            except UserError as error:
                if error.subject != "--validation-fraction" or fraction >= 0.5:
                    raise
                fraction = min(0.5, 2 * fraction)

    def choose(
        self, store: TokenStore, tokens: Sequence[str], epochs: float | None, overrides: Sequence[str]
    ) -> TrainConfig:
        """The settings of the training, printed and written to `train.json`."""
        shape, device = read_shape(self.base), torch.device(choose_device(self.device))
        bfloat16 = fast_bfloat16(device)
        given = [value for key, _, value in (each.partition("=") for each in overrides) if key == "num_steps"]
        num_steps = int(given[-1]) if given and given[-1].isdecimal() else None
        choice = choose(shape, store, tokens=tokens, bfloat16=bfloat16, epochs=epochs, num_steps=num_steps)
        write_json(self.output_dir / "train.json", choice.config)
        config = load_config(TrainConfig, self.output_dir / "train.json", overrides)
        write_json(self.output_dir / "train.json", to_dict(config))
        print("\nthe plan:")
        for name, reason in choice.reasons.items():
            print(f"  {name:<16} {reason}")
        if overrides:
            print(f"  {'changed':<16} {' '.join(overrides)}")
        seconds = estimated_seconds(shape, config.num_tokens, config.batches.sequence_length, device)
        if seconds is not None:
            print(f"  {'time':<16} about {_minutes(seconds)} on this machine, without other work")
        print(f"  {'settings':<16} {self.output_dir / 'train.json'}\n", flush=True)
        return config

    def train(self, config: TrainConfig) -> int:
        """Train, or go on. Returns the exit code."""
        if (self.run / "final").is_dir():
            print(f"{self.run / 'final'} is there already; remove {self.output_dir} to begin anew")
            return 0
        if self.merged.exists():  # of a run that was removed
            remove_folder(self.merged)
        resume = "auto" if self.run.exists() else None
        stores, tokenizer = [str(self.tokens)], str(self.base)
        paths = Paths(stores, tokenizer, self.run, resume=resume, model_path=self.base)
        return train(config, paths, self.device)

    def compare(self, tokenizer: Tokenizer) -> None:
        """Ask held-out questions before and after."""
        asked = list(
            itertools.islice(_questions(self.corpus, TokenStore.open(self.tokens), tokenizer), NUM_ANSWERS)
        )
        result = self.merged if self.merged.is_dir() else self.run
        before, after = (
            self._answers(path, tokenizer, asked) if asked else [] for path in (self.base, result)
        )
        for messages, old, new in zip(asked, before, after, strict=True):
            print(f"\n  question: {_cut(messages[-2].content)}")
            print(f"    before: {old}\n    after:  {new}\n    data:   {_cut(messages[-1].content)}")
        print(f"\ntalk to it: lumi chat --model-path {result}")

    def _answers(self, path: Path, tokenizer: Tokenizer, asked: Sequence[Conversation]) -> list[str]:
        model = load_pretrained(path, device=self.device).model
        room = max(1, model.config.max_positions - ANSWER_TOKENS)
        prompts = [prompt_ids(tokenizer, messages[:-1])[-room:] for messages in asked]
        greedy = SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
        answers = generate_ids(
            model,
            prompts,
            greedy,
            stop_ids=stop_ids(tokenizer),
            pad_id=filler_id(tokenizer),
            vocab_size=tokenizer.vocab_size,
        )
        return [_cut(tokenizer.decode(answer.ids, continues=True)) for answer in answers]


def finetune(
    model: Path,
    data: Sequence[str],
    output_dir: Path,
    *,
    split: str | None = None,
    epochs: float | None = None,
    merge: bool = False,
    add_chatml: bool = False,
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> int:
    """Fine-tune a model on chat data. A call that was interrupted goes on.

    Args:
        model: a model folder, a finished run or `org/name` on the hub, of a whole model.
        data: files, patterns, or one dataset on the hub.
        output_dir: of all stages.
        split: of a dataset on the hub; None: "train".
        epochs: passes over the data; None: chosen by its size.
        merge: also write the model with the adapter merged into it.
        add_chatml: give the tokenizer ChatML's tokens, where the model has no chat template.
        device: "auto", "cpu", "cuda" or "mps".
        overrides: changes to the chosen settings.

    Returns:
        The exit code.

    Raises:
        UserError: as the stages.
    """
    if epochs is not None and not 0 < epochs < math.inf:
        raise UserError("--epochs", "must be above 0", got=epochs)
    source = find_source(data, split)
    stages = FineTuning(model, output_dir, device)
    tokenizer, tokens = stages.tokenizer(add_chatml)
    call = {"split": split, "epochs": epochs, "add_chatml": add_chatml, "overrides": list(overrides)}
    stages.claim({"data": [str(Path(path).resolve()) for path in data]} | call)
    stages.prepare(source)
    config = stages.choose(stages.tokenize(tokenizer), tokens, epochs, overrides)
    if merge and config.lora is None:
        remedy = "leave it out: run/final is a whole model then"
        raise UserError("--merge", "must be left out where lora is null", got="both", remedy=remedy)
    if code := stages.train(config):
        return code
    if merge and not stages.merged.is_dir():
        print(merge_adapter(stages.run, stages.merged))
    stages.compare(tokenizer)
    return 0


def _questions(corpus: Path, store: TokenStore, tokenizer: Tokenizer) -> Iterator[Conversation]:
    """The conversations of the validation split, each up to its first answer that is trained."""
    fraction = float(store.manifest.inputs["validation_fraction"])
    for documents, _ in read_corpus(corpus).iter_documents():
        for document in documents:
            if split_of(canonical(key_of(document)), fraction)[0] != "validation":
                continue
            if isinstance(document, Pair):
                messages = (*document.prompt, document.chosen[0])
            else:
                roles = [message.role for message in document]
                messages = document[: roles.index("assistant") + 1] if "assistant" in roles else ()
            with contextlib.suppress(TemplateRefusal):  # `tokenize` has counted it
                if messages and prompt_ids(tokenizer, messages[:-1]):
                    yield messages


def _show(example: Conversation | Pair) -> str:
    if isinstance(example, Pair):
        sides = (("chosen", example.chosen), ("rejected", example.rejected))
        answers = [f"  [{side}] {_cut(messages[0].content)}" for side, messages in sides]
        return "\n".join([_show(example.prompt), *answers])
    return "\n".join(f"  [{message.role}] {_cut(message.content)}" for message in example)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{math.ceil(seconds / 60)} min"
