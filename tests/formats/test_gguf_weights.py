"""Models as llama.cpp computes them from a GGUF file: llama.cpp judges logits and greedy tokens."""

import dataclasses

import gguf
import pytest
import torch
import torch.nn.functional as F
from crafted_models import wanderer
from gguf_files import ARCHITECTURES, build, write
from llama_cpp_judge import LlamaCpp

from lumi.config import UserError
from lumi.formats.gguf_file import open_gguf, rounded, write_gguf
from lumi.formats.gguf_shape import to_metadata
from lumi.formats.gguf_weights import QUANTISATIONS, Order, WeightTypes, gguf_name, load_model
from lumi.formats.hf_format import hf_name
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels.bundle import REFERENCE

PROMPTS = ["The river", "a", "Where is it?\n", "x = [1, 2]", "é"]
LENGTHS = (1, 5, 100)
# What llama.cpp rounds the inputs of a matrix product to, by the type of the matrix.
INPUTS = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q8_0"}


def log_probabilities(model, ids, round_inputs=lambda x: x):
    """Of the token after `ids`, (V,) float64."""
    with torch.no_grad():
        last = round_inputs(model.hidden(torch.tensor([ids]))[0, -1:])
        return F.linear(last, model.output_weight.to(last.dtype))[0].double().log_softmax(-1)


def prompts(tokenizer):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, tokenizer.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def farthest(one, other):
    """The largest difference over all prompts."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logits_in_float32(tokenizer, tmp_path, changes):
    """As near to float64 as other orders of summation are: 32 times what ours loses."""
    model = build(tokenizer, **changes)
    judge = LlamaCpp(write(tmp_path, tokenizer, model=model))
    asked, size, letter = prompts(tokenizer), model.config.vocab_size, tokenizer.encode("e")[0]
    found = [judge.log_probabilities(ids, size, letter) for ids in asked]
    ours = [log_probabilities(model, ids) for ids in asked]
    model.double().compute_dtype = torch.float64
    exact = [log_probabilities(model, ids) for ids in asked]
    assert 0 < farthest(found, exact) < 32 * farthest(ours, exact) < 1e-3


@pytest.mark.parametrize("quantise", INPUTS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quantised_logits(tokenizer, tmp_path, name, quantise):
    """llama.cpp rounds the inputs of a product too, to `INPUTS`. It may be off by twice what that changes in
    our model with the same weights."""
    model = build(tokenizer, **ARCHITECTURES[name])
    file = write(tmp_path, tokenizer, quantise, model)
    judge, round_inputs = LlamaCpp(file), lambda x: rounded(x, INPUTS[quantise])
    ops = dataclasses.replace(REFERENCE, linear=lambda x, w, b=None: F.linear(round_inputs(x), w, b))
    same, rounding = load_model(open_gguf(file), REFERENCE), load_model(open_gguf(file), ops)
    asked, size, letter = prompts(tokenizer), model.config.vocab_size, tokenizer.encode("e")[0]
    found = [judge.log_probabilities(ids, size, letter) for ids in asked]
    ours = [log_probabilities(same, ids) for ids in asked]
    simulated = [log_probabilities(rounding, ids, round_inputs) for ids in asked]
    of_inputs = farthest(simulated, ours)
    assert farthest(found, ours) < 2 * of_inputs
    assert farthest(ours, [log_probabilities(model, ids) for ids in asked]) > 0


@pytest.mark.parametrize(
    "name", [name for name, changes in ARCHITECTURES.items() if "tied" not in str(changes)]
)
def test_greedy_tokens(tokenizer, tmp_path, name):
    model = wanderer(tokenizer, max_positions=128, **ARCHITECTURES[name])
    judge = LlamaCpp(write(tmp_path, tokenizer, model=model))
    sampling = SamplingConfig(max_new_tokens=40, temperature=0)
    for prompt in PROMPTS:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
        (expected,) = generate_ids(model, [ids], sampling, stop_ids=frozenset(), pad_id=3)
        assert judge.greedy(ids, 40) == expected.ids
        assert len(set(expected.ids)) > 2


# Names, types and order.


def test_types(tokenizer):
    model = build(tokenizer, tied_embeddings=False, mlp_dim=80)
    weights = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    narrow = "layers.0.mlp.down_proj.weight"
    for quantise in QUANTISATIONS:
        types = WeightTypes(model.config, quantise)
        found = {name: types.of(name, shape) for name, shape in weights.items()}
        assert {found[name] for name, shape in weights.items() if len(shape) == 1} == {"F32"}
        assert found["layers.0.attention.q_proj.weight"] == quantise.upper()
        assert found["lm_head.weight"] == ("Q8_0" if quantise == "q4_0" else quantise.upper())
        assert found[narrow] == ("F16" if quantise in ("q8_0", "q4_0") else quantise.upper())
        fallbacks = [f"blk.{layer}.ffn_down.weight" for layer in (0, 1)] if quantise[0] == "q" else []
        assert types.fallbacks(model.state_dict()) == fallbacks
    tied = WeightTypes(dataclasses.replace(model.config, tied_embeddings=True), "q4_0")
    assert tied.of("token_embedding.weight", (384, 64)) == "Q8_0"


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
def test_order(tokenizer, name):
    """As llama.cpp's converter permutes the rows of a Llama, and of no Qwen."""
    model = build(tokenizer, **ARCHITECTURES[name])
    order = Order(model.config)
    for weight_name, weight in model.state_dict().items():
        theirs = order.to_theirs(weight_name, weight)
        expected = weight
        if name in ("llama", "smollm3") and weight_name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_heads if "q_proj" in weight_name else model.config.num_kv_heads
            half = model.config.head_dim // 2
            rows = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]
            expected = weight[rows]
        assert torch.equal(theirs, expected)
        assert torch.equal(order.to_ours(weight_name, theirs), weight)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_names(tokenizer, name):
    """By the table of the package `gguf`, which llama.cpp's converter uses."""
    model = build(tokenizer, **ARCHITECTURES[name])
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), model.config.num_layers)
    for weight_name in model.state_dict():
        assert gguf_name(weight_name) == table.get_name(hf_name(weight_name), (".weight", ".bias"))


