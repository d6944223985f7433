"""SentencePiece models of others, in the manner of Llama 2, as the `tokenizer.json` that does the same."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import sentencepiece

from lumi.config import UserError
from lumi.tokenizer.files import CONFIG_FILE, MAKE_ONE, READS_JSON, Surroundings, transformers_tokenizer
from lumi.tokenizer.sentencepiece_bpe import bytes_of, load_processor, pieces_of, puts_a_space_first
from lumi.tokenizer.tokenizer import PROBE


class Converted(NamedTuple):
    """A model in the form of the `tokenizers` library.

    Attributes:
        data: the content of `tokenizer.json`.
        surroundings: the given ones, and what the model alone says.
    """

    data: dict[str, Any]
    surroundings: Surroundings


def convert(model: bytes, where: str, surroundings: Surroundings) -> Converted:
    """Turn `tokenizer.model` into `tokenizer.json`, and add to the files beside it what only the model says.

    Raises:
        UserError: it is no BPE model with byte fallback that keeps every text as it is.
    """
    processor = load_processor(model, where)
    if reason := _unfit(processor):
        kind = "a SentencePiece BPE model with byte fallback that keeps every text as it is"
        raise UserError(f"{where}:", f"must be {kind}, but {reason}", remedy=MAKE_ONE)
    pieces, ids = pieces_of(processor), range(processor.vocab_size())
    special = [i for i in ids if processor.is_unknown(i) or processor.is_control(i)]
    learned = [i for i in ids if i not in special and not processor.is_byte(i)]
    roles = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    roles = {"unk": processor.unk_id()} | {role: i for role, i in roles.items() if i >= 0}
    scheme = surroundings.llama_scheme() or ("first" if puts_a_space_first(processor) else "never")
    bos_id = roles.get("bos") if surroundings.config.get("add_bos_token") is not False else None
    data = transformers_tokenizer(
        pieces, special, learned, unk_id=roles["unk"], bos_id=bos_id, prepend_scheme=scheme
    )
    return Converted(data, _completed(surroundings, {role: pieces[i] for role, i in roles.items()}))


def _completed(surroundings: Surroundings, names: dict[str, str]) -> Surroundings:
    """The names of the model's special tokens, also in `tokenizer_config.json`, where readers of
    `tokenizer.json` look for them. What is there stays."""
    missing = {f"{role}_token": name for role, name in names.items() if role not in surroundings.names}
    if "tokenizer_class" not in surroundings.config:
        missing["tokenizer_class"] = READS_JSON
    config, files = missing | surroundings.config, surroundings.files
    if missing:
        files = files | {CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode()}
    return replace(surroundings, files=files, config=config, names=names | surroundings.names)


def _unfit(model: sentencepiece.SentencePieceProcessor) -> str | None:
    """Why a model cannot be used, or None."""
    pieces, ids = pieces_of(model), range(model.vocab_size())
    if (count := sum(map(model.is_byte, ids))) < 256:
        return f"it has {count} of the 256 byte pieces"
    learned = [i for i in ids if not (model.is_unknown(i) or model.is_control(i) or model.is_byte(i))]
    scores = list(map(model.get_score, learned))
    if any(score % 1 for score in scores):  # BPE numbers its merges, unigram has log probabilities
        return "it is a unigram model"
    if scores.count(0.0) > 1:  # the score of the first merge, and of user-defined pieces
        return "it has user-defined pieces, which would be read out of a user's text"
    spelt = b"".join(bytes_of(model, i, pieces[i]) for i in model.encode(PROBE)).decode()
    if spelt != " " * puts_a_space_first(model) + PROBE:
        return "it normalises"
    return None
