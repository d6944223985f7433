"""Steps that are skipped: whose data it was, and what a run says when it gives up."""

import math
from pathlib import Path

from tqdm import tqdm

from lumi.config import UserError
from lumi.parallel.world import World
from lumi.training.resolved_run import ResolvedRun
from lumi.training.run_data import RunData
from lumi.training.run_log import RunLog
from lumi.training.train_state import StepOutcome


def report_skipped(outcome: StepOutcome, run: ResolvedRun, data: RunData, world: World, log: RunLog) -> None:
    """Name the documents behind a skipped step; each process names its own."""
    step, spike = outcome.step, ", a spike" if outcome.is_finite else ""
    log.say(f"step {step} skipped: loss {outcome.loss}, gradient norm {outcome.gradient_norm}{spike}")
    for index, loss in enumerate(outcome.micro_losses):
        if not math.isfinite(outcome.loss) and math.isfinite(loss):
            # another micro-batch spoilt the loss; for a spike, or a gradient, nobody knows which one did
            continue
        try:
            named = data.name_documents(step, *run.rows(world.data_rank, index))
        except (UserError, OSError) as error:
            named = str(error)
        tqdm.write(f"step {step}: loss {loss} in a micro-batch of {named}")


def too_many_skipped(outcome: StepOutcome, skipped_in_a_row: int, checkpoint: Path) -> UserError:
    """The error that ends a run after too many skipped steps."""
    what = "the loss or gradient was not finite"
    if outcome.is_finite:
        what = "the loss was a spike, or it or the gradient not finite,"
    remedy = " or a higher max_loss_sigmas" if outcome.is_finite else ""
    return UserError(
        f"{what} in {skipped_in_a_row} steps running, up to step {outcome.step}; to inspect: {checkpoint}",
        remedy=f"a lower optimizer.peak_lr{remedy} often mends it",
    )
