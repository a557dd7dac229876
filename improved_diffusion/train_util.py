"""The training loop: microbatches, EMA, annealing, mixed precision, logging, saving, resuming."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, logger
from .checkpoint import parse_resume_step_from_filename
from .errors import UserError
from .flags import numbers, option, require, require_at_least
from .fp16_util import (
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import SCHEDULE_SAMPLERS, LossAwareSampler, ScheduleSampler, UniformSampler

INITIAL_LOG_LOSS_SCALE = 20.0  # log2: 1e6 brings typical gradients into float16's range

Batch = Tensor
Cond = dict[str, Tensor]


@dataclass(frozen=True)
class TrainOptions:
    """How to train; see :class:`TrainLoop`."""

    schedule_sampler: str = option(
        "uniform", "which timesteps to train on: uniform or loss-second-moment"
    )
    lr: float = option(1e-4, "learning rate")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    lr_anneal_steps: int = option(
        0, "train this many steps while the learning rate falls linearly to 0; 0: for ever"
    )
    batch_size: int = option(1, "images per step and process")
    microbatch: int = option(-1, "images per forward pass, to save memory; -1: the whole batch")
    ema_rate: str = option("0.9999", "rates of the averaged weights, separated by commas")
    log_interval: int = option(10, "steps between rows of the log")
    save_interval: int = option(10000, "steps between checkpoints")
    resume_checkpoint: str = option(
        "", "model file to continue from; '': the newest of the run folder, if there is one"
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


def parse_ema_rates(ema_rate: str | float) -> list[float]:
    """Read EMA rates: a number, or a text of numbers separated by commas.

    :raises ValueError: for a rate outside (0, 1), or none.
    """
    rates = numbers("ema_rate", str(ema_rate), float)
    require(bool(rates) and all(0 < r < 1 for r in rates), "ema_rate", ema_rate, "in (0, 1)")
    return rates


class TrainLoop:
    """Trains a diffusion model until ``lr_anneal_steps``, or for ever.

    With several processes their gradients are averaged. Checkpoints go to the run folder: a file
    named N that was written inside the loop holds N + 1 updates, one written after it holds N.

    :param model: the network, on its device.
    :param diffusion: gives the training losses.
    :param data: an endless iterator of (float [N, C, ...] in [-1, 1], dict of [N, ...] tensors).
    :param batch_size: N, of this process.
    :param microbatch: images per forward pass; -1 for all. Changes memory, not the gradient.
    :param lr: learning rate of AdamW.
    :param ema_rate: a rate, or a text of several separated by commas.
    :param log_interval: steps between rows of the log.
    :param save_interval: steps between checkpoints.
    :param resume_checkpoint: a model file; if empty, :func:`find_resume_checkpoint` is asked.
    :param use_fp16: compute in float16 with float32 master weights and a dynamic loss scale.
    :param fp16_scale_growth: growth of log2 of the loss scale per step.
    :param schedule_sampler: which timesteps to train on; uniform if None. One that is aware of
        losses needs equally many microbatches on every process.
    :param weight_decay: AdamW's.
    :param lr_anneal_steps: the last step; the learning rate falls linearly to 0. 0 for no end.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[tuple[Batch, Cond]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: str | float,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = parse_ema_rates(ema_rate)
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint or find_resume_checkpoint() or ""
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps

        self.step = 0  # since resume_step
        self.resume_step = 0
        self.global_batch = batch_size * dist_util.get_world_size()
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE
        self._pending_losses: list[tuple[Tensor, dict[str, Tensor]]] = []

        if self.resume_checkpoint:
            self._load_model()
        dist_util.sync_params(model.parameters())
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        if use_fp16:
            self.master_params = make_master_params(self.model_params)
            model.convert_to_fp16()  # type: ignore[operator]
        self.opt = torch.optim.AdamW(self.master_params, lr=lr, weight_decay=weight_decay)
        self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]
        if self.resume_checkpoint:
            self._load_ema()
            self._load_optimizer()

        self.use_ddp = dist_util.get_world_size() > 1
        self.ddp_model = self._data_parallel(model) if self.use_ddp else model

    def _data_parallel(self, model: nn.Module) -> nn.Module:
        device = self.model_params[0].device
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=128,
        )

    # -- resuming -----------------------------------------------------------------------------

    def _load_model(self) -> None:
        path = self.resume_checkpoint
        self.resume_step = parse_resume_step_from_filename(path)
        checkpoint.load_model(self.model, path)
        logger.log(f"resume: model restored from {path}, step {self.resume_step}")

    def _load_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            path = None
            if checkpoint.is_model_name(self.resume_checkpoint):
                path = find_ema_checkpoint(self.resume_checkpoint, self.resume_step, rate)
            if path is None:
                logger.log(f"resume: EMA {rate} cold, no file: starts at the model's weights")
                continue
            state = dist_util.load_state_dict(path, map_location="cpu")
            checkpoint.check_fit(self.model, state, path)
            self._copy_state_dict(state, params)
            logger.log(f"resume: EMA {rate} restored from {path}")

    def _load_optimizer(self) -> None:
        name = checkpoint.opt_name(self.resume_step)
        path = None
        if checkpoint.is_model_name(self.resume_checkpoint):
            path = checkpoint.find_beside(self.resume_checkpoint, name)
        if path is None:
            logger.log(f"resume: optimiser cold, no file {name}: starts without momentum")
            return
        state = dist_util.load_state_dict(path, map_location="cpu")
        try:
            stored_lr = state["param_groups"][0]["lr"]
            self.opt.load_state_dict(state)
            updates = {int(entry["step"]) for entry in state["state"].values()}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"'{path}' does not fit this run's optimiser ({error}): was --use_fp16 the same?"
            ) from None
        logger.log(f"resume: optimiser restored from {path}")
        for group in self.opt.param_groups:  # the flags win over the file
            group["lr"], group["weight_decay"] = self.lr, self.weight_decay
        if not self.lr_anneal_steps and stored_lr != self.lr:
            logger.log(f"resume: learning rate {self.lr}, was {stored_lr} in {name}")
        if updates and updates != {self.resume_step}:
            self.step = 1  # written inside the loop: the step of that name is done

    # -- the loop -----------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train to the last step, saving on the way and at the end.

        With $DIFFUSION_TRAINING_TEST set, stop after the first save past step 0.
        """
        first_step = self.step
        while not self.lr_anneal_steps or self._absolute_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self._absolute_step % self.log_interval == 0:
                self._flush_losses()
                logger.dumpkvs()
            if self._absolute_step % self.save_interval == 0:
                self.save()
                if os.environ.get("DIFFUSION_TRAINING_TEST", "") and self.step > first_step:
                    return
            self.step += 1
        if self.step == first_step:
            logger.log(f"nothing to do: {self._absolute_step} of {self.lr_anneal_steps} steps done")
        elif (self._absolute_step - 1) % self.save_interval:
            self.save()

    @property
    def _absolute_step(self) -> int:
        return self.step + self.resume_step

    def run_step(self, batch: Batch, cond: Cond) -> None:
        """One update from one batch [N, C, ...] of this process."""
        self.forward_backward(batch, cond)
        if self.use_fp16:
            self.optimize_fp16()
        else:
            self.optimize_normal()
        self.log_step()

    def forward_backward(self, batch: Batch, cond: Cond) -> None:
        """Leave the gradient of the batch's mean loss on the model's parameters."""
        zero_grad(self.model_params)
        device = self.model_params[0].device
        batch = batch.to(device, non_blocking=True)
        cond = {key: value.to(device, non_blocking=True) for key, value in cond.items()}
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            micro = batch[part]
            t, weights = self.schedule_sampler.sample(len(micro), device)
            last = start + self.microbatch >= len(batch)
            with contextlib.nullcontext() if last else self._no_sync():
                losses = self.diffusion.training_losses(
                    self.ddp_model,
                    micro,
                    t,
                    model_kwargs={key: value[part] for key, value in cond.items()},
                )
                # each image weighs the same, however the batch is split
                loss = (losses["loss"] * weights).sum() / len(batch)
                if self.use_fp16:
                    loss = loss * 2**self.lg_loss_scale
                loss.backward()
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            self._pending_losses.append(
                (t, {key: (value * weights).detach() for key, value in losses.items()})
            )

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Leave averaging over the processes to a later backward pass."""
        if isinstance(self.ddp_model, DistributedDataParallel):
            return self.ddp_model.no_sync()
        return contextlib.nullcontext()

    def optimize_fp16(self) -> None:
        """Update the float32 master weights, or lower the loss scale if gradients overflowed."""
        model_grads_to_master_grads(self.model_params, self.master_params)
        grad = self.master_params[0].grad
        assert grad is not None
        grad.mul_(2**-self.lg_loss_scale)
        self._anneal_lr()
        norm = self._log_grad_norm()
        if not torch.isfinite(norm):  # the one synchronisation of a step; decides whether to update
            self.lg_loss_scale -= 1
            logger.log(
                f"non-finite gradient: log2 of the loss scale lowered to {self.lg_loss_scale}"
            )
            return
        self.opt.step()
        self._update_ema()
        master_params_to_model_params(self.model_params, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth

    def optimize_normal(self) -> None:
        """Update the weights."""
        self._anneal_lr()
        self._log_grad_norm()
        self.opt.step()
        self._update_ema()

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            left = 1 - self._absolute_step / self.lr_anneal_steps
            for group in self.opt.param_groups:
                group["lr"] = self.lr * left

    # -- logging ------------------------------------------------------------------------------

    def _log_grad_norm(self) -> Tensor:
        grads = [param.grad for param in self.master_params if param.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        logger.logkv_mean("grad_norm", norm)  # stays on the device until the log is written
        return norm

    def log_step(self) -> None:
        """Log the step and the number of images seen by all processes."""
        logger.logkv("step", self._absolute_step)
        logger.logkv("samples", (self._absolute_step + 1) * self.global_batch)
        if self.use_fp16:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)

    def _flush_losses(self) -> None:
        """Log the losses since the last time, copied from the device in one go."""
        if self._pending_losses:
            ts, losses = zip(*self._pending_losses, strict=True)
            keys = losses[0].keys()
            together = {key: torch.cat([entry[key] for entry in losses]).cpu() for key in keys}
            log_loss_dict(self.diffusion, torch.cat(ts).cpu(), together)
            self._pending_losses.clear()

    # -- saving -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write optimiser, EMAs and model of the current step; the model comes last."""
        if dist_util.get_rank() == 0:
            import blobfile as bf

            folder, step = get_blob_logdir(), self._absolute_step
            logger.log(f"saving step {step} to {folder}")
            checkpoint.write_tensors(
                bf.join(folder, checkpoint.opt_name(step)), self.opt.state_dict()
            )
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                state = self._state_dict(params)
                checkpoint.write_tensors(bf.join(folder, checkpoint.ema_name(rate, step)), state)
            state = self._state_dict(self.master_params)
            checkpoint.write_tensors(bf.join(folder, checkpoint.model_name(step)), state)
        dist_util.barrier()

    def _unflattened(self, master_params: list[nn.Parameter]) -> list[Tensor]:
        if self.use_fp16:
            return unflatten_master_params(self.model_params, master_params)
        return [param.detach() for param in master_params]

    def _state_dict(self, master_params: list[nn.Parameter]) -> dict[str, Tensor]:
        """The model's state dict with other values for its parameters, as float32."""
        state = self.model.state_dict()
        names = [name for name, _ in self.model.named_parameters()]
        state.update(zip(names, self._unflattened(master_params), strict=True))
        return state

    @torch.no_grad()
    def _copy_state_dict(self, state: dict[str, Tensor], master_params: list[nn.Parameter]) -> None:
        """Overwrite parameters, in place, by those of a state dict."""
        names = [name for name, _ in self.model.named_parameters()]
        for name, param in zip(names, self._unflattened(master_params), strict=True):
            param.copy_(state[name])


def get_blob_logdir() -> str:
    """Where checkpoints go: $DIFFUSION_BLOB_LOGDIR, or the run folder."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR", "") or logger.get_dir() or "."


def find_resume_checkpoint() -> str | None:
    """The newest model file of the run folder, so that the same command continues a run."""
    return checkpoint.find_newest_model(get_blob_logdir())


def find_ema_checkpoint(main_checkpoint: str, step: int, rate: str | float) -> str | None:
    """The EMA file that belongs to a model file, or None if there is none."""
    if not main_checkpoint:
        return None
    return checkpoint.find_beside(main_checkpoint, checkpoint.ema_name(rate, step))


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: dict[str, Any]) -> None:
    """Log the mean of each loss, and its mean over each quarter of the timesteps.

    :param ts: int64 [N] timesteps.
    :param losses: name -> [N]; logged as NAME and NAME_q0 ... NAME_q3.
    """
    quartiles = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quartile}", value)
