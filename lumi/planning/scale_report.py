"""`lumi plan`: what a config needs on many GPUs, as text.

The arithmetic is in `lumi.training.memory`, `lumi.planning.communication` and `lumi.planning.scale`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from lumi.config import UserError
from lumi.host.devices import GPUS
from lumi.parallel.layout import Layout
from lumi.parallel.tensor_parallel import check_tensor_parallel
from lumi.planning.cluster import Cluster, group_size
from lumi.planning.communication import collectives
from lumi.planning.scale import checkpoint_bytes, step_time
from lumi.training.memory import memory_of
from lumi.training.micro_batch import micro_batches, with_micro_batch
from lumi.training.run_config import TrainConfig

USABLE_SHARE = 0.9  # of a GPU's memory: the rest is for CUDA, NCCL and the gaps that the allocator leaves
_MOST_NODES = 4096


def describe_scale(config: TrainConfig, cluster: Cluster, name: str) -> str:
    """The plan of a pre-training config on a cluster.

    Args:
        name: of the config.

    Raises:
        UserError: the config names no model, or its layout or batch does not come out even on so many GPUs.
    """
    if config.batches.micro_batch_size == "auto":
        config = _with_micro_batch(config, cluster)
    layout = checked_layout(config, cluster)
    nodes = f"{cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'}"
    title = f"{name} on {nodes} of {cluster.gpus_per_node} x {cluster.gpu}: an estimate, by arithmetic"
    rings = f"in rings at {cluster.link_share:.0%} of the links' bandwidth"
    sections = {
        title: _run(config, layout, cluster),
        "memory of a GPU, GiB": _memory(config, layout, cluster),
        f"communication of a GPU in a step, {rings}": _communication(config, layout, cluster),
        "time": _time(config, layout, cluster),
        "checkpoint": _checkpoint(config, layout, cluster),
    }
    return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def checked_layout(config: TrainConfig, cluster: Cluster) -> Layout:
    """The sides of the mesh. Raises UserError where the config cannot run on this cluster."""
    if config.model is None or config.lora is not None:
        raise UserError(
            "--config",
            "must be one of pre-training, with a model and without lora",
            remedy="a plan on paper reads no model from disk",
        )
    layout = config.parallel.layout(cluster.num_gpus)
    if config.kernels == "native":
        raise UserError("kernels", 'must be "auto", "triton" or "reference" on GPUs', got='"native"')
    check_tensor_parallel(config.model, config.batches.sequence_length, layout.tensor, dora=False)
    config.batches.micro_steps(layout.data)
    return layout


def _with_micro_batch(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """The config with the largest micro-batch that fits; of one row where none does."""
    layout = checked_layout(with_micro_batch(config, 1), cluster)
    candidates = micro_batches(config, layout)
    fitting = (each for each in candidates if _memory_of(each, layout)["total"] <= _usable(cluster))
    return next(fitting, candidates[-1])


def _kernels(config: TrainConfig) -> str:
    return "reference" if config.kernels == "reference" else "triton"


def _memory_of(config: TrainConfig, layout: Layout) -> dict[str, int]:
    return memory_of(config, layout, "cuda", _kernels(config))


def _usable(cluster: Cluster) -> float:
    return USABLE_SHARE * GPUS[cluster.gpu].memory_bytes


def _run(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    model, batches = config.model, config.batches
    assert model is not None
    places = []
    for side in reversed(Layout._fields):
        if (ranks := group_size(layout, side)) > 1:
            link = "the network" if cluster.bandwidth(layout, side)[1] else "NVLink"
            places.append(f"{side} of {ranks} over {link}")
    micro_steps = f"{batches.micro_steps(layout.data)} micro-steps x {batches.micro_batch_rows} rows"
    shares = f"{layout.data} groups x {micro_steps} x {batches.sequence_length}"
    tokens = f"{config.num_tokens:,} tokens ({config.num_tokens / model.num_parameters:.1f} per parameter)"
    return [
        f"model   {model.num_parameters:,} parameters, {model.num_layers} layers of {model.model_dim}",
        f"layout  {layout.describe()}; {', '.join(places) or 'one process'}",
        f"step    {batches.batch_tokens:,} tokens: {shares}",
        f"run     {config.num_steps:,} steps, {tokens}",
        f"with    {config.dtype}, {config.optimizer.kind}, {_kernels(config)} kernels",
    ]


def _memory(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    configs = [replace(config, gradient_checkpointing=checkpointing) for checkpointing in (False, True)]
    columns = [_memory_of(each, layout) for each in configs]
    lines = [f"{'gradient_checkpointing':24}{'false':>10}{'true':>10}"]
    for part in columns[False]:
        lines.append(f"{part:24}" + "".join(f"{column[part] / 2**30:>10.2f}" for column in columns))
    usable, total = _usable(cluster), columns[config.gradient_checkpointing]["total"]
    share = f"{USABLE_SHARE:.0%} of {GPUS[cluster.gpu].memory_bytes / 2**30:.0f} = {usable / 2**30:.1f} GiB"
    chosen = f"gradient_checkpointing = {str(config.gradient_checkpointing).lower()}, as this config has it"
    if total <= usable:
        return [*lines, f"FITS in {share} with {chosen}"]
    advice = [fit.describe(cluster) for fit in what_fits(config, cluster)]
    nothing = f"nothing was found that fits, up to {_MOST_NODES} nodes"
    return [*lines, f"DOES NOT FIT in {share} with {chosen}", *(advice or [nothing])]


class Fit(NamedTuple):
    """A change to a config under which it fits the GPUs."""

    nodes: int
    changes: tuple[str, ...]  # overrides
    total_bytes: int  # of a GPU
    step_seconds: float

    def describe(self, cluster: Cluster) -> str:
        """A line for the plan of `cluster`."""
        nodes = "" if self.nodes == cluster.nodes else f"on {self.nodes} nodes "
        cost = f"{self.total_bytes / 2**30:.1f} GiB, {self.step_seconds:.2f} s a step"
        return f"{nodes}would fit: {' '.join(self.changes)} ({cost})"


def what_fits(config: TrainConfig, cluster: Cluster) -> list[Fit]:
    """Up to three changes under which a config fits: those of the fewest keys, the fastest first.

    Where none fits, the nodes are doubled until one does. Empty where that does not help either.
    """
    nodes = cluster.nodes
    while nodes <= max(_MOST_NODES, cluster.nodes):
        if fits := _fits_on(config, replace(cluster, nodes=nodes)):
            fewest = min(len(fit.changes) for fit in fits)
            fits = [fit for fit in fits if len(fit.changes) == fewest]
            return sorted(fits, key=lambda fit: (fit.step_seconds, fit.describe(cluster)))[:3]
        nodes *= 2
    return []


def _fits_on(config: TrainConfig, cluster: Cluster) -> list[Fit]:
    fits = []
    for changes, changed in _changes(config, cluster):
        try:
            layout = checked_layout(changed, cluster)
        except UserError:
            continue
        total = _memory_of(changed, layout)["total"]
        if changes and total <= _usable(cluster):
            seconds = step_time(changed, layout, cluster).total
            fits.append(Fit(cluster.nodes, tuple(changes), total, seconds))
    return fits


def _changes(config: TrainConfig, cluster: Cluster) -> Iterator[tuple[list[str], TrainConfig]]:
    """Configs beside this one, and what was changed as overrides."""
    sizes = [config.batches.micro_batch_rows]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    layouts = [None, *(size for size in (1, 2, 4, 8) if cluster.gpus_per_node % size == 0)]
    flags = {config.gradient_checkpointing, True}
    for checkpointing, size, tensor in itertools.product(flags, sizes, layouts):
        changes = [] if checkpointing == config.gradient_checkpointing else ["gradient_checkpointing=true"]
        changes += [] if size == config.batches.micro_batch_size else [f"batches.micro_batch_size={size}"]
        parallel = config.parallel
        if tensor is not None:
            parallel = replace(parallel, replicate=1, shard=-1, tensor=tensor)
            changes += [f"parallel.{side}={getattr(parallel, side)}" for side in Layout._fields]
        batches = replace(config.batches, micro_batch_size=size)
        changed = replace(config, gradient_checkpointing=checkpointing, batches=batches, parallel=parallel)
        yield changes, changed


def _communication(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    calls = collectives(config, layout)
    if not calls:
        return ["none: one process"]
    titles = f"{'':29}{'collective':16}{'processes':>14}{'calls':>8}{'GB sent':>10}{'GB/s':>7}{'seconds':>10}"
    lines = [f"{titles}  runs beside"]
    for call in calls:
        bandwidth, over_network = cluster.bandwidth(layout, call.side)
        place = f"{group_size(layout, call.side)}, {'network' if over_network else 'NVLink'}"
        sent = call.sent_bytes(layout)
        volume = f"{call.calls:>8,}{_figure(sent / 1e9):>10}"
        speed = f"{_figure(bandwidth / 1e9):>7}{_figure(sent / bandwidth):>10}"
        lines.append(f"{call.name:29}{call.kind:16}{place:>14}{volume}{speed}  {call.beside}")
    return lines


def _time(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    model, time = config.model, step_time(config, layout, cluster)
    assert model is not None
    rate = config.batches.batch_tokens / time.total
    flops = model.flops_per_token(config.batches.sequence_length) * rate
    mfu = flops / cluster.num_gpus / GPUS[cluster.gpu].flops
    peak = f"{GPUS[cluster.gpu].flops / 1e12:,.0f} TFLOP/s"
    stall = checkpoint_bytes(config) / cluster.num_gpus / (cluster.host_gb_per_second * 1e9)
    days = (config.num_steps * time.total + config.num_steps / config.save_every * stall) / 86400
    return [
        f"products       {_figure(time.products)} s at {cluster.mfu:.0%} of {peak} (--mfu)",
        f"recomputation  {_figure(time.recomputation)} s",
        f"optimizer      {_figure(time.optimizer)} s",
        f"communication  {_figure(time.communication)} s, of which {_figure(time.exposed)} s are waited for",
        f"step           {_figure(time.total)} s: MFU {mfu:.1%}, {rate:,.0f} tokens/s",
        f"whole run      {_figure(days)} days, without reading data and validation",
    ]


def _checkpoint(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    size = checkpoint_bytes(config)
    share, write = size / cluster.num_gpus, size / (cluster.disk_gb_per_second * 1e9)
    interval = config.save_every * step_time(config, layout, cluster).total
    kept = (config.keep_last + 1) * size
    stall = share / (cluster.host_gb_per_second * 1e9)
    host = f"({_figure(share * cluster.gpus_per_node / 1e9)} GB of memory a node)"
    lines = [
        f"size   {_figure(size / 1e9)} GB of float32 weights and optimizer states; "
        f"{config.keep_last} and the best: {_figure(kept / 1e9)} GB of disk",
        f"stall  {_figure(stall)} s: each process copies {_figure(share / 1e9)} GB to its host {host}",
        f"write  {_figure(write)} s beside training, at {cluster.disk_gb_per_second:g} GB/s for all; "
        f"due every {_figure(interval)} s",
    ]
    if write >= interval:
        lines.append("SAVES WAIT for the one before them: raise save_every, or the disk's speed")
    return lines


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
