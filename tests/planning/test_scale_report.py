from dataclasses import replace
from pathlib import Path

import pytest

import lumi.configs
from lumi.config import UserError, load_config
from lumi.parallel.layout import Layout, ParallelConfig
from lumi.planning.cluster import Cluster
from lumi.planning.scale_report import describe_scale, what_fits
from lumi.training.memory import memory_of
from lumi.training.run_config import TrainConfig

FOLDER = Path(lumi.configs.__file__).parent / "pretrain"
EIGHT = Cluster(nodes=1, gpus_per_node=8)


@pytest.mark.parametrize(("name", "nodes"), [("1b", 1), ("8b", 1), ("8b", 2), ("70b", 16), ("70b", 32)])
def test_the_large_configs_fit_where_they_say(name, nodes):
    config = load_config(TrainConfig, FOLDER / f"{name}.json")
    report = describe_scale(config, replace(EIGHT, nodes=nodes), name)
    assert "\n  FITS in 90% of 80 = 72.0 GiB" in report
    assert "SAVES WAIT" not in report


def test_what_does_not_fit_says_what_would():
    config = replace(load_config(TrainConfig, FOLDER / "8b.json"), gradient_checkpointing=False)
    report = describe_scale(config, EIGHT, "8b")
    assert "DOES NOT FIT in 90% of 80 = 72.0 GiB with gradient_checkpointing = false" in report
    advice = what_fits(config, EIGHT)
    assert any("gradient_checkpointing=true" in fit.changes for fit in advice)
    for fit in advice:
        assert f"\n  would fit: {' '.join(fit.changes)} ({fit.total_bytes / 2**30:.1f} GiB, " in report
        overrides = ["gradient_checkpointing=false", *fit.changes]
        mended = load_config(TrainConfig, FOLDER / "8b.json", overrides)
        assert "\n  FITS" in describe_scale(mended, EIGHT, "8b")
    large = replace(load_config(TrainConfig, FOLDER / "70b.json"), parallel=ParallelConfig(shard=8))
    fit = what_fits(large, EIGHT)[0]
    assert fit.nodes > 1
    assert f"\n  on {fit.nodes} nodes would fit: {' '.join(fit.changes)} (" in describe_scale(
        large, EIGHT, "70b"
    )


def test_auto_takes_the_largest_micro_batch_that_fits():
    config = load_config(TrainConfig, FOLDER / "8b.json", ["batches.micro_batch_size=auto"])
    line = next(line for line in describe_scale(config, EIGHT, "8b").splitlines() if "micro-steps" in line)
    rows = int(line.partition("micro-steps x ")[2].split()[0])
    assert rows in (4, 8, 16)
    for size, fits in ((rows, True), (2 * rows, False)):
        fixed = replace(config, batches=replace(config.batches, micro_batch_size=size))
        assert (memory_of(fixed, Layout(1, 8, 1), "cuda", "triton")["total"] <= 72 * 2**30) == fits


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (["model=null"], 1, "--config must be one of pre-training"),
        (
            ["parallel.replicate=3"],
            1,
            "parallel: replicate 3 x shard 8 x tensor 1 = 24 must be the 8 processes",
        ),
        (
            ["parallel.shard=1", "parallel.tensor=16"],
            2,
            "parallel.tensor must divide model.num_kv_heads = 8, got 16",
        ),
        (
            ["batches.batch_tokens=81920"],
            1,
            "batches.batch_tokens must be a multiple of .* = 8192 x 2 x 8, got 81920",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, nodes, message):
    config = load_config(TrainConfig, FOLDER / "8b.json", overrides)
    with pytest.raises(UserError, match=message):
        describe_scale(config, replace(EIGHT, nodes=nodes), "8b")
