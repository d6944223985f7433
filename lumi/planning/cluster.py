"""The machines of a plan, and how fast their groups of processes communicate.

Processes lie on the nodes by rank: those of a `tensor` group side by side, then `shard`, then `replicate`. A
group inside a node uses NVLink. In a group over several nodes, the network cards of all members in a node
work for the group, so its ring runs at the speed of these cards together, and of NVLink at most. Latency is
not counted: small models on many nodes are slower than this says.
"""

import math
from dataclasses import dataclass

from lumi.config import UserError
from lumi.host.devices import GPUS
from lumi.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a plan.

    Bandwidths are of one direction, as data sheets give them; `link_share` is the share of them that is
    reached.

    Raises:
        UserError: a value is impossible; its subject is the field's name.
    """

    nodes: int
    gpus_per_node: int
    gpu: str = "H100"  # a name in lumi.host.devices.GPUS
    mfu: float = 0.45  # of one GPU by itself, without recomputation
    network_gbps: float = 400.0  # gigabits/s that each GPU sends to other nodes
    nvlink_gbps: float | None = None  # gigabits/s that each GPU sends inside its node; None: the data sheet's
    link_share: float = 0.8
    disk_gb_per_second: float = 5.0  # gigabytes/s that the shared disk takes from all nodes together
    host_gb_per_second: float = 20.0  # gigabytes/s from each GPU to its host's memory

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError("gpu", f"must be one of {', '.join(GPUS)}", got=repr(self.gpu))
        for name in ("nodes", "gpus_per_node"):
            if (value := getattr(self, name)) < 1:
                raise UserError(name, "must be at least 1", got=value)
        for name in ("mfu", "link_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise UserError(name, "must be above 0 and at most 1", got=value)
        for name in ("network_gbps", "nvlink_gbps", "disk_gb_per_second", "host_gb_per_second"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(name, "must be positive", got=value)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes; each has one process."""
        return self.nodes * self.gpus_per_node

    @property
    def flops(self) -> float:
        """What one GPU reaches by itself, in FLOP/s."""
        return self.mfu * GPUS[self.gpu].flops

    def bandwidth(self, layout: Layout, side: str) -> tuple[float, bool]:
        """Bytes/s that each process of a group sends in a ring, and whether the group spans nodes."""
        strides = {"tensor": 1, "shard": layout.tensor, "replicate": layout.tensor * layout.shard, "world": 1}
        stride, ranks = strides[side], group_size(layout, side)
        nvlink = GPUS[self.gpu].link_bandwidth if self.nvlink_gbps is None else self.nvlink_gbps * 1e9 / 8
        if self.nodes == 1 or self.gpus_per_node % (stride * ranks) == 0:
            return self.link_share * nvlink, False
        cards = min(ranks, max(1, self.gpus_per_node // stride))
        return self.link_share * min(nvlink, cards * self.network_gbps * 1e9 / 8), True


def group_size(layout: Layout, side: str) -> int:
    """Processes of one group along a side of the mesh; "world": all of them."""
    return layout.data * layout.tensor if side == "world" else getattr(layout, side)
