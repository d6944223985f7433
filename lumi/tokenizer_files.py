"""What stands beside `tokenizer.model` so that others read it as Lumi does: transformers' JSON files, the ChatML template, the card.

transformers reads SentencePiece models only where `protobuf` is installed; `tokenizer.json` holds the same merges for everyone else.
"""

from collections.abc import Sequence
from typing import Any

FINGERPRINT_KEY = "lumi_fingerprint"  # in tokenizer_config.json; transformers keeps keys that it does not know

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def transformers_config(fingerprint: str) -> dict[str, Any]:
    """`tokenizer_config.json`: makes transformers' LlamaTokenizer add no space of its own and clean nothing up."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        FINGERPRINT_KEY: fingerprint,
    }


def transformers_tokenizer(pieces: Sequence[str], special: Sequence[str], first_normal: int) -> dict[str, Any]:
    """`tokenizer.json`: the model as a byte-fallback BPE of the `tokenizers` library.

    Args:
        pieces: SentencePiece's pieces by id, '▁' standing for a space.
        special: the unknown and control pieces, ids 0 to len(special) - 1.
        first_normal: id of the first learned piece; merges are made of learned pieces alone.
    """
    replace_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for i, piece in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special.index("<s>")], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [replace_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, first_normal),
        },
    }


def _merges(pieces: Sequence[str], first_normal: int) -> list[tuple[str, str]]:
    """Every way to make a learned piece of two others, in the order in which SentencePiece learned the pieces."""
    ids = {piece: i for i, piece in enumerate(pieces) if i >= first_normal}
    merges = []
    for piece in ids:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def card(*, fingerprint: str, recipe: dict[str, Any], trained_on: Sequence[str], sampled_bytes: int, bytes_per_token: float) -> str:
    """The README.md of a tokenizer folder."""
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in recipe.items())
    sources = "\n".join(f"- {source}" for source in trained_on)
    return f"""# Tokenizer

SentencePiece BPE with byte fallback, {recipe["vocab_size"]:,} pieces, made by `lumi tokenizer`.

- Fingerprint (SHA-256 of `tokenizer.model`): `{fingerprint}`
- {bytes_per_token:.2f} bytes of UTF-8 per token, on text that it was trained on
- Lossless: decoding gives back every text that was encoded, newlines and spaces included
- `<unk>` 0, `<s>` 1 begins and `</s>` 2 ends a document, `<pad>` 3, `<|im_start|>` 4 and `<|im_end|>` 5 enclose a turn of a chat.
  These are control pieces: Lumi never reads them out of a user's text (transformers does, by design).

Trained on {sampled_bytes:,} bytes sampled from:

{sources}

| setting | value |
|---|---|
{settings}
"""
