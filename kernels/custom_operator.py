"""Lumi's operators as torch sees them, and as nobody watches them.

torch.compile, dispatch modes (a counter of FLOPs, fake tensors) and subclasses of Tensor (DTensor) need one
opaque operator of torch, with known shapes. torch takes 50 to 100 microseconds on the host to call one: as
much as a small one's work. So where nothing watches, the function itself is called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN_TYPES = {Tensor, torch.nn.Parameter}  # any other type may keep its elements elsewhere, as DTensor does


class CustomOperator:
    """A function of tensors that is also an operator of torch: `opaque`, a `torch.library.CustomOpDef`.

    A call runs the function where nothing watches, and `opaque` elsewhere.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._function = function
        self.opaque = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.opaque.register_fake
        self.register_autograd = self.opaque.register_autograd

    def __call__(self, tensor: Tensor, *arguments: Any) -> Any:
        return (self._function if runs_directly(tensor) else self.opaque)(tensor, *arguments)


def custom_operator(name: str) -> Callable[[Callable[..., Any]], CustomOperator]:
    """Decorator: a `CustomOperator` called "lumi::..." of a function whose first argument is a tensor."""
    return lambda function: CustomOperator(name, function)


def runs_directly(*tensors: Tensor) -> bool:
    """Whether nothing watches what is done to `tensors`: no gradient is recorded, as in inference and in
    backward; nothing compiles, no dispatch mode is on; all are ones of memory."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return not watched and PLAIN_TYPES.issuperset(map(type, tensors))
