import json

from runs import merged

from lumi.cli import dispatch
from lumi.command_line import run

PLANNED = merged(
    {
        "model": {"model_dim": 48, "mlp_dim": 96},
        "batches": {"sequence_length": 64, "batch_tokens": 512, "micro_batch_size": 4},
        "dtype": "bfloat16",
    }
)


def test_plan(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps(PLANNED))
    arguments = ["plan", "--config", str(tmp_path / "c.json"), "batches.micro_batch_size=2"]
    arguments += "--nodes 2 --gpus_per_node 2 --network-gbps 100".split()
    assert run(dispatch, [*arguments, "parallel.shard=2", "num_steps=7"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("c on 2 nodes of 2 x H100: an estimate, by arithmetic\n")
    assert "replicate 2 x shard 2 x tensor 1; shard of 2 over NVLink, replicate of 2 over the network" in plan
    assert "7 steps, 3,584 tokens" in plan
    assert "FITS in 90% of 80 = 72.0 GiB" in plan
    # 2 bytes of half a layer of 23,136, twice; 80% of 100 Gb/s
    assert "2, network       2  4.63e-05     10" in plan
    for more, message in (
        (["--mfu", "0"], "--mfu must be above 0 and at most 1, got 0.0"),
        (["--disk-gb-per-second", "-1"], "--disk-gb-per-second must be positive, got -1.0"),
        (["parallel.shard=3"], "parallel: replicate -1 x shard 3 x tensor 1 = 3 must divide the 4 processes"),
        (["model=null"], "--config must be one of pre-training"),
    ):
        assert run(dispatch, [*arguments, *more]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