# Files that do not fit.


@pytest.fixture
def parts(tokenizer):
    """What `write_gguf` takes, to be changed."""
    model = build(tokenizer)
    tensors = {gguf_name(name): weight for name, weight in model.state_dict().items()}
    return to_metadata(model.config), tensors


def rewritten(path, metadata, tensors):
    plan = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    write_gguf(path, "llama", metadata, plan, lambda name: tensors[name])
    return open_gguf(path)


def test_tensors_that_do_not_fit(parts, tmp_path):
    metadata, tensors = parts
    load_model(rewritten(tmp_path / "same.gguf", metadata, tensors), REFERENCE)
    name, other = "blk.1.attn_k.weight", {"blk.0.attn_q.bias": torch.zeros(64)}
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    huge = metadata | {"llama.feed_forward_length": 2**31, "llama.attention.key_length": 2**30}
    for asked, message in (
        (
            huge | {"llama.rope.dimension_count": 2**30, "llama.attention.value_length": 2**30},
            "must have shape",
        ),
        (metadata | {"llama.block_count": 2**31}, r"blk\.2147483647\.attn_norm\.weight is missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(rewritten(tmp_path / "huge.gguf", asked, tensors), REFERENCE)
    for changed, message in (
        (without, rf"{name} must have shape \(32, 64\), got nothing"),
        (tensors | {name: torch.zeros(48, 64)}, rf"{name} must have shape \(32, 64\), got \(48, 64\)"),
        (tensors | other, r"holds a weight that this model has no place for: blk.0.attn_q.bias \(1 in all\)"),
        (tensors | {name: torch.full((32, 64), torch.nan)}, f"{name} must hold finite numbers, got others"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(rewritten(tmp_path / "changed.gguf", metadata, changed), REFERENCE)
