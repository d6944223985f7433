"""The micro-batch of a run: the one that it had, or the largest that fits into the free memory."""

import dataclasses

from lumi.config import UserError
from lumi.host.memory import USABLE
from lumi.parallel.layout import Layout
from lumi.training.memory import memory_of
from lumi.training.run_config import TrainConfig

# Of a micro-batch. Products are at their full rate by then; eight times as many made a step a quarter slower.
CPU_TOKENS = 2**14


def choose_micro_batch(
    config: TrainConfig,
    layout: Layout,
    device_type: str,
    kernels: str,
    free: int,
    num_trained: int | None,
    before: int | None = None,
) -> TrainConfig:
    """The config with the largest micro-batch that fits; on a CPU it has `CPU_TOKENS` at most.

    The batch stays as it is: larger micro-batches are fewer.

    Args:
        kernels: the name of the operators in use.
        free: bytes of the process that has the fewest, before the model is built; 0: not known.
        num_trained: parameters of the adapters where the rest is frozen; None: every parameter is trained.
        before: the micro-batch that the run had until now. The run keeps it where it fits: another one rounds
            differently.

    Raises:
        UserError: `batch_tokens` does not come out even, the free memory is unknown, or not even one row
            fits.
    """
    sizes = micro_batches(config, layout)  # ends with one row
    kept = [each for each in sizes if each.batches.micro_batch_size == before]
    if device_type == "cpu":
        most = max(1, CPU_TOKENS // config.batches.sequence_length)
        sizes = [each for each in sizes if each.batches.micro_batch_rows <= most]
    if not free:
        raise UserError(
            "batches.micro_batch_size must be a number on this system, "
            'which does not say how much memory is free, got "auto"'
        )
    for candidate in kept + sizes:
        needed = memory_of(candidate, layout, device_type, kernels, num_trained)["total"]
        if needed <= USABLE * free:
            return candidate
    raise UserError(
        f"a process needs about {needed / 2**20:,.0f} MiB for micro-batches of one row, "
        f"and has {USABLE * free / 2**20:,.0f} MiB ({USABLE:.0%} of what is free); "
        f"set gradient_checkpointing, a larger parallel.shard, or a smaller model"
    )


def with_micro_batch(config: TrainConfig, size: int) -> TrainConfig:
    """The config with a micro-batch of `size` rows."""
    return dataclasses.replace(config, batches=dataclasses.replace(config.batches, micro_batch_size=size))


def micro_batches(config: TrainConfig, layout: Layout) -> list[TrainConfig]:
    """The config with each micro-batch that divides one process's rows of a step, the largest first."""
    rows = with_micro_batch(config, 1).batches.micro_steps(layout.data)
    return [with_micro_batch(config, size) for size in range(rows, 0, -1) if rows % size == 0]
