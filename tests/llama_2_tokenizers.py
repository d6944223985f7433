"""Small tokenizers in the manner of Llama 2: a space before every text; <unk>, <s>, </s>, bytes first."""

import json

import sentencepiece
from synthetic import document

from lumi.tokenizer.files import transformers_tokenizer

LLAMA_2 = {
    "vocab_size": 420,
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "minloglevel": 2,
}
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
}


def train_model(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    sentences = iter([document(i) for i in range(60)] + ["é 漢字 🎉"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "tokenizer"), **(LLAMA_2 | changes)
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def write_config(folder, **changes):
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | changes))


def write_json_twin(folder):
    """`tokenizer.json` as published with Llama 2: a normaliser adds the prefix, the decoder removes it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    twin = transformers_tokenizer(pieces, range(3), range(259, len(pieces)), unk_id=0, bos_id=1)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    twin["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    twin["pre_tokenizer"] = None
    twin["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (folder / "tokenizer.json").write_text(json.dumps(twin))
