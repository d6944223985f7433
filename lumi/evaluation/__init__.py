"""How good a model is: held-out loss while training, and `lumi evaluate`: tasks, perplexity and smoke tests."""

from lumi.evaluation.held_out import HeldOut, evaluating, held_out_loss

__all__ = ["HeldOut", "evaluating", "held_out_loss"]
