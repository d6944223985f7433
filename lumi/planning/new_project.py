"""`lumi new`: a folder with the config of every stage, chosen by one dial."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import lumi.configs
from lumi.config import UserError, load_config, read_json, to_dict, write_json
from lumi.corpus import PrepareConfig
from lumi.corpus.documents import count_chars
from lumi.corpus.reading import open_source
from lumi.corpus.recognition import LOOKED_AT, find_source
from lumi.corpus.sources import HubSource, JsonlSource, JsonSource, ParquetSource, TextSource
from lumi.evaluation.evaluate import EvaluationConfig
from lumi.host.devices import fast_bfloat16
from lumi.host.file_patterns import matching_files
from lumi.model.transformer import ModelConfig
from lumi.planning.finetuning import training_rate
from lumi.planning.recipe import NAMED, TOKENS_PER_PARAMETER, choose_training, model_of
from lumi.tokenizer.training import TokenizerConfig
from lumi.training.metrics import human
from lumi.training.run_config import TrainConfig

FileSource = JsonlSource | JsonSource | ParquetSource | TextSource
SHIPPED = Path(lumi.configs.__file__).parent
HELD_OUT = 1.08  # times as much text as training reads
PLAIN_TEXT = (".txt", ".md", ".rst")
_SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
_CONFIGS = {
    "corpus": PrepareConfig,
    "tokenizer": TokenizerConfig,
    "pretrain": TrainConfig,
    "evaluation": EvaluationConfig,
}


def new_project(
    folder: Path,
    device: torch.device,
    *,
    size: str | None,
    tokens: str | None = None,
    minutes: float | None = None,
    data: Sequence[str] = (),
) -> str:
    """Write the configs of all stages. Returns what was chosen and why, and the commands that follow.

    Args:
        folder: must not exist, or be empty.
        device: of the training. `minutes` are counted on it.
        size: a name of `NAMED`, or parameters such as "23M"; None: what `minutes` allow.
        tokens: such as "0.5B"; None: what `minutes` allow, else 20 for each parameter.
        minutes: of pre-training; None: no limit.
        data: files of text, or one dataset on the hub; empty: the shipped mix from the hub.

    Raises:
        UserError: a number is none or out of range; neither size nor minutes are given, or both minutes and
            tokens; the data are no source, or files without text; the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("--output-dir", "must be new or empty", got=str(folder))
    model, num_tokens = _dial(size, tokens, minutes, device)
    choice = choose_training(model, num_tokens)
    corpus, about_data = _corpus(data, num_tokens)
    configs = {
        "corpus": corpus,
        "tokenizer": _shipped("tokenizer/32k") | {"vocab_size": model["vocab_size"]},
        "pretrain": choice.config | ({} if fast_bfloat16(device) else {"dtype": "float32"}),
        "evaluation": _shipped("evaluation/standard"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        write_json(folder / f"{name}.json", config)
        load_config(_CONFIGS[name], folder / f"{name}.json")
    seconds = _seconds(ModelConfig(**model), num_tokens, device) if minutes is None else 60 * minutes
    time = f"about {_duration(seconds)} of training on this machine, without other work"
    reasons = choice.reasons | {"text": about_data, "time": time}
    lines = [f"  {name:<14} {reason}" for name, reason in reasons.items()]
    return "\n".join(["chosen:", *lines, "", "next:", *(f"  {command}" for command in _commands(folder))])


def parse_number(option: str, text: str) -> float:
    """The number that "23M" or "0.5B" means. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kmb]?)", text.strip().lower())
    value = float(found[1]) * _SUFFIXES[found[2]] if found else 0
    if not value:
        raise UserError(option, "must be a positive number such as 23M or 0.5B", got=repr(text))
    return value


def _dial(
    size: str | None, tokens: str | None, minutes: float | None, device: torch.device
) -> tuple[dict[str, Any], int]:
    """The model, and the tokens to train it on."""
    if minutes is not None and tokens is not None:
        raise UserError("--tokens", "cannot stand beside --minutes, which decide them", got=tokens)
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError("--minutes", "must be positive", got=minutes)
    if size is not None:
        model = model_of(size if size in NAMED else parse_number("--size", size))
    elif minutes is not None:
        flops = 60 * minutes * training_rate(512, device)
        model = model_of((flops / (6 * TOKENS_PER_PARAMETER)) ** 0.5)
    else:
        raise UserError("--size", f"must be {', '.join(NAMED)} or a number such as 23M; or give --minutes")
    shape = ModelConfig(**model)
    if tokens is not None:
        return model, round(parse_number("--tokens", tokens))
    if minutes is not None:
        return model, max(1, round(60e6 * minutes / _seconds(shape, 1e6, device)))
    return model, TOKENS_PER_PARAMETER * shape.num_parameters


def _seconds(shape: ModelConfig, num_tokens: float, device: torch.device) -> float:
    return num_tokens * shape.flops_per_token(1024) / training_rate(shape.model_dim, device)


def _corpus(data: Sequence[str], num_tokens: int) -> tuple[dict[str, Any], str]:
    """The config of `lumi prepare`, and what is to be said of the text."""
    config, enough = _shipped("corpus/tiny"), round(HELD_OUT * num_tokens)
    if not data:
        mix = config["sources"]
        total = sum(each["max_tokens"] for each in mix)
        sources = [each | {"max_tokens": round(enough * each["max_tokens"] / total)} for each in mix]
        names = ", ".join(f"{each['max_tokens'] / enough:.0%} {each['name']}" for each in sources)
        return config | {"sources": sources}, f"{human(enough)} tokens from the hub: {names}"
    plain = all(Path(each).suffix in PLAIN_TEXT for each in data)
    source = TextSource(name="data", paths=tuple(data)) if plain else find_source(data)
    about = ", ".join(data)
    if isinstance(source, HubSource):
        about = f"the dataset {about} on the hub, which was not read yet"
    else:
        _check_text(source, config["filters"]["max_chars"])
        size = sum(Path(path).stat().st_size for path in matching_files(source.paths))
        if not size:
            raise UserError("--data", "must hold text", got=f"0 bytes in {about}")
        held = size / config["bytes_per_token"]
        about += f": {human(size, 'B')}, some {human(held)} tokens if not compressed"
        if num_tokens > held:
            about += f"; training reads each {num_tokens / held:.2g} times"
    return config | {"sources": [to_dict(source) | {"max_tokens": enough}]}, about


def _check_text(source: FileSource, max_chars: int) -> None:
    """Raises UserError where a path cannot be read, or its first records hold no text to be kept."""
    for path in source.paths:
        unfit = ""
        for record in islice(open_source(replace(source, paths=(path,)), max_chars).records, LOOKED_AT):
            length = 0 if record.document is None else count_chars(record.document)
            if 0 < length <= max_chars:
                unfit = ""
                break
            unfit = unfit or record.detail or (f"one of {length:,} in {path}" if length else "")
        if unfit:
            expectation = f"must hold texts of at most {max_chars:,} characters"
            remedy = "mend the data, or describe them in a config of `lumi prepare`, as docs/data.md shows"
            raise UserError("--data", expectation, got=unfit, remedy=remedy)


def _shipped(name: str) -> dict[str, Any]:
    config = read_json(SHIPPED / f"{name}.json")
    assert isinstance(config, dict)
    return config


def _commands(folder: Path) -> list[str]:
    return [
        f"lumi prepare --config {folder}/corpus.json --output-dir {folder}/corpus",
        f"lumi tokenizer --config {folder}/tokenizer.json --corpus-dirs {folder}/corpus"
        f" --output-dir {folder}/tokenizer",
        f"torchrun lumi/train.py --config {folder}/pretrain.json --data-dirs {folder}/corpus"
        f" --tokenizer-dir {folder}/tokenizer --output-dir {folder}/run",
        f"lumi evaluate --model-path {folder}/run/final --config {folder}/evaluation.json"
        f" --output-dir {folder}/evaluation",
        f"lumi finetune {folder}/run CHAT.jsonl --output-dir {folder}/finetune",
    ]


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
