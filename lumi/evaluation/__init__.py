"""How good a model is: held-out loss during training; tasks, texts and smoke tests of `lumi evaluate`."""

from lumi.evaluation.held_out import HeldOut, evaluating, held_out_batches, held_out_loss

__all__ = ["HeldOut", "evaluating", "held_out_batches", "held_out_loss"]
