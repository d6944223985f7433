"""What the tests of the losses share."""

import torch

NAMES = ("loss", "dhidden", "dweight")
OPTIONS = [{}, {"z_loss": 1e-2}]


def run(function, hidden, weight, targets, factor=1.0, **options):
    """The loss and the gradients of hidden and weight, for an incoming gradient of `factor`."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, targets, **options)
    return loss, *torch.autograd.grad(loss * factor, (hidden, weight))


def inputs(N, V, D, ignored=0.3):
    """float64 hidden and weight, and targets of which a share is ignored."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    return hidden, weight, targets
