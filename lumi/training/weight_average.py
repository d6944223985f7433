"""A moving average of the weights over the steps, which `final/` may hold instead of the last weights."""

import torch
from torch import Tensor, nn

from lumi.kernels.wide_float import wide_float
from lumi.model.lora import trained_tensors
from lumi.parallel.tensor_pieces import piece


class WeightAverage:
    """The mean of the trained weights after each update, where the one k updates ago counts decay^k times.

    The weights that the run begins with have no part in it. The values are of no use before the first update.

    Attributes:
        values: by the parameters' names, of their shapes and dtype, in as many parts as they are.
    """

    def __init__(self, model: nn.Module, decay: float):
        """
        Args:
            decay: in [0, 1), of one update.
        """
        self.decay, self.trained = decay, trained_tensors(model)
        self.values = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.trained.items()}
        device = next(iter(self.trained.values())).device
        self.num_updates = torch.zeros((), dtype=wide_float(device), device=device)

    @torch.no_grad()
    def update(self, accepted: Tensor) -> None:
        """Take in the weights as they are now. It never waits for the device.

        It needs as much memory again for a moment: call it when no gradients are left.

        Args:
            accepted: bool scalar on the device; where it is False, nothing changes.
        """
        self.num_updates += accepted
        share = torch.where(accepted, (1 - self.decay) / (1 - self.decay**self.num_updates), 0.0)
        averages = [piece(value).local for value in self.values.values()]
        moves = torch._foreach_sub([piece(weight).local for weight in self.trained.values()], averages)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(averages, moves)
