"""AdamW with decoupled weight decay and gradient clipping, for all tensors of a model in one operator.

    g = grad * factor,   factor = min(1, max_norm / (norm / loss_scale)) / loss_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    step = step + 1
    param = param - lr * weight_decay * param - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. If `norm` is not finite, nothing changes. The
device decides that, and so it counts the steps too: the host need not wait.

Precision: float32 throughout. The factors that all elements share are computed in float64 and rounded once.
Cost: param, m and v are read and written once, and grad is read once: 28 bytes per element, 30 with the
bfloat16 copy. Gradients are clipped as they are read; separate clipping would read and write grad once more.
csrc/adamw.h holds the update; csrc/adamw.cpp and csrc/adamw.cu call it.
"""

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lumi.kernels.native import csrc as _csrc
from lumi.kernels.native import native_device
from lumi.kernels.wide_float import wide_float

_shape = attrgetter("shape")


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    norm: Tensor | None = None,
    max_norm: float = math.inf,
    loss_scale: float = 1.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """The definition. Arguments as `adamw`, in any floating dtype, with any strides, on any device."""
    if not params:
        return
    if norm is None:
        norm = torch.zeros((), dtype=wide_float(params[0].device), device=params[0].device)
    factor, finite = (max_norm / (norm / loss_scale)).clamp(max=1.0) / loss_scale, norm.isfinite()
    with torch.no_grad():
        for index, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(
            zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
        ):
            count = step.to(wide_float(step.device)) + 1
            g = grad * factor.to(param.dtype)
            m = beta1 * exp_avg + (1 - beta1) * g
            v = beta2 * exp_avg_sq + (1 - beta2) * g * g
            update = m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt() + eps)
            new = param - lr * weight_decays[index] * param - lr * update
            for target, value in ((param, new), (exp_avg, m), (exp_avg_sq, v), (step, count)):
                target.copy_(torch.where(finite, value, target))
            if copies is not None:
                copies[index].copy_(torch.where(finite, param.to(copies[index].dtype), copies[index]))


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    norm: Tensor | None = None,
    max_norm: float = math.inf,
    loss_scale: float = 1.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """One AdamW step of all tensors, in place.

    If all tensors are plain, contiguous and float32 on one device, C++ or CUDA code takes them
    (`native_device`).
    Anything else goes to `adamw_reference`: another dtype, other strides, a tensor subclass such as DTensor,
    a GPU without compiled code. An error in either is raised; the other is not tried. On a CUDA device the
    step is queued on the current stream, and nothing waits for it.

    A CUDA graph keeps the tensors' addresses and every number as they were at capture. A replay reads `norm`,
    `steps` and the tensors' values anew. Call this once before a capture: the first call loads the kernels.

    Args:
        params: floating tensors of any shapes, all on one device; written. No memory may overlap, here or
            below.
        grads: gradients, one for each parameter, of its shape and dtype; left alone.
        exp_avgs, exp_avg_sqs: running means of gradients and of their squares, likewise; written.
        steps: float32 scalars on the parameters' device, one for each: its updates so far. One more
            afterwards.
        weight_decays: one for each parameter, at least 0.
        lr: learning rate.
        beta1, beta2: in [0, 1).
        eps: positive.
        norm: scalar of `wide_float` on the parameters' device, the L2 norm of all gradients as they are;
            None: do not clip. If it is not finite, nothing is written.
        max_norm: positive; the largest norm that gradients may have once `loss_scale` is divided out.
        loss_scale: positive; the factor that is in the gradients.
        copies: bfloat16 tensors, one for each parameter, of its shape; written with the new parameters. None:
            no copies.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not fit each other, or a number is out of its
            range.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    numbers: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    numbers |= {"max_norm": max_norm, "loss_scale": loss_scale}
    _check_numbers(numbers, weight_decays)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if len(weight_decays) != len(params):
        raise ValueError(
            f"weight_decays must be one for each of {len(params)} parameters, got {len(weight_decays)}"
        )
    device = _native_device(lists, copies)
    if device is None:  # tensors for the reference, or tensors that do not fit each other
        _check_tensors(lists if copies is None else {**lists, "copies": copies})
    _check_steps(steps, params)
    if norm is not None:
        _check_norm(norm, params)
    if not params:
        return
    if device is None:
        adamw_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            weight_decays=weight_decays,
            norm=norm,
            copies=copies,
            **numbers,
        )
        return
    arguments = _csrc.AdamWArguments(
        **{name: list(map(Tensor.data_ptr, tensors)) for name, tensors in lists.items()},
        steps=list(map(Tensor.data_ptr, steps)),
        copies=list(map(Tensor.data_ptr, copies or ())),
        sizes=list(map(Tensor.numel, params)),
        weight_decays=weight_decays,
        norm=0 if norm is None else norm.data_ptr(),
        **numbers,
    )
    if device.type == "cpu":
        _csrc.adamw(arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            scales = torch.empty(len(params), 4, dtype=torch.float32, device=device)
            _csrc.adamw_cuda(
                arguments, scales.data_ptr(), device.index, torch.cuda.current_stream(device).cuda_stream
            )
    # Autograd did not see the writes.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps, *(copies or ())])


def _native_device(
    lists: dict[str, Sequence[Tensor]], copies: Sequence[Tensor] | None
) -> torch.device | None:
    """The device whose compiled code can take these tensors as they are, all fitting each other, or None."""
    device = native_device([tensor for tensors in lists.values() for tensor in tensors])
    if device is None or (copies and native_device(copies, torch.bfloat16) != device):
        return None
    shapes = list(map(_shape, lists["params"]))
    others = [lists["grads"], lists["exp_avgs"], lists["exp_avg_sqs"], *([] if copies is None else [copies])]
    return device if all(list(map(_shape, tensors)) == shapes for tensors in others) else None


def _check_numbers(numbers: dict[str, Any], weight_decays: Sequence[float]) -> None:
    for name in ("eps", "max_norm", "loss_scale"):
        if not numbers[name] > 0:
            raise ValueError(f"{name} must be positive, got {numbers[name]}")
    for name in ("beta1", "beta2"):
        if not 0 <= numbers[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {numbers[name]}")
    if not numbers["lr"] >= 0:
        raise ValueError(f"lr must be at least 0, got {numbers['lr']}")
    for decay in set(weight_decays):  # few, however many parameters there are
        if not decay >= 0:
            raise ValueError(
                f"weight_decays[{list(weight_decays).index(decay)}] must be at least 0, got {decay}"
            )


def _check_tensors(lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must be one for each of {len(params)} parameters, got {len(tensors)}")
    for index, param in enumerate(params):
        if not param.dtype.is_floating_point or param.device != params[0].device:
            raise ValueError(
                f"params[{index}] must be floating-point and on {params[0].device}, "
                f"got {param.dtype} on {param.device}"
            )
    for name, tensors in lists.items():
        for index, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            dtype = torch.bfloat16 if name == "copies" else param.dtype
            if tensor.shape != param.shape or tensor.dtype != dtype or tensor.device != param.device:
                raise ValueError(
                    f"{name}[{index}] must be {dtype} of shape {tuple(param.shape)} on {param.device}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
                )


def _check_steps(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(steps) != len(params):
        raise ValueError(f"steps must be one for each of {len(params)} parameters, got {len(steps)}")
    for index, step in enumerate(steps):
        if step.shape != () or step.dtype != torch.float32 or step.device != params[0].device:
            raise ValueError(
                f"steps[{index}] must be a float32 scalar on {params[0].device}, "
                f"got {step.dtype} of shape {tuple(step.shape)} on {step.device}"
            )


def _check_norm(norm: Tensor, params: Sequence[Tensor]) -> None:
    wide = wide_float(norm.device)
    if norm.ndim or norm.dtype != wide or (params and norm.device != params[0].device):
        place = params[0].device if params else "the device of the parameters"
        expected = f"a {str(wide).removeprefix('torch.')} scalar on {place}"
        raise ValueError(
            f"norm must be {expected}, got {norm.dtype} of shape {tuple(norm.shape)} on {norm.device}"
        )
