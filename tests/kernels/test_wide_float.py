import pytest
import torch
from runs import losses
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumi.inference import generation
from lumi.inference.generation import SamplingConfig, generate_ids
from lumi.kernels import native, wide_float
from lumi.kernels.bundle import REFERENCE, select
from lumi.model.transformer import ModelConfig, Transformer


class NoFloat64(TorchDispatchMode):
    """Refuses what a device without float64 refuses: a result of that type."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float64, func
        return result


@pytest.fixture
def without_float64(monkeypatch):
    """The CPU as Apple's GPUs are: no float64, no compiled operators."""
    monkeypatch.setattr(wide_float, "WITHOUT_FLOAT64", {"mps", "cpu"})
    monkeypatch.setattr(native, "csrc", None)
    monkeypatch.setattr(native, "_operators", {})


def test_only_apples_gpus_lack_float64():
    types = {name: wide_float.wide_float(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert types == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"kind": "muon"}},
        {"optimizer": {"kind": "adamw"}, "final": "ema", "ema_decay": 0.9, "dtype": "bfloat16"},
    ],
    ids=["muon", "adamw and a mean of weights"],
)
def test_a_training_needs_no_float64_there(start, without_float64, changes):
    """As far as a machine without such a GPU can tell: every tensor counts as one of the GPU."""
    with NoFloat64():
        run = start(kernels="auto", **changes)
    found = losses(run)
    assert found[-1] < found[0]


def test_generation_needs_no_float64_there(without_float64, monkeypatch):
    shape = {"vocab_size": 20, "num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16}
    ops = select("auto", "mps", 8, torch.float32)
    assert ops is REFERENCE
    model = Transformer(ModelConfig(**shape, max_positions=16), ops).init_weights(0).eval()
    drawn = generation._draws(1, SamplingConfig(max_new_tokens=4), torch.device("cpu"))
    assert drawn.dtype == torch.float32
    monkeypatch.setattr(generation, "_draws", lambda *_: drawn)  # on the host they are made in float64
    sampling = SamplingConfig(max_new_tokens=4, temperature=1.0, top_p=0.9)
    with NoFloat64():
        [completion] = generate_ids(model, [[1, 2]], sampling, stop_ids=(), pad_id=0)
    assert len(completion.ids) == 4
