"""Small models in GGUF, of every architecture and with every kind of vocabulary."""

import json

import numpy as np
from crafted_models import add_noise
from hugging_face_tokenizers import make
from llama_2_tokenizers import train_model, write_config, write_json_twin
from synthetic import document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lumi.formats.export import export_model
from lumi.formats.gguf_export import GgufFolder
from lumi.formats.gguf_words import WORDS
from lumi.formats.hf_format import save_model
from lumi.kernels.bundle import REFERENCE
from lumi.kernels.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from lumi.model.transformer import ModelConfig, Transformer
from lumi.tokenizer.loading import load_tokenizer

SHAPE = {
    "num_layers": 2,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 96,
    "max_positions": 128,
}
LLAMA_3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
YARN = YarnScaling(factor=4.0, original_max_positions=32)
ARCHITECTURES = {
    "llama": {},
    "llama, tied": {"tied_embeddings": True},
    "llama, wide heads": {"head_dim": 32, "window": 128, "norm_eps": 1e-6},
    "llama, linear": {"rope_scaling": LinearScaling(factor=2.5)},
    "llama, llama3": {"rope_scaling": LLAMA_3},
    "llama, yarn": {"rope_scaling": YARN, "rope_theta": 500_000.0},
    "qwen2": {"qkv_bias": True},
    "qwen2, linear": {"qkv_bias": True, "rope_scaling": LinearScaling(factor=3.0)},
    "qwen3": {"qk_norm": True, "tied_embeddings": True, "num_kv_heads": 4},
    "qwen3, yarn": {"qk_norm": True, "rope_scaling": YARN},
    "smollm3": {"no_rope_layer_interval": 4, "num_layers": 5},
}


def build(tokenizer, padding=3, **changes):
    """A noisy model with more ids than its tokenizer has."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size + padding, **(SHAPE | changes))
    return add_noise(Transformer(config, REFERENCE).init_weights(0).eval())


def write(folder, tokenizer, quantise="f32", model=None, **changes):
    """Save a model and export it; returns the path of the GGUF file."""
    save_model(folder / "model", build(tokenizer, **changes) if model is None else model, tokenizer)
    form = GgufFolder(quantise)
    export_model(folder / "model", folder / "gguf", form=form)
    return folder / "gguf" / form.file_name


def byte_level(folder, pre):
    """A tokenizer that cuts words by the rule of this name in llama.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=WORDS[pre].ignores_merges))
    steps = []
    for step in WORDS[pre].steps:
        if step["type"] == "Split":
            steps.append(pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), behavior="isolated"))
        elif step["type"] == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([document(i) for i in range(60)] + ["é 漢字 123 ÉCOLE"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def foreign(folder, kind):
    """A tokenizer of others."""
    if kind in ("smollm2", "llama-3", "qwen"):
        return load_tokenizer(make(folder, kind))
    if kind in WORDS:
        return load_tokenizer(byte_level(folder, kind))
    train_model(folder, **({"add_dummy_prefix": False} if kind == "llama 2, no space" else {}))
    if kind == "llama 2, legacy":
        write_config(folder, legacy=True)
    if kind == "llama 2, json":
        write_json_twin(folder)
        write_config(folder, tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=None)
        (folder / "tokenizer.model").unlink()
    return load_tokenizer(folder)


FOREIGN = (
    "smollm2",
    "llama-3",
    "qwen",
    *WORDS,
    "llama 2",
    "llama 2, legacy",
    "llama 2, no space",
    "llama 2, json",
)


def texts(count):
    """Varied texts. U+2581 is a space to llama.cpp where a vocabulary writes it so."""
    rng = np.random.default_rng(0)
    ranges = [(32, 127)] * 3 + [(0x80, 0x2500), (0x300, 0x370), (0x3000, 0x9000), (0x1F300, 0x1F700), (9, 14)]
    prose = document(7) + "def f(x):\n    if x:\n\t\treturn '🎉 é' * 2\r\n don't I'LL 1234567 12 ÉCOLE Été "
    spaces = [" " * n + "river" + " " * n + "x" + "\n" * n + "  " for n in range(30)]
    markers = [
        "<s>x</s>",
        "<|im_start|>user",
        "a <|im_end|>",
        "<|endoftext|>",
        "<unk>",
        "[PAD421]",
        "<think>x",
    ]
    odd = ["", " ", "\n", "\t x", "a\0b", "<0x0A>", "x\u00a0\u3000y", "I'LL'd 'S", "½ ² Ⅷ ٣", "e\u0301"]
    found = [*markers, *spaces, *odd]
    while len(found) < count:
        start, length = int(rng.integers(len(prose))), int(rng.integers(1, 60))
        random = "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(length))
        found += [random, prose[start : start + length]]
    return [text for text in found if "▁" not in text]
