"""A config and its paths -> a `ResolvedRun`: every choice of a run, made once, before anything is built."""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from lumi.checkpoint.checkpoint import list_checkpoints
from lumi.checkpoint.manifest import STATE
from lumi.config import UserError, read_json, to_dict
from lumi.formats.adapter_format import is_adapter
from lumi.formats.checkpoint_folder import MODEL_PATH
from lumi.formats.hf_format import read_shape
from lumi.formats.hub import as_before, hub_model, local_folder
from lumi.formats.pretrained import locate
from lumi.host.hub_cache import origin_of
from lumi.host.memory import free_memory
from lumi.kernels.bundle import Ops, select
from lumi.model.lora import find_targets, trained_tensors, wrap
from lumi.model.transformer import ModelConfig, Transformer
from lumi.parallel.layout import Layout
from lumi.parallel.tensor_parallel import check_tensor_parallel
from lumi.parallel.world import World
from lumi.training.micro_batch import choose_micro_batch
from lumi.training.run_config import Paths, TrainConfig
from lumi.training.trackers import check_installed


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with every choice made. Nothing here changes later.

    Attributes:
        config: with its model, and its micro-batch as a number.
        shape: the model's; `config.model`.
        start: the folder of the model that the run begins with; None: new weights.
        ops: the operators that the model is built from.
        micro_steps: micro-batches that one process computes in a step.
        num_trained: parameters of the adapters, where the rest is frozen; None: every parameter is trained.
    """

    config: TrainConfig
    paths: Paths
    shape: ModelConfig
    start: Path | None
    ops: Ops
    layout: Layout
    micro_steps: int
    num_trained: int | None

    def rows(self, data_rank: int, micro_step: int) -> tuple[int, int]:
        """The rows [start, stop) of a step that a process computes in one of its micro-steps."""
        size = self.config.batches.micro_batch_rows
        start = (data_rank * self.micro_steps + micro_step) * size
        return start, start + size


def resolve_run(config: TrainConfig, paths: Paths, world: World) -> ResolvedRun:
    """Make every choice. All processes call this together and get the same answer.

    Raises:
        UserError: config, model, processes and device do not go together, or a tracker is not installed.
    """
    paths = _fetch(paths, world)
    with world.fail_together():
        if world.is_main:  # the others tell trackers nothing
            check_installed(config.trackers)
        config, shape, start = resolve_model(config, paths.model_path)
        ops = _select_ops(config, world.device, shape.head_dim)
        dora = config.lora is not None and config.lora.dora
        check_tensor_parallel(shape, config.batches.sequence_length, world.layout.tensor, dora)
        num_trained = _count_trained(config, shape, ops)
    if config.batches.micro_batch_size == "auto":
        free = min(world.gather(free_memory(world.device) or 0))
        before = world.gather(_micro_batch_before(paths) if world.is_main else None)[0]
        with world.fail_together():
            device = world.device.type
            config = choose_micro_batch(config, world.layout, device, ops.name, free, num_trained, before)
    with world.fail_together():
        micro_steps = config.batches.micro_steps(world.layout.data)
    return ResolvedRun(
        config=config,
        paths=paths,
        shape=shape,
        start=start,
        ops=ops,
        layout=world.layout,
        micro_steps=micro_steps,
        num_trained=num_trained,
    )


def _fetch(paths: Paths, world: World) -> Paths:
    """The paths, with folders here for models on the hub. All processes take the same commit of them.

    A run that goes on takes the commit that it began with, where none is given.
    """
    model: Path | None = paths.model_path
    tokenizer = Path(paths.tokenizer_dir)
    with world.fail_together(interruptible=True):
        if world.is_main:  # downloads; the others on its machine find it in the cache
            before = _start_before(paths)
            model = model and _pinned(as_before(model, before))
            tokenizer = _pinned(as_before(tokenizer, before), weights=False)
    model, tokenizer = world.gather((model, tokenizer))[0]
    with world.fail_together(interruptible=True):
        tokenizer_dir = str(local_folder(tokenizer, weights=False))
        return dataclasses.replace(
            paths, model_path=model and local_folder(model), tokenizer_dir=tokenizer_dir
        )


def _pinned(path: Path, weights: bool = True) -> Path:
    """The path; where it names a model on the hub, `org/name@commit`, whose files are here then."""
    return Path(str(origin_of(local_folder(path, weights=weights)))) if hub_model(path) else path


def _start_before(paths: Paths) -> str | None:
    """The model that the run to go on with began with, as its newest checkpoint names it."""
    folders = [] if paths.resume is None else [Path(paths.resume)]
    if paths.resume == "auto":
        with contextlib.suppress(OSError):
            folders = list_checkpoints(paths.output_dir / "checkpoints")[::-1]
    for folder in folders:
        try:
            return read_json(folder / STATE).get(MODEL_PATH)
        except (UserError, OSError, AttributeError):
            continue
    return None  # whether the run can go on is for its folder to say


def resolve_model(
    config: TrainConfig, model_path: Path | None
) -> tuple[TrainConfig, ModelConfig, Path | None]:
    """The config with its model filled in, that model, and the folder of the weights that it begins with.

    Raises:
        UserError: there is neither a model in the config nor a `model_path`, or both and they differ;
            LoRA without a `model_path`.
    """
    if model_path is None:
        if config.model is None:
            raise UserError(
                "config.model must give the shape of the model where --model-path gives no model, got null"
            )
        if config.lora is not None:
            raise UserError("config.lora needs a model to adapt: pass --model-path, or take lora out")
        if config.dpo is not None:
            raise UserError("config.dpo needs a model that answers: pass --model-path, or take dpo out")
        return config, config.model, None
    folder = locate(model_path)
    if is_adapter(folder):
        raise UserError(
            f"--model-path must be a whole model to train, got the adapter {folder}; "
            f"`lumi merge` makes one of it and its base"
        )
    shape = read_shape(folder)
    if config.model is not None and (ours := to_dict(config.model)) != (theirs := to_dict(shape)):
        key = next(key for key in theirs if ours[key] != theirs[key])
        raise UserError(
            f"config.model must be null, or that of --model-path {folder}: "
            f"{key} must be {theirs[key]}, got {ours[key]}"
        )
    try:
        return dataclasses.replace(config, model=shape), shape, folder
    except ValueError as error:
        raise UserError(f"--model-path {folder}:", str(error)) from error


def _select_ops(config: TrainConfig, device: torch.device, head_dim: int) -> Ops:
    try:
        return select(config.kernels, device, head_dim, getattr(torch, config.dtype))
    except ValueError as error:
        raise UserError(str(error)) from error


def _count_trained(config: TrainConfig, shape: ModelConfig, ops: Ops) -> int | None:
    """Parameters of the adapters and of trained rows; counted on the "meta" device, which holds no values."""
    if config.lora is None:
        return None
    with torch.device("meta"):
        model = Transformer(shape, ops)
        rows = range(len(set(config.lora.tokens)))
        wrap(model, find_targets(model, config.lora.targets), config.lora, rows)
    return sum(tensor.numel() for tensor in trained_tensors(model).values())


def _micro_batch_before(paths: Paths) -> int | None:
    """The micro-batch that the run had until now.

    It keeps it where it fits: another one rounds differently.
    """
    if paths.resume is None:
        return None
    auto = paths.resume == "auto"
    try:
        data = read_json(paths.output_dir / "config.json" if auto else Path(paths.resume) / "state.json")
        return (data if auto else data["config"])["batches"]["micro_batch_size"]
    except (UserError, OSError, KeyError, TypeError):
        return None  # whether the run can go on from there is for its folder to say
