"""`lumi plan`: what a config needs on many GPUs, as text; the arithmetic is in `lumi.training.plan` and `lumi.planning.scale`."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from lumi.config import UserError
from lumi.host.devices import GPUS
from lumi.parallel.layout import Layout, describe_layout
from lumi.parallel.tensor_parallel import check_tensor_parallel
from lumi.planning.scale import Cluster, checkpoint_bytes, collectives, group_size, step_time
from lumi.training.memory import memory_of
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
    machines = f"{cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'} of {cluster.gpus_per_node} x {cluster.gpu}"
    sections = {
        f"{name} on {machines}: an estimate, by arithmetic": _run(config, layout, cluster),
        "memory of a GPU, GiB": _memory(config, layout, cluster),
        f"communication of a GPU in a step, in rings at {cluster.link_share:.0%} of the links' bandwidth": _communication(
            config, layout, cluster
        ),
        "time": _time(config, layout, cluster),
        "checkpoint": _checkpoint(config, layout, cluster),
    }
    return "\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items()
    )


def checked_layout(config: TrainConfig, cluster: Cluster) -> Layout:
    """The sides of the mesh. Raises UserError where the config cannot run on this cluster."""
    if config.model is None or config.lora is not None:
        raise UserError(
            "--config must be one of pre-training, with a model and without lora; a plan on paper reads no model from disk"
        )
    layout = config.parallel.layout(cluster.num_gpus)
    check_tensor_parallel(config.model, config.batches.sequence_length, layout.tensor, dora=False)
    config.batches.micro_steps(layout.data)
    return layout


def _with_micro_batch(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """The config with the largest micro-batch that fits; of one row where none does."""
    one = replace(config, batches=replace(config.batches, micro_batch_size=1))
    layout = checked_layout(one, cluster)
    rows = one.batches.micro_steps(layout.data)
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    sized = [replace(config, batches=replace(config.batches, micro_batch_size=size)) for size in sizes]
    return next(
        (candidate for candidate in sized if _memory_of(candidate, layout)["total"] <= _usable(cluster)), one
    )


def _kernels(config: TrainConfig) -> str:
    return "reference" if config.kernels == "reference" else "triton"


def _memory_of(config: TrainConfig, layout: Layout) -> dict[str, int]:
    return memory_of(config, layout, "cuda", _kernels(config))


def _usable(cluster: Cluster) -> float:
    return USABLE_SHARE * GPUS[cluster.gpu].memory_bytes


def _run(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    model, batches = config.model, config.batches
    assert model is not None
    places = [
        f"{side} of {group_size(layout, side)} over {'the network' if cluster.bandwidth(layout, side)[1] else 'NVLink'}"
        for side in reversed(Layout._fields)
        if group_size(layout, side) > 1
    ]
    shares = f"{layout.data} groups x {batches.micro_steps(layout.data)} micro-steps x {batches.micro_batch_rows} rows"
    return [
        f"model   {model.num_parameters:,} parameters, {model.num_layers} layers of {model.model_dim}",
        f"layout  {describe_layout(layout)}; {', '.join(places) or 'one process'}",
        f"step    {batches.batch_tokens:,} tokens: {shares} x {batches.sequence_length}",
        f"run     {config.num_steps:,} steps, {config.num_tokens:,} tokens ({config.num_tokens / model.num_parameters:.1f} per parameter)",
        f"with    {config.dtype}, {config.optimizer.kind}, {_kernels(config)} kernels",
    ]


def _memory(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    columns = {
        flag: _memory_of(replace(config, gradient_checkpointing=flag), layout) for flag in (False, True)
    }
    lines = [f"{'gradient_checkpointing':24}{'false':>10}{'true':>10}"]
    lines += [
        f"{part:24}" + "".join(f"{column[part] / 2**30:>10.2f}" for column in columns.values())
        for part in columns[False]
    ]
    usable, total = _usable(cluster), columns[config.gradient_checkpointing]["total"]
    share = f"{USABLE_SHARE:.0%} of {GPUS[cluster.gpu].memory_bytes / 2**30:.0f} = {usable / 2**30:.1f} GiB"
    chosen = f"gradient_checkpointing = {str(config.gradient_checkpointing).lower()}, as this config has it"
    if total <= usable:
        return [*lines, f"FITS in {share} with {chosen}"]
    return [*lines, f"DOES NOT FIT in {share} with {chosen}", *what_fits(config, cluster)]


def what_fits(config: TrainConfig, cluster: Cluster) -> list[str]:
    """Changes to a config under which it fits the GPUs: those of the fewest keys, the fastest first; else, more nodes."""
    found = []
    for changes, changed in _changes(config, cluster):
        try:
            layout = checked_layout(changed, cluster)
        except UserError:
            continue
        total = _memory_of(changed, layout)["total"]
        if changes and total <= _usable(cluster):
            seconds = step_time(changed, layout, cluster).total
            found.append(
                (
                    len(changes),
                    seconds,
                    f"would fit: {' '.join(changes)} ({total / 2**30:.1f} GiB, {seconds:.2f} s a step)",
                )
            )
    if found:
        fewest = min(number for number, _, _ in found)
        return [text for number, _, text in sorted(found) if number == fewest][:3]
    nodes = 2 * cluster.nodes
    if nodes > _MOST_NODES:
        return [f"nothing was found that fits, up to {_MOST_NODES} nodes"]
    more = what_fits(config, replace(cluster, nodes=nodes))
    return more if more[0].startswith(("on ", "nothing")) else [f"on {nodes} nodes {line}" for line in more]


def _changes(config: TrainConfig, cluster: Cluster) -> Iterator[tuple[list[str], TrainConfig]]:
    """Configs beside this one, and what was changed as overrides."""
    sizes = [config.batches.micro_batch_rows]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    layouts = [None, *(size for size in (1, 2, 4, 8) if cluster.gpus_per_node % size == 0)]
    for checkpointing, size, tensor in itertools.product(
        {config.gradient_checkpointing, True}, sizes, layouts
    ):
        changes = [] if checkpointing == config.gradient_checkpointing else ["gradient_checkpointing=true"]
        changes += [] if size == config.batches.micro_batch_size else [f"batches.micro_batch_size={size}"]
        parallel = config.parallel
        if tensor is not None:
            parallel = replace(parallel, replicate=1, shard=-1, tensor=tensor)
            changes += [f"parallel.{side}={getattr(parallel, side)}" for side in Layout._fields]
        batches = replace(config.batches, micro_batch_size=size)
        yield (
            changes,
            replace(config, gradient_checkpointing=checkpointing, batches=batches, parallel=parallel),
        )


def _communication(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    calls = collectives(config, layout)
    if not calls:
        return ["none: one process"]
    lines = [
        f"{'':29}{'collective':16}{'processes':>14}{'calls':>8}{'GB sent':>10}{'GB/s':>7}{'seconds':>10}  runs beside"
    ]
    for call in calls:
        bandwidth, over_network = cluster.bandwidth(layout, call.side)
        place = f"{group_size(layout, call.side)}, {'network' if over_network else 'NVLink'}"
        sent = call.sent_bytes(layout)
        figures = f"{call.calls:>8,}{_figure(sent / 1e9):>10}{_figure(bandwidth / 1e9):>7}{_figure(sent / bandwidth):>10}"
        lines.append(f"{call.name:29}{call.kind:16}{place:>14}{figures}  {call.beside}")
    return lines


def _time(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    model, time = config.model, step_time(config, layout, cluster)
    assert model is not None
    rate = config.batches.batch_tokens / time.total
    flops = model.flops_per_token(config.batches.sequence_length) * rate
    peak = GPUS[cluster.gpu].flops
    stall = checkpoint_bytes(config) / cluster.num_gpus / (cluster.host_gb_per_second * 1e9)
    days = (config.num_steps * time.total + config.num_steps / config.save_every * stall) / 86400
    return [
        f"products       {_figure(time.products)} s at {cluster.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s (--mfu)",
        f"recomputation  {_figure(time.recomputation)} s",
        f"optimizer      {_figure(time.optimizer)} s",
        f"communication  {_figure(time.communication)} s, of which {_figure(time.exposed)} s are waited for",
        f"step           {_figure(time.total)} s: MFU {flops / cluster.num_gpus / peak:.1%}, {rate:,.0f} tokens/s",
        f"whole run      {_figure(days)} days, without reading data and validation",
    ]


def _checkpoint(config: TrainConfig, layout: Layout, cluster: Cluster) -> list[str]:
    size = checkpoint_bytes(config)
    share, write = size / cluster.num_gpus, size / (cluster.disk_gb_per_second * 1e9)
    interval = config.save_every * step_time(config, layout, cluster).total
    host = share * cluster.gpus_per_node
    lines = [
        f"size   {_figure(size / 1e9)} GB of float32 weights and optimizer states; {config.keep_last} and the best: "
        f"{_figure((config.keep_last + 1) * size / 1e9)} GB of disk",
        f"stall  {_figure(share / (cluster.host_gb_per_second * 1e9))} s: each process copies {_figure(share / 1e9)} GB to its host "
        f"({_figure(host / 1e9)} GB of memory a node)",
        f"write  {_figure(write)} s beside training, at {cluster.disk_gb_per_second:g} GB/s for all; due every {_figure(interval)} s",
    ]
    return (
        lines
        if write < interval
        else [*lines, "SAVES WAIT for the one before them: raise save_every, or the disk's speed"]
    )


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
