"""Mixed precision by hand: half-precision weights beside one flat float32 master copy.

Mixed Precision Training: arXiv 1710.03740.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741
    """Convert a convolution to float16, in place; leave other modules alone."""
    _convert(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Convert a convolution to float32, in place; leave other modules alone."""
    _convert(l, torch.float32)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, _CONVOLUTIONS):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


def make_master_params(model_params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Copy parameters into one flat float32 parameter.

    :return: a list of that one parameter, [sum of sizes].
    """
    return [nn.Parameter(_flatten_copy([param.detach() for param in model_params]))]


def model_grads_to_master_grads(
    model_params: Iterable[Tensor], master_params: Sequence[Tensor]
) -> None:
    """Copy the gradients of the model into the flat float32 parameter's gradient.

    A parameter that got no gradient counts as zero.
    """
    master_params[0].grad = _flatten_copy(
        [
            torch.zeros_like(param) if param.grad is None else param.grad.detach()
            for param in model_params
        ]
    )


def _flatten_copy(tensors: Iterable[Tensor]) -> Tensor:
    """One float32 vector that shares no memory with the tensors."""
    return _flatten_dense_tensors([t.to(torch.float32, copy=True) for t in tensors])


def master_params_to_model_params(
    model_params: Iterable[Tensor], master_params: Sequence[Tensor]
) -> None:
    """Copy the flat float32 parameter into the model's parameters, in their types."""
    model_params = list(model_params)
    for param, master in zip(
        model_params, unflatten_master_params(model_params, master_params), strict=True
    ):
        param.detach().copy_(master)


def unflatten_master_params(
    model_params: Iterable[Tensor], master_params: Sequence[Tensor]
) -> list[Tensor]:
    """View the flat parameter as tensors of the shapes of ``model_params``."""
    return list(_unflatten_dense_tensors(master_params[0].detach(), list(model_params)))


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set existing gradients to zero, in place."""
    for param in model_params:
        if param.grad is not None:
            if param.grad.grad_fn is not None:
                param.grad.detach_()
            param.grad.zero_()
