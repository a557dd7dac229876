"""How a gradient becomes an update: precision, clipping, the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .flags import option, require, require_at_least

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
HOW_IT_COMPUTES = ("foreach", "fused")  # in an optimiser's groups


@dataclass(frozen=True)
class OptimizationOptions:
    """Precision, clipping and the learning rate's course."""

    precision: str = option(
        "",
        "fp32, or bf16 or fp16 by autocast, fp16 with a scaled loss; '': fp32, or what --use_fp16 "
        "says",
    )
    grad_clip: float = option(0.0, "scale gradients down to this norm; 0: leave them")
    lr_warmup_steps: int = option(0, "steps in which the learning rate rises linearly from 0")
    lr_schedule: str = option(
        "",
        "course of the learning rate: constant, linear or cosine (to 0 at the last step), or "
        "inverse_sqrt (after the warm-up); '': linear with --lr_anneal_steps, else constant",
    )
    ema_warmup: bool = option(
        False, "averages at step n use a rate of at most (1 + n) / (10 + n), to forget the start"
    )

    def __post_init__(self) -> None:
        names = " or ".join(PRECISIONS)
        require(self.precision in ("", *PRECISIONS), "precision", self.precision, names)
        known = self.lr_schedule in ("", *LR_SCHEDULES)
        require(known, "lr_schedule", self.lr_schedule, " or ".join(LR_SCHEDULES))
        require_at_least(0, self, ["grad_clip", "lr_warmup_steps"])
        if self.lr_schedule == "inverse_sqrt" and not self.lr_warmup_steps:
            raise UserError(
                "--lr_schedule inverse_sqrt needs --lr_warmup_steps W: the rate is lr sqrt(W / n)"
            )

    def lr_factor(self, step: int, lr_anneal_steps: int, total_steps: int | None) -> float:
        """What the learning rate is multiplied by in a step, counted from 0.

        :param lr_anneal_steps: where the rate reaches 0; else it is ``total_steps``.
        :raises ValueError: if the schedule needs an end and there is none.
        """
        warmup = self.lr_warmup_steps
        name = self.lr_schedule or ("linear" if lr_anneal_steps else "constant")
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        end = lr_anneal_steps or total_steps
        if name in FALLING and not end:
            raise UserError(
                f"--lr_schedule {name} needs an end: give --lr_anneal_steps, --train_steps or "
                "--train_images"
            )
        if name == "constant" and lr_anneal_steps:
            raise UserError(
                f"--lr_schedule constant contradicts --lr_anneal_steps {lr_anneal_steps}: give "
                "--train_steps for the end"
            )
        return rise * LR_SCHEDULES[name](step, end or 0, warmup)

    @property
    def changes_lr(self) -> bool:
        """Whether the learning rate moves by itself, apart from ``lr_anneal_steps``."""
        return bool(self.lr_warmup_steps) or self.lr_schedule not in ("", "constant")

    def ema_rate(self, rate: float, step: int) -> float:
        """The rate of an average in a step, counted from 0."""
        return min(rate, (1 + step) / (10 + step)) if self.ema_warmup else rate


LR_SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, end, warmup: 1.0,
    "linear": lambda step, end, warmup: 1 - step / end,
    "cosine": lambda step, end, warmup: (1 + math.cos(math.pi * step / end)) / 2,
    "inverse_sqrt": lambda step, end, warmup: math.sqrt(warmup / max(warmup, step + 1)),
}
FALLING = ("linear", "cosine")


def check_precision(options: OptimizationOptions, use_fp16: bool, device: torch.device) -> None:
    """Check that the device computes in the precision that is asked for.

    :raises ValueError: naming the flag, if it does not, or if ``use_fp16`` says otherwise.
    """
    precision = options.precision
    if use_fp16 and precision not in ("", "fp16"):
        raise UserError(f"--use_fp16 True contradicts --precision {precision}: give one of them")
    dtype = torch.float16 if use_fp16 else PRECISIONS[precision or "fp32"]
    if dtype is None:
        return
    flag = "--use_fp16 True" if use_fp16 else f"--precision {precision}"
    if not _computes_in(dtype, device):
        raise UserError(
            f"{flag}: {device} cannot train in {str(dtype).removeprefix('torch.')}; choose another "
            "--precision"
        )


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Try one convolution and its gradient."""
    try:
        if dtype is torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            return False  # emulated there, slower than float32
        x = torch.ones(1, 1, 3, 3, device=device, dtype=dtype, requires_grad=True)
        F.conv2d(x, x).sum().backward()
    except RuntimeError:
        return False
    return True


def autocast(
    model: Callable[..., Tensor], dtype: torch.dtype, device: str
) -> Callable[..., Tensor]:
    """A model that computes in another type and returns float32; losses stay in float32.

    :param device: its type, such as "cuda".
    """

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return model(*args, **kwargs).float()

    return forward


def make_optimizer(params: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; its update is one operation on all parameters where torch has one for their device."""
    fused = True if _fuses(params) else None
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=fused)


def _fuses(params: Sequence[Tensor]) -> bool:
    """Try the fused update, on a number of each device and type."""
    kinds = {(param.device, param.dtype) for param in params}
    numbers = [torch.zeros(1, device=device, dtype=dtype) for device, dtype in kinds]
    for number in numbers:
        number.grad = torch.zeros_like(number)
    try:
        torch.optim.AdamW(numbers, fused=True).step()
    except RuntimeError:
        return False
    return True


def portable_state(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state to be stored, which does not say how this machine computes."""
    state = opt.state_dict()
    groups = [
        {key: None if key in HOW_IT_COMPUTES else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_portable_state(opt: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a stored state into an optimiser that goes on computing as it was made to.

    :raises ValueError: if the state is that of other parameters; as other errors of torch's.
    """
    own = opt.param_groups[0]
    how = {key: own[key] for key in HOW_IT_COMPUTES if key in own}
    # beforehand: it decides on which device the counts of steps are
    opt.load_state_dict(
        {**state, "param_groups": [{**group, **how} for group in state["param_groups"]]}
    )


def clip_gradients(grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients, in place, so that their norm is at most ``max_norm``.

    :param norm: [] their norm; stays on the device.
    """
    torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
