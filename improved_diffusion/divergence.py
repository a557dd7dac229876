"""When losses or gradients are not finite: counting, and finding out where it began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import dist_util, parallel
from .compiling import not_compiled
from .image_datasets import Seekable
from .optimization import PRECISIONS, autocast

if TYPE_CHECKING:
    from .train_util import Batch, Cond, TrainLoop

PATIENCE = 20  # steps in a row that may be skipped before the run goes back
LOWERED_RATE = 0.1  # factor of the learning rate after going back


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element is finite; one synchronisation if they are."""
    tensors = [t for t in tensors if t.is_floating_point() or t.is_complex()]  # others always are
    # The norm reads each element once, and no bad one escapes it; finite ones may overflow it
    if bool(nn.utils.get_total_norm(tensors).isfinite()):
        return True
    checks = [tensor.isfinite().all() for tensor in tensors]
    return bool(torch.stack(checks).all())


def first_nonfinite_layer(model: nn.Module, compute: Callable[[], Tensor]) -> str:
    """The first layer, in the order of computation, whose output is not finite.

    :param compute: computes the loss [N] with the model.
    :return: its name and kind; or what else is not finite: a weight, the loss, a gradient.
    """
    names = [name for name, _ in model.named_parameters()]
    finite = [bool(p.isfinite().all()) for p in parallel.local(model.parameters())]
    bad = dist_util.any_rank(*(not ok for ok in finite))  # a process may hold a share of them
    if any(bad):
        return f"the weights of {names[bad.index(True)]}"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name or 'the network'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        loss = compute()
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        return found[0]
    if not loss.isfinite().all():
        return "the loss, from a finite output of the network"
    # Gradients flow backwards: the last parameter in the order of computation is hit first
    for name, param in reversed(list(model.named_parameters())):
        if param.grad is not None and not parallel.local([param.grad])[0].isfinite().all():
            return f"the gradient of {name}"
    return "nothing in a second pass over the same batch"


def divergence_report(loop: TrainLoop, batch: Batch, cond: Cond) -> dict[str, Any]:
    """What this process saw in the last step, as JSON takes it."""
    losses: list[Tensor] = []

    def compute() -> Tensor:
        dtype = PRECISIONS[loop.optimization.precision or "fp32"]
        model = autocast(loop.model, dtype, loop.device.type) if dtype else loop.model
        parts = zip(loop.microbatches(batch, cond), loop.timesteps, strict=True)
        for (part, micro, micro_cond), t in parts:
            losses.append(loop.losses(model, micro, t, micro_cond, part)["loss"])
        return torch.cat(losses)

    with torch.no_grad(), not_compiled():
        layer = first_nonfinite_layer(loop.model, compute)
    first = loop.images - loop.global_batch + dist_util.get_rank() * loop.batch_size
    return {
        "step": loop.global_step,
        "rank": dist_util.get_rank(),
        "first_nonfinite": layer,
        "timesteps": [t for part in loop.timesteps for t in part.tolist()],
        "losses": [str(loss) for part in losses for loss in part.tolist()],
        "images": loop.data.files(first, len(batch)) if isinstance(loop.data, Seekable) else [],
    }


def most_telling(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of the process where it began: the others see its averaged gradient only."""
    passed_on = ("the gradient", "nothing")
    began = [r for r in reports if not r["first_nonfinite"].startswith(passed_on)]
    return (began or list(reports))[0]
