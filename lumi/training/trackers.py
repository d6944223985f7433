"""Programs that show runs: TensorBoard, Weights & Biases, trackio. One class for each.

`metrics.jsonl` is the truth; a tracker gets every record of it. `lumi.training.tracking` calls them, each in
a thread of its own: what they raise ends no run, and how long they take delays no step.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lumi.config import UserError, read_json, write_json

PROJECT = "lumi"  # of W&B and trackio, where WANDB_PROJECT or TRACKIO_PROJECT gives no other
FINISH_SECONDS = 30.0  # the longest that the end of a run waits for its trackers


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run at its start.

    Attributes:
        id: stays the same when the run goes on, and is no other run's.
        config: the resolved config, as JSON values.
        resume_step: the step that the run goes on after; 0 for a new one.
    """

    folder: Path
    id: str
    config: Mapping[str, Any]
    resume_step: int

    @property
    def name(self) -> str:
        """The name that people see."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """The calls come from one thread, in this order."""

    def begin(self, run: TrackedRun) -> int:
        """Open the run, or go on with it.

        Returns the last step whose records it has and keeps. It gets earlier ones that it lacks.
        """
        ...

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take in a record."""
        ...

    def finish(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        """Take in the final figures, and the picture where there is one; write everything; close."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` in the run's folder."""

    def begin(self, run: TrackedRun) -> int:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        has_earlier = any(folder.glob("events.*"))
        # What earlier files hold of the steps that are done again is not shown.
        purged = run.resume_step + 1 if has_earlier and run.resume_step else 0
        self.writer = SummaryWriter(str(folder), purge_step=purged, flush_secs=10)
        config = json.dumps(run.config, indent=2).replace("\n", "\n    ")
        self.writer.add_text(
            "config", f"    {config}", run.resume_step
        )  # indented: Markdown shows it as it is
        return run.resume_step if has_earlier else 0

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        if any(name.startswith("checkpoint/") for name in scalars):
            self.writer.flush()  # a run that goes on from there does not do these steps again

    def finish(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        self.record(step, {f"final/{name}": value for name, value in figures.items()})
        if picture.exists():
            import matplotlib.image

            self.writer.add_image("loss", matplotlib.image.imread(picture), step, dataformats="HWC")
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B. Its files are in `wandb/` in the run's folder, or where WANDB_DIR says."""

    def begin(self, run: TrackedRun) -> int:
        import wandb

        self.wandb = wandb
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        if online and not wandb.login(prompt=False, verify=False):  # `init` would ask on the terminal
            raise RuntimeError("no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        settings = wandb.Settings(
            console="off",  # what a run prints can hold its data
            disable_git=True,  # the remote's address can hold a password
            disable_code=True,
            init_timeout=2 * FINISH_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self.run = wandb.init(
            id=run.id,
            name=run.name,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=None if "WANDB_DIR" in os.environ else str(run.folder),
            resume="allow",
            settings=settings,
        )
        self.run.config.update(dict(run.config), allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return int(self.run.summary.get("step", 0)) if online else run.resume_step

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def finish(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        if picture.exists():
            self.run.log({"step": step, "loss": self.wandb.Image(str(picture))})
        self.run.summary.update({f"final/{name}": value for name, value in figures.items()})
        self.run.finish()


class Trackio:
    """A run of trackio, in its own folder (TRACKIO_DIR), or on the server that its variables name."""

    def begin(self, run: TrackedRun) -> int:
        # trackio asks whether a value is a figure of matplotlib, and drops the value while another thread
        # imports that.
        import matplotlib.figure  # noqa: F401
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id}",  # trackio knows runs by their names
            config=dict(run.config),
            resume="allow",
            embed=False,
        )
        return max(self.run._next_step - 1, 0)  # trackio has no public name for it

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def finish(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        final: dict[str, Any] = {f"final/{name}": value for name, value in figures.items()}
        if picture.exists():
            final["loss"] = self.trackio.Image(str(picture))
        if final:
            self.run.log(final, step=step)
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError where the package of a tracker is missing. A tracker's name is its package's."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if (
            spec is None or spec.origin is None
        ):  # without origin: a mere folder of that name, as W&B makes one
            raise UserError(
                "trackers",
                "must be installed",
                got=f'"{name}", which is not',
                remedy="run: pip install 'lumi-train[trackers]'",
            )


def tracked_run(folder: Path, config: Mapping[str, Any], resume_step: int) -> TrackedRun:
    """A run by which its trackers know it again: `tracking.json` in its folder keeps the id."""
    path = folder / "tracking.json"
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return TrackedRun(folder=folder, id=str(read_json(path)["id"]), config=config, resume_step=resume_step)


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, each as KIND/FIELD; those of a list as KIND/FIELD/INDEX. null is left out."""
    numbers: dict[str, float] = {}
    for field, value in record.items():
        name = f"{record['kind']}/{field}"
        if isinstance(value, list):
            numbers |= {f"{name}/{index}": number for index, number in enumerate(value)}
        elif field != "step" and isinstance(value, int | float):
            numbers[name] = int(value) if isinstance(value, bool) else value
    return numbers
