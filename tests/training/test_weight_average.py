"""The moving average of the weights, and a run that leaves it in `final/`."""

import shutil

import pytest
import torch

from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.formats.hf_format import load_model
from lumi.kernels.bundle import REFERENCE
from lumi.training.weight_average import WeightAverage

EMA = {"final": "ema", "ema_decay": 0.7, "save_every": 1, "keep_last": 12}


def average_of(weights, decay):
    """In float64, by the definition: the newest weights come last."""
    counts = [decay**age for age in reversed(range(len(weights)))]
    total = sum(count * weight.double() for count, weight in zip(counts, weights, strict=True))
    return total / sum(counts)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_average_by_its_definition(decay):
    model = torch.nn.Linear(5, 3)
    average, seen = WeightAverage(model, decay), []
    for step in range(8):
        torch.nn.init.normal_(model.weight)
        accepted = step not in (0, 4)
        before = average.values["weight"].clone()
        average.update(torch.tensor(accepted))
        if accepted:
            seen.append(model.weight.detach().clone())
            torch.testing.assert_close(
                average.values["weight"].double(), average_of(seen, decay), rtol=1e-6, atol=1e-6
            )
        else:
            assert torch.equal(average.values["weight"], before)


@pytest.mark.parametrize("tied", [False, True])
def test_final_is_the_average_of_all_steps(start, tied):
    folder = start(**EMA, model={"tied_embeddings": tied})
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 12
    final = dict(load_model(folder / "final", REFERENCE).named_parameters())
    for name, weight in final.items():
        weights = [open_checkpoint(path).read("model", name) for path in checkpoints]
        expected = average_of(weights, 0.7)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-6, msg=name)
        assert not torch.equal(weight.detach(), weights[-1])


def test_a_run_goes_on_with_the_same_average(start, tmp_path):
    whole = start("whole", **EMA)
    shutil.copytree(whole, tmp_path / "resumed")
    start("resumed", resume=str(tmp_path / "resumed" / "checkpoints" / "step-00000005"), **EMA)
    ends = [open_checkpoint(run / "checkpoints" / "step-00000012") for run in (whole, tmp_path / "resumed")]
    assert ends[0].records == ends[1].records
    files = [(run / "final" / "model.safetensors").read_bytes() for run in (whole, tmp_path / "resumed")]
    assert files[0] == files[1]
