"""Preference tuning through the one loop."""

import math

import pytest

from lumi.config import UserError
from lumi.training.dpo import MEASURES
from lumi.training.metrics import read_metrics

LORA = {"rank": 8, "alpha": 16, "dropout": 0.1, "tokens": ["<|im_end|>"]}


def records(folder, kind="train"):
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_the_preference(lora, start_dpo, capsys):
    folder = start_dpo(lora=lora, num_steps=30, save_every=30, validate_every=30)
    first, last = records(folder, "validation")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["divergence"] == pytest.approx(0, abs=1e-6)
    assert last["loss"] < 0.6
    assert last["accuracy"] > 0.9
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert last["reward_margin"] > 0.3
    assert first["pairs"] == last["pairs"] > 5
    step = records(folder)[-1]
    assert set(MEASURES) < step.keys()
    assert step["pairs"] > 5
    assert "targets" not in step
    assert (folder / "final" / "adapter_model.safetensors").exists() == (lora is not None)
    printed = capsys.readouterr().out
    assert "reference: the log-probabilities of 60 pairs are computed, once for this run" in printed
    assert "an example, chosen and rejected, what is trained between [[ and ]]:" in printed
    assert "[[It is" in printed
    assert f"step 30: validation loss {last['loss']:.4f} nats/pair, accuracy " in printed


def test_accumulation_changes_nothing(start_dpo):
    one, four = (
        start_dpo("one", batches={"micro_batch_size": 4}),
        start_dpo("four", batches={"micro_batch_size": 1}),
    )
    for a, b in zip(records(one), records(four), strict=True):
        assert a["pairs"] == b["pairs"]
        for name in ("loss", "gradient_norm", "reward_margin"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_what_does_not_go_together(start_dpo, pairs_dir, store_dir):
    with pytest.raises(
        UserError, match=f'config.dpo must be given for the pairs of {pairs_dir}, got null; add "dpo"'
    ):
        start_dpo(dpo=None)
    with pytest.raises(
        UserError, match=f"--data-dirs must hold pairs where the config has dpo, got {store_dir}"
    ):
        start_dpo(data_dirs=[pairs_dir, store_dir])
    with pytest.raises(UserError, match=r"config\.dpo needs a model that answers: pass --model-path"):
        start_dpo(
            base=None,
            model={"vocab_size": 384, "num_layers": 1, "model_dim": 32, "num_heads": 2, "mlp_dim": 32},
        )
