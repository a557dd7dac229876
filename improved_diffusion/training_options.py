"""How to train: the options of :class:`.TrainLoop`, and what contradicts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from .errors import UserError
from .flags import numbers, option, require, require_at_least
from .posthoc_ema import parse_sigma_rels
from .resample import SCHEDULE_SAMPLERS


@dataclass(frozen=True)
class TrainOptions:
    """How to train; see :class:`TrainLoop`."""

    schedule_sampler: str = option(
        "uniform", f"which timesteps to train on: {', '.join(SCHEDULE_SAMPLERS)}"
    )
    lr: float = option(1e-4, "learning rate")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    lr_anneal_steps: int = option(
        0, "train this many steps while the learning rate falls to 0; 0: no such bound"
    )
    batch_size: int = option(1, "images per step and process")
    microbatch: int = option(-1, "images per forward pass, to save memory; -1: the whole batch")
    ema_rate: str = option("0.9999", "rates of the averaged weights, separated by commas")
    posthoc_ema: str = option(
        "",
        "relative widths of power-function averages to keep, such as 0.05,0.1: ema_reconstruct.py "
        "makes others of them; '': none",
    )
    log_interval: int = option(10, "steps between rows of the log")
    save_interval: int = option(10000, "steps between checkpoints")
    resume_checkpoint: str = option(
        "",
        "any file of a checkpoint, or a folder of them, to start from; '': the newest of the run "
        "folder, if there is one",
    )
    use_fp16: bool = option(False, "compute in float16 with a scaled loss")
    fp16_scale_growth: float = option(1e-3, "growth of the loss scale's log2 per step")

    def __post_init__(self) -> None:
        require(
            self.schedule_sampler in SCHEDULE_SAMPLERS,
            "schedule_sampler",
            self.schedule_sampler,
            " or ".join(SCHEDULE_SAMPLERS),
        )
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        require_at_least(0, self, ["weight_decay", "lr_anneal_steps", "fp16_scale_growth"])
        require_at_least(1, self, ["batch_size", "log_interval", "save_interval"])
        micro = self.microbatch
        require(micro == -1 or micro >= 1, "microbatch", micro, "at least 1, or -1 for no split")
        parse_ema_rates(self.ema_rate)
        parse_sigma_rels(self.posthoc_ema)


def parse_ema_rates(ema_rate: str | float) -> list[float]:
    """Read EMA rates: a number, or a text of numbers separated by commas.

    :raises ValueError: for a rate outside (0, 1), or none.
    """
    rates = numbers("ema_rate", str(ema_rate), float)
    require(bool(rates) and all(0 < r < 1 for r in rates), "ema_rate", ema_rate, "in (0, 1)")
    return rates


def check_class_dropout(model: nn.Module, class_dropout: float) -> None:
    """Refuse a share of labels to drop that the model cannot learn from.

    :raises ValueError: for a share outside of [0, 1), or a model without a null class.
    """
    require(0 <= class_dropout < 1, "class_dropout", class_dropout, "at least 0 and below 1")
    if class_dropout and getattr(model, "null_class", None) is None:
        raise UserError(
            f"--class_dropout {class_dropout} needs a model of classes with one for no class: give "
            "--class_cond True, and make the network with null_class=True"
        )
