"""The model that a run begins with."""

import math

import pytest
import torch
import transformers
from runs import CONFIG, losses

from lumi.config import UserError, from_dict
from lumi.formats.hf_format import load_model
from lumi.kernels.bundle import REFERENCE
from lumi.training.metrics import read_metrics
from lumi.training.run_config import TrainConfig
from lumi.training.run_model import build, start_fingerprint

MODEL = CONFIG["model"]

ROWS = {"sequence_length": 32, "batch_tokens": 64, "micro_batch_size": 2}


def built(tokenizer, start=None, **changes):
    config = from_dict(
        TrainConfig, {"model": MODEL, "batches": ROWS, "num_steps": 1000, "dtype": "float32"} | changes
    )
    return build(config, config.model, start, tokenizer, REFERENCE)


def test_a_new_model_holds_no_values_yet(tokenizer):
    model = built(tokenizer, gradient_checkpointing=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (model.compute_dtype, model.gradient_checkpointing, model.training) == (torch.float32, True, True)
    assert start_fingerprint(None) is None


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"qkv_bias": True, "window": 9, "full_attention_layers": 1}, "Qwen2ForCausalLM"),
        ({"window": 9, "rope_scaling": {"kind": "linear", "factor": 2.0}}, "MistralForCausalLM"),
        ({"no_rope_layer_interval": 2}, "SmolLM3ForCausalLM"),
        ({"qk_norm": True, "num_kv_heads": 1}, "Qwen3ForCausalLM"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 16}},
            "LlamaForCausalLM",
        ),
    ],
    ids=str,
)
def test_a_model_of_every_family_is_trained_from_a_config(changes, architecture, start):
    """transformers reads what is left, and computes the same."""
    run = start(model=changes, num_steps=8, save_every=8, validate_every=8, optimizer={"kind": "adamw"})
    assert losses(run)[-1] < losses(run)[0] - 0.5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "final").eval()
    assert type(theirs).__name__ == architecture
    ours, ids = load_model(run / "final", REFERENCE), torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.hidden(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(ours.get_parameter(name).any() for name, _ in ours.named_parameters())  # biases moved


def test_z_loss_is_in_the_loss_of_training_alone(start):
    """New weights give logits near zero: the sum of their exponentials is the vocabulary's size."""
    still = {"num_steps": 1, "save_every": 1, "optimizer": {"peak_lr": 1e-9, "weight_decay": 0.0}}
    plain, with_z = start("plain", **still), start("with z", z_loss=0.01, **still)
    assert losses(with_z)[0] - losses(plain)[0] == pytest.approx(0.01 * math.log(384) ** 2, rel=0.01)
    held_out = [
        [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "validation"]
        for run in (plain, with_z)
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    norms = [read_metrics(run / "metrics.jsonl")[0]["gradient_norm"] for run in (plain, with_z)]
    assert norms[0] != pytest.approx(norms[1], rel=1e-4)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tokenizer):
    with pytest.raises(
        UserError, match=r"model\.vocab_size must be at least the tokenizer's 384 pieces, got 300"
    ):
        built(tokenizer, model=MODEL | {"vocab_size": 300})


def test_rows_of_pieces_that_are_no_control_pieces_are_refused(tokenizer, start):
    folder = start(num_steps=1) / "final"
    with pytest.raises(UserError, match=r"lora\.tokens must be control pieces .*<\|im_end\|>.*, got 'the'"):
        built(tokenizer, folder, lora={"tokens": ["the"]})


def test_adapters_freeze_the_weights_that_a_run_begins_with(tokenizer, start):
    folder = start(num_steps=1) / "final"
    model = built(tokenizer, folder, lora={"rank": 2, "targets": ["q_proj"]})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [
        f"layers.{layer}.attention.q_proj.lora_{matrix}" for layer in range(2) for matrix in ("A", "B")
    ]
    assert len(start_fingerprint(folder)) == 64
