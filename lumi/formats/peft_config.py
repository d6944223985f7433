"""PEFT's `adapter_config.json`, written from our config and read into it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lumi.config import UserError, from_dict, read_json
from lumi.formats.hf_format import hf_name
from lumi.host.hub_cache import origin_of
from lumi.model.lora import LoraConfig, token_matrices
from lumi.model.transformer import Transformer

CONFIG = "adapter_config.json"
BASE, REVISION, ROW_IDS = "base_model_name_or_path", "revision", "trainable_token_indices"
_NAMES = {  # theirs -> ours
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
_PATTERNS = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
_SAVED = "modules_to_save"
# PEFT's keys that do not change what an adapter computes: the weights themselves name the linears. Every
# other key changes it when it is set.
_HARMLESS = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform loftq_config megatron_config megatron_core peft_version
    qalora_group_size revision target_modules task_type
""".split()
_ALLOWED = {  # keys of which these values alone compute what our adapters compute
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base as well
}


@dataclass(frozen=True)
class PeftConfig:
    """What `adapter_config.json` says of an adapter.

    Attributes:
        lora: what holds for every linear, unless a pattern says otherwise.
        patterns: by "rank" and "alpha", values by regular expressions that match the ends of linears' names.
        saved: ends of the names of modules that the adapter brings whole.
        row_ids: the tokens whose rows it brings, as PEFT lists them.
    """

    where: str
    lora: LoraConfig
    patterns: Mapping[str, Mapping[str, Any]]
    saved: list[str]
    row_ids: Any

    def of_linears(self, names: Iterable[str]) -> dict[str, LoraConfig]:
        """The configs of linears, by our names. The first pattern that matches holds, as in PEFT."""
        return {name: replace(self.lora, **self._own(hf_name(f"{name}.")[:-1])) for name in names}

    def _own(self, name: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for field, pattern in self.patterns.items():
            for expression, value in pattern.items():
                if re.match(rf"(.*\.)?({expression})$", name):
                    own.setdefault(field, value)
        return own

    def saved_weights(self, names: Iterable[str]) -> list[str]:
        """Which of a model's weights, by transformers' names, the adapter must bring whole.

        Raises:
            UserError: `modules_to_save` names a module that the model does not have.
        """
        found = {end: [name for name in names if _lies_in(name, end)] for end in self.saved}
        if nowhere := [end for end, weights in found.items() if not weights]:
            raise UserError(f"{self.where}: {_SAVED}", "must name modules of the model", got=repr(nowhere[0]))
        return [name for name in names if any(name in weights for weights in found.values())]

    def token_ids(self, model: Transformer) -> list[int]:
        """The tokens whose rows the adapter brings. PEFT lists them once for the embedding, or per matrix."""
        listed, vocab_size = self.row_ids or [], model.config.vocab_size
        lists = list(listed.values()) if isinstance(listed, dict) else [listed]
        ids = lists[0]
        if listed and (len(lists) != len(token_matrices(model)) or any(other != ids for other in lists)):
            expectation = "must be the same for the embedding and an lm_head of its own"
            raise UserError(f"{self.where}: {ROW_IDS}", expectation, got=listed)
        if not isinstance(ids, list) or not all(type(id_) is int and 0 <= id_ < vocab_size for id_ in ids):
            raise UserError(f"{self.where}: {ROW_IDS}", f"must be ids below {vocab_size}", got=listed)
        return ids


def _lies_in(weight: str, end: str) -> bool:
    """Whether a weight belongs to a module whose name ends so, or to a module inside of it."""
    parts = weight.split(".")[:-1]
    return any(".".join(parts[:count]).endswith(end) for count in range(1, len(parts) + 1))


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of an adapter's config. Raises UserError where there is none."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: must be an adapter folder with {CONFIG}, and has none")
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        got, remedy = str(data)[:60], "copy the adapter again"
        raise UserError(f"{folder / CONFIG}:", "must hold an object", got=got, remedy=remedy)
    return data


def from_peft_config(folder: Path) -> PeftConfig:
    """Read an adapter's config. The weights name the linears.

    Raises:
        UserError: it asks for something that our adapters do not compute; names the key.
    """
    data, where = read_config(folder), str(folder / CONFIG)
    handled = [*_ALLOWED, *_NAMES, *_PATTERNS, *_HARMLESS, _SAVED, ROW_IDS]
    for key, value in data.items():
        if key in _ALLOWED and value not in _ALLOWED[key]:
            expectation = f"must be {' or '.join(map(repr, _ALLOWED[key]))}"
            raise UserError(f"{where}: {key}", expectation, got=f"{value!r}: this adapter cannot be read")
        if value and key not in handled:
            got = f"{str(value)[:60]}: this adapter computes what Lumi does not"
            raise UserError(f"{where}: {key}", "must not be set", got=got)
    if missing := [key for key in ("r", "lora_alpha") if key not in data]:
        raise UserError(f"{where}: {missing[0]} is missing; copy the adapter again")
    lora = from_dict(LoraConfig, {ours: data[key] for key, ours in _NAMES.items() if key in data}, where)
    patterns = {
        ours: _read_pattern(data.get(key) or {}, ours, f"{where}: {key}") for key, ours in _PATTERNS.items()
    }
    saved = data.get(_SAVED) or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise UserError(f"{where}: {_SAVED}", "must be a list of names", got=repr(saved)[:60])
    return PeftConfig(where, lora, patterns, saved, data.get(ROW_IDS))


def _read_pattern(pattern: Any, field: str, where: str) -> Mapping[str, Any]:
    """Values of a field of `LoraConfig` by regular expressions. Raises UserError for what is neither."""
    if not isinstance(pattern, dict):
        expectation = "must be an object of regular expressions and numbers"
        raise UserError(where, expectation, got=repr(pattern)[:60])
    values = {}
    for expression, value in pattern.items():
        try:
            re.compile(expression)
        except re.error as error:
            expectation = f"must hold regular expressions: {error}"
            raise UserError(where, expectation, got=repr(expression)) from error
        values[expression] = getattr(from_dict(LoraConfig, {field: value}, where), field)
    return values


def to_peft_config(config: LoraConfig, targets: list[str], base: str | Path, row_ids: Any) -> dict[str, Any]:
    """PEFT's `adapter_config.json`. A base that came from the hub is named by its place there."""
    origin = origin_of(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE: str(Path(base).resolve()) if origin is None else origin.repo,
        REVISION: origin and origin.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        _SAVED: None,
        ROW_IDS: row_ids or None,
    }
