"""Small tokenizers in the manner of SmolLM2, Llama 3 and Qwen, as the `tokenizers` library trains and saves
them."""

import json

from synthetic import document
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
RECIPES = ("smollm2", "llama-3", "qwen")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def make(folder, recipe, chat_template=CHATML, **config):
    """Write `tokenizer.json` and `tokenizer_config.json`. Keywords change the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=recipe == "llama-3"))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if recipe == "smollm2":
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), words]
        )
        roles |= {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    else:
        pattern = Regex(LLAMA_3_WORDS if recipe == "llama-3" else QWEN_WORDS)
        words = pre_tokenizers.Split(pattern, behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, _BYTES])
    if recipe == "llama-3":
        special.insert(0, "<|begin|>")
        roles |= {"bos_token": "<|begin|>"}
    if recipe == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator([document(i) for i in range(60)] + ["é 漢字 🎉 123"], trainer)
    if recipe == "llama-3":
        begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    if recipe == "qwen":
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template} | roles | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
