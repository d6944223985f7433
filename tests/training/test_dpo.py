"""The loss against a definition by hand, in float64, on the logits of transformers."""

import math

import pytest
import torch

from lumi.config import UserError, from_dict
from lumi.data.batches import BatchConfig, Batches
from lumi.data.token_store import TokenStore
from lumi.formats.hf_format import load_model
from lumi.kernels.bundle import NATIVE, REFERENCE
from lumi.training.dpo import MEASURES, DpoConfig, answer_log_probabilities, pair_losses

SIZES = BatchConfig(sequence_length=256, batch_tokens=1024, micro_batch_size=2)


def by_hand(dpo_models, split, documents, config):
    """Mean loss, means of measures, and the policy with its gradients."""
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(dpo_models / name, dtype=torch.float64)
        for name in ("policy", "reference")
    )

    def log_probability(judge, document):
        begin, end = int(split.offsets[document]), int(split.offsets[document + 1])
        ids = torch.tensor(split.tokens[begin:end].tolist())
        log_probs = judge(ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = log_probs[torch.arange(len(ids) - 1), ids[1:]]
        return chosen[torch.from_numpy(split.loss_mask(begin, end))[1:]]

    losses, sums = [], []
    for good, bad in zip(documents[::2], documents[1::2], strict=True):
        ratios, lengths = [], []
        for document in (good, bad):
            mine = log_probability(policy, document)
            with torch.no_grad():
                theirs = log_probability(reference, document)
            ratios.append(mine.sum() - theirs.sum())
            lengths.append(len(mine))
        rewards = [config.beta * ratio for ratio in ratios]
        if config.length_normalized:
            rewards = [reward / length for reward, length in zip(rewards, lengths, strict=True)]
        margin, smoothing = rewards[0] - rewards[1], config.label_smoothing
        right, wrong = 1 / (1 + torch.exp(-margin)), 1 / (1 + torch.exp(margin))
        losses.append(-(1 - smoothing) * right.log() - smoothing * wrong.log())
        moved = sum(abs(ratio.item()) for ratio in ratios) / sum(lengths)
        sums.append([*(reward.item() for reward in rewards), margin.item(), float(margin > 0), moved])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.tensor(sums).double().mean(dim=0), policy


@pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=lambda ops: ops.name)
@pytest.mark.parametrize(
    "config",
    [DpoConfig(), DpoConfig(beta=0.5, label_smoothing=0.2), DpoConfig(beta=2.0, length_normalized=True)],
    ids=["plain", "smoothed", "normalized"],
)
def test_loss_and_gradients_by_hand(config, ops, dpo_models, pairs_dir, tokenizer):
    split = TokenStore.open(pairs_dir).split("train")
    batch = Batches([split], None, SIZES, 0)[1]
    documents = batch.pairs.documents.tolist()
    loss, measures, judge = by_hand(dpo_models, split, documents, config)
    assert 0 < measures[MEASURES.index("accuracy")] < 1
    policy, reference = (
        load_model(dpo_models / n, ops, torch.float32, tokenizer) for n in ("policy", "reference")
    )
    inputs = (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, 1.0, True)
    with torch.no_grad():
        theirs = answer_log_probabilities(reference(*inputs), batch)
    ours, sums = pair_losses(answer_log_probabilities(policy(*inputs), batch) - theirs, batch, config)
    ours, sums = ours / batch.num_targets, sums / batch.num_targets
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(sums, measures.double(), rtol=1e-4, atol=1e-5)
    pairs = {
        "lm_head.weight": policy.lm_head.weight,
        "model.embed_tokens.weight": policy.token_embedding.weight,
        "model.layers.0.self_attn.q_proj.weight": policy.layers[0].attention.q_proj.weight,
        "model.layers.1.mlp.down_proj.weight": policy.layers[1].mlp.down_proj.weight,
        "model.norm.weight": policy.final_norm.weight,
    }
    for name, parameter in pairs.items():
        expected = judge.get_parameter(name).grad
        assert (parameter.grad - expected).abs().max() <= 2e-5 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be positive, got 0"),
        ({"beta": math.inf}, "beta must be"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"betta": 0.1}, "beta"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(DpoConfig, values)
