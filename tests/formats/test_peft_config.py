"""`adapter_config.json`, read as PEFT reads it. `test_adapter_format*.py` compare what is computed."""

import json

import pytest
from peft.utils.other import get_pattern_key

from lumi.config import UserError
from lumi.formats.peft_config import from_peft_config, to_peft_config
from lumi.model.lora import LoraConfig

LINEARS = [f"layers.{layer}.{end}" for layer in (0, 1, 11) for end in ("attention.q_proj", "mlp.down_proj")]


def read(folder, **changes):
    data = to_peft_config(LoraConfig(rank=4, alpha=8), ["q_proj"], folder, None) | changes
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return from_peft_config(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2, "down_proj": 3},
        {"layers.1.mlp.down_proj": 2, "mlp.*": 3},
        {r"^model\.layers\.1\..*": 5, "1": 6},
        {"proj": 7},  # the end of a name, but no whole part of it
        {"layers.(0|11).self_attn.q_proj": 2, ".*": 1},
    ],
)
def test_patterns_match_as_in_peft(pattern, tmp_path):
    own = read(tmp_path, rank_pattern=pattern, alpha_pattern=pattern).of_linears(LINEARS)
    for name in LINEARS:
        theirs = "model." + name.replace("attention", "self_attn")
        key = get_pattern_key(pattern.keys(), theirs)
        assert (own[name].rank, own[name].alpha) == (pattern.get(key, 4), pattern.get(key, 8))


def test_saved_weights_are_those_in_modules_whose_names_end_so(tmp_path):
    weights = ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    config = read(tmp_path, modules_to_save=["mlp", "lm_head"])
    assert config.saved_weights(weights) == ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    assert read(tmp_path).saved_weights(weights) == []
    with pytest.raises(UserError, match="modules_to_save must name modules of the model, got 'score'"):
        read(tmp_path, modules_to_save=["score"]).saved_weights(weights)


def test_it_comes_back_as_it_went(tmp_path):
    config = LoraConfig(rank=3, alpha=5.0, dropout=0.25, rslora=True, dora=True)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(to_peft_config(config, ["q_proj"], tmp_path, None))
    )
    assert from_peft_config(tmp_path).lora == config
