from dataclasses import replace

import pytest

from lumi.config import UserError
from lumi.parallel.layout import Layout
from lumi.planning.cluster import Cluster

EIGHT = Cluster(nodes=1, gpus_per_node=8)


def test_where_groups_lie():
    cluster = Cluster(nodes=4, gpus_per_node=8, nvlink_gbps=3200, network_gbps=400, link_share=0.5)
    nvlink, card = 0.5 * 400e9, 0.5 * 50e9
    assert cluster.bandwidth(Layout(4, 8, 1), "shard") == (nvlink, False)
    assert cluster.bandwidth(Layout(4, 8, 1), "replicate") == (card, True)
    assert cluster.bandwidth(Layout(1, 32, 1), "shard") == (8 * card, True)  # all cards of a node work for it
    assert cluster.bandwidth(Layout(1, 16, 2), "shard") == (4 * card, True)
    assert cluster.bandwidth(Layout(1, 4, 8), "tensor") == (nvlink, False)
    assert cluster.bandwidth(Layout(1, 4, 8), "shard") == (card, True)
    assert cluster.bandwidth(Layout(1, 2, 16), "tensor") == (8 * card, True)
    narrower = replace(cluster, nvlink_gbps=1600)  # than the cards together
    assert narrower.bandwidth(Layout(1, 32, 1), "shard") == (nvlink / 2, True)
    assert Cluster(nodes=1, gpus_per_node=6).bandwidth(Layout(2, 3, 1), "replicate") == (0.8 * 450e9, False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gpu": "H1000"}, "gpu must be one of A100, .* got 'H1000'"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"mfu": 1.5}, "mfu must be above 0 and at most 1, got 1.5"),
        ({"network_gbps": float("nan")}, "network_gbps must be positive, got nan"),
    ],
)
def test_clusters_that_cannot_be(setting, message):
    with pytest.raises(UserError, match=message) as raised:
        replace(EIGHT, **setting)
    assert raised.value.subject in setting  # the command makes an option of it
