"""The training loop: microbatches, EMA, annealing, mixed precision, logging, saving, resuming."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint, dist_util, liveness, logger
from .checkpoint import parse_resume_step_from_filename as parse_resume_step_from_filename
from .divergence import LOWERED_RATE, PATIENCE, divergence_report, most_telling
from .errors import Diverged, RunAgain, Stop
from .files import write_file
from .fp16_util import master_params_to_model_params, model_grads_to_master_grads, zero_grad
from .gaussian_diffusion import Model
from .objectives import Objective
from .optimization import OptimizationOptions, autocast, check_precision, clip_gradients
from .parallel import ParallelOptions, host_group, local, no_sync, replicate, whole
from .posthoc_ema import parse_sigma_rels
from .progress import Progress
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler
from .resuming import checkpoint_files, restore
from .rng import StepDraws, seed_everything
from .saving import Saver, SavingOptions
from .stopping import Bounds, StopSignals
from .trained_weights import TrainedWeights
from .training_options import TrainOptions as TrainOptions
from .training_options import check_class_dropout as check_class_dropout
from .training_options import parse_ema_rates as parse_ema_rates

INITIAL_LOG_LOSS_SCALE = 20.0  # log2: 1e6 brings typical gradients into float16's range

Batch = Tensor
Cond = dict[str, Tensor]


class Watcher(Protocol):
    """Looks at a run every so many steps; see :mod:`.watching`."""

    interval: int

    def __call__(self, loop: TrainLoop) -> None:
        """Look; every process calls it after the same step."""


class TrainLoop(TrainedWeights):
    """Trains a diffusion model until a bound is reached, or for ever.

    With several processes their gradients are averaged. Checkpoints go to the run folder: a file
    named N that was written inside the loop holds N + 1 updates, one written after it holds N.
    A run that is stopped and started again goes on with the step that comes next; with a ``seed``
    and data that can :meth:`~.image_datasets.ImageStream.seek`, as if it had not been stopped.

    :param model: the network, on its device.
    :param diffusion: gives the training losses.
    :param data: an endless iterator of (float [N, C, ...] in [-1, 1], dict of [N, ...] tensors).
    :param batch_size: N, of this process.
    :param microbatch: images per forward pass; -1 for all. Changes memory, not the gradient.
    :param lr: learning rate of AdamW.
    :param ema_rate: a rate, or a text of several separated by commas.
    :param log_interval: steps between rows of the log.
    :param save_interval: steps between checkpoints.
    :param resume_checkpoint: any file of a checkpoint, or a folder of them; if empty,
        :func:`find_resume_checkpoint` is asked.
    :param use_fp16: compute in float16 with float32 master weights and a dynamic loss scale.
    :param fp16_scale_growth: growth of log2 of the loss scale per step.
    :param schedule_sampler: which timesteps to train on; uniform if None. One that is aware of
        losses needs equally many microbatches on every process.
    :param weight_decay: AdamW's.
    :param lr_anneal_steps: the last step; the learning rate falls linearly to 0. 0 for no end.
    :param seed: what timesteps, noise and dropout of each step are drawn from, with the step; None
        draws them from the global generators as they are.
    :param bounds: when training ends.
    :param optimization: precision, clipping, the learning rate's course.
    :param saving: which checkpoints to write and keep.
    :param posthoc_ema: relative widths of power-function averages to keep; see
        :mod:`.posthoc_ema`.
    :param parallel: how the model is spread over processes. One that is shared among them need not
        be on its device yet; it stays shared.
    :param class_dropout: the share of labels "y" that training replaces by the model's
        ``null_class``, for classifier-free guidance; chosen by the seed, the step and the image's
        index in the global batch.
    :param watchers: called with this loop on every process after each step that is a multiple of
        their ``interval``, but for step 0.
    :param flags: of the run, to be stored in its checkpoints.
    :raises ValueError: for a checkpoint that does not fit or is damaged, and for arguments that
        contradict each other.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Objective,
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
        seed: int | None = None,
        bounds: Bounds = Bounds(),
        optimization: OptimizationOptions = OptimizationOptions(),
        saving: SavingOptions = SavingOptions(),
        posthoc_ema: str = "",
        parallel: ParallelOptions = ParallelOptions(),
        class_dropout: float = 0.0,
        watchers: Sequence[Watcher] = (),
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.seed = seed
        self.bounds = bounds
        self.class_dropout = class_dropout
        self.watchers = watchers
        self.flags = dict(flags or {})
        self._count_from_zero()

        self.device = dist_util.dev() if parallel.sharded else next(model.parameters()).device
        parallel.check(dist_util.get_world_size(), use_fp16)
        check_precision(optimization, use_fp16, self.device)
        check_class_dropout(model, class_dropout)
        self._saver = Saver(saving, host_group() if parallel.sharded else None)
        super().__init__(
            model,
            optimization,
            parallel,
            use_fp16,
            lr,
            weight_decay,
            parse_ema_rates(ema_rate),
            parse_sigma_rels(posthoc_ema),
        )
        self._go_on(resume_checkpoint)
        self.total_steps = bounds.total_steps(
            lr_anneal_steps, self.global_batch, self.global_step, self.images
        )
        optimization.lr_factor(0, lr_anneal_steps, self.total_steps)  # refuses contradictions
        self._wrap_network()

    def _count_from_zero(self) -> None:
        self.step = 0  # since resume_step
        self.resume_step = 0
        self.steps_done = 0  # over all sittings; in a step it is global_step
        self.images = 0  # seen by all processes
        self.seconds = 0.0  # of training, over all sittings
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE
        self.lr_scale = 1.0  # lowered when the run goes back after non-finite gradients
        self.skipped = 0  # steps without an update
        self.skipped_in_row = 0
        self.global_batch = self.batch_size * dist_util.get_world_size()
        self.pending_losses: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.timesteps: list[Tensor] = []  # of the last step
        self._loss_finite = torch.tensor(True)  # in the last step
        self._last_saved = -1
        self._stopping = False  # all processes have agreed to stop after this step

    def _go_on(self, resume_checkpoint: str) -> None:
        """Go on from a checkpoint, or from the run folder's newest, or begin."""
        self.resume_checkpoint = (
            checkpoint.locate(resume_checkpoint) if resume_checkpoint else find_resume_checkpoint()
        ) or ""
        if self.resume_checkpoint:
            restore(self, self.resume_checkpoint)
            self._set_newer_aside()
        else:
            logger.rewind(0)  # rows of a sitting that ended before its first checkpoint

    def _wrap_network(self) -> None:
        """The network as the losses see it: on all processes, and in the precision asked for."""
        self.use_ddp = dist_util.get_world_size() > 1 and not self.parallel.sharded
        parts = self.microbatch < self.batch_size
        self.ddp_model = replicate(self.model, self.device, parts) if self.use_ddp else self.model
        dtype = self._dtype
        self._scaled_loss = self.use_fp16 or dtype is torch.float16
        self._network: Model = self.ddp_model
        if dtype and not self.parallel.sharded:  # which computes in that type by itself
            self._network = autocast(self.ddp_model, dtype, self.device.type)

    @property
    def global_step(self) -> int:
        """The number of steps done, over all sittings; the index of the step that comes next."""
        return self.step + self.resume_step

    def _set_newer_aside(self) -> None:
        """Going back inside a run folder, let the checkpoints after that step count no more."""
        path, folder = self.resume_checkpoint, get_blob_logdir()
        inside = os.path.abspath(os.path.dirname(path)) == os.path.abspath(folder)
        if dist_util.get_rank() == 0:
            checkpoint.remove_partial_files(folder)
            if inside and checkpoint.is_model_name(path):
                newer = checkpoint.set_aside_newer(folder, self.resume_step)
                if newer:
                    logger.warn(f"later checkpoints count no more: those of steps {newer}")

    # -- the loop -----------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train to the last step, saving on the way and at the end.

        With $DIFFUSION_TRAINING_TEST set, stop after the first save past the first step.

        :raises RunAgain: on every process, after a signal and a save.
        :raises Diverged: on every process, if losses or gradients stay non-finite.
        """
        ending = None
        with StopSignals() as signals, self._saver, self._progress() as progress:
            try:
                self._train(signals, progress)
            except Stop as stop:
                ending = stop
            self._saver.wait()
            dist_util.barrier()  # the last checkpoint is complete: now every process may end
        if ending is not None:
            raise ending

    def _train(self, signals: StopSignals, progress: Progress) -> None:
        first_step = self.step
        while not self._done:
            started = time.monotonic()
            liveness.doing(f"taking step {self.global_step}", starting=self.step == first_step)
            with progress.waiting():
                batch, cond = next(self.data)
            self.run_step(batch, cond)
            progress.step()
            self.seconds += time.monotonic() - started
            if self.skipped_in_row >= PATIENCE:
                self._go_back(batch, cond)
                continue
            self._watch()
            self._write_log(progress)
            saved = self._save_if_due(signals)
            self.step += 1
            if self._stopping:  # agreed by all; a signal since then is for the next step
                raise RunAgain(
                    f"stopped by {signals.received} after step {self.global_step - 1}, which is "
                    f"saved in {get_blob_logdir()}: the same command goes on from there"
                )
            test = os.environ.get("DIFFUSION_TRAINING_TEST", "")
            if test and saved and self.step > first_step + 1:
                return
        # the last checkpoint has the same name, whether or not a signal or the clock made another
        by_interval = (self.global_step - 1) % self.save_interval == 0
        if self.step == first_step and (by_interval or self.resume_step == self.global_step):
            logger.log(f"nothing to do: {self.global_step} of {self.total_steps} steps done")
        elif not (by_interval and self._last_saved == self.global_step - 1):
            self.save()

    @property
    def _done(self) -> bool:
        if self.total_steps is not None and self.global_step >= self.total_steps:
            return True
        if not self.bounds.train_hours:
            return False
        over = dist_util.get_rank() == 0 and self.seconds >= self.bounds.train_hours * 3600
        return dist_util.any_rank(over)[0]  # by the clock of the first process

    def _progress(self) -> Progress:
        return Progress(
            first_step=self.global_step,
            total_steps=self.total_steps,
            seconds_left=self.bounds.seconds_left(self.seconds),
            global_batch=self.global_batch,
            enabled=dist_util.get_rank() == 0,
        )

    def _watch(self) -> None:
        step = self.global_step
        for watcher in self.watchers:
            if watcher.interval and step and step % watcher.interval == 0:
                liveness.doing(f"looking at step {step}")
                watcher(self)

    def _write_log(self, progress: Progress) -> None:
        if self.global_step % self.log_interval == 0:
            self._flush_losses()
            progress.report(logger.dumpkvs().get("loss"))

    def run_step(self, batch: Batch, cond: Cond) -> None:
        """One update from one batch [N, C, ...] of this process."""
        if self.seed is not None:  # for dropout and whatever else draws from them
            seed_everything(self.seed, "training", self.global_step, dist_util.get_rank())
        self.forward_backward(batch, cond)
        if self._scaled_loss:
            self.optimize_fp16()
        else:
            self.optimize_normal()
        self.steps_done += 1
        self.images += self.global_batch
        self.log_step()

    def forward_backward(self, batch: Batch, cond: Cond) -> None:
        """Leave the gradient of the batch's mean loss on the model's parameters."""
        zero_grad(self.model_params)
        self.timesteps.clear()
        self._loss_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for part, micro, micro_cond in self.microbatches(batch, cond):
            t, weights = self._sample_timesteps(len(micro), part)
            last = part.stop == len(batch)
            with contextlib.nullcontext() if last else no_sync(self.ddp_model):
                losses = self.losses(self._network, micro, t, micro_cond, part)
                # each image weighs the same, however the batch is split
                loss = (losses["loss"] * weights).sum() / len(batch)
                self._loss_finite &= loss.isfinite()
                if self._scaled_loss:
                    loss = loss * 2**self.lg_loss_scale
                loss.backward()
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            self.timesteps.append(t)
            self.pending_losses.append(
                (t, {key: (value * weights).detach() for key, value in losses.items()})
            )

    def microbatches(self, batch: Batch, cond: Cond) -> Iterator[tuple[slice, Batch, Cond]]:
        """Which part of the batch each is, its images and its conditions, on the device."""
        batch = batch.to(self.device, non_blocking=True)
        cond = {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, min(start + self.microbatch, len(batch)))
            yield part, batch[part], {key: value[part] for key, value in cond.items()}

    @property
    def _draws(self) -> StepDraws | None:
        """The draws of this step; None without a seed."""
        if self.seed is None:
            return None
        first = dist_util.get_rank() * self.batch_size
        return StepDraws(self.seed, self.global_step, first, self.global_batch)

    def _sample_timesteps(self, count: int, part: slice) -> tuple[Tensor, Tensor]:
        draws = self._draws
        if draws is None:
            return self.schedule_sampler.sample(count, self.device)
        sampler = self.schedule_sampler
        uniforms = draws.stratified(part) if sampler.stratified else draws.uniforms(part)
        return sampler.sample(count, self.device, uniforms=uniforms)

    def losses(
        self, network: Model, images: Batch, t: Tensor, cond: Cond, part: slice
    ) -> dict[str, Tensor]:
        """The training losses [N] of a microbatch."""
        draws = self._draws
        noise = {} if draws is None else {"noise": draws.noise_like(images, part)}
        cond = self._without_some_classes(cond, part)
        return self.diffusion.training_losses(network, images, t, model_kwargs=cond, **noise)

    def _without_some_classes(self, cond: Cond, part: slice) -> Cond:
        """The conditions of a microbatch, some labels replaced by that of no class."""
        if not self.class_dropout:
            return cond
        y, draws = cond["y"], self._draws
        if draws is None:
            dropped = torch.rand(len(y), device=y.device) < self.class_dropout
        else:
            chosen = draws.chosen(self.class_dropout, part, "class dropout")
            dropped = torch.from_numpy(chosen).to(y.device)
        null_class: int = self.model.null_class  # type: ignore[assignment]
        return {**cond, "y": y.masked_fill(dropped, null_class)}

    def optimize_fp16(self) -> None:
        """Undo the loss scale and update, or lower the scale if gradients overflowed."""
        if self.use_fp16:
            model_grads_to_master_grads(self.model_params, self.master_params)
        torch._foreach_mul_(local(self._gradients()), 2**-self.lg_loss_scale)
        if self._update_weights():
            if self.use_fp16:
                master_params_to_model_params(self.model_params, self.master_params)
            self.lg_loss_scale += self.fp16_scale_growth
        else:
            self.lg_loss_scale -= 1
            logger.log(f"log2 of the loss scale lowered to {self.lg_loss_scale}")

    def optimize_normal(self) -> None:
        """Update the weights."""
        self._update_weights()

    def _update_weights(self) -> bool:
        """One step of the optimiser and the averages; False if it is skipped, on all processes."""
        self._anneal_lr()
        norm = self._log_grad_norm()
        finite = bool(norm.isfinite() & self._loss_finite)  # the one synchronisation of a step
        if dist_util.any_rank(not finite)[0]:
            self.skipped += 1
            self.skipped_in_row += 1
            logger.log(f"non-finite loss or gradient: step {self.global_step} is skipped")
            return False
        self.skipped_in_row = 0
        if self.optimization.grad_clip:
            clip_gradients(local(self._gradients()), norm, self.optimization.grad_clip)
        self.opt.step()
        self._update_ema()
        return True

    def _update_ema(self) -> None:
        self._update_averages(self.global_step, self.steps_done + 1 - self.skipped)

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps or self.optimization.changes_lr or self.lr_scale != 1:
            factor = self.optimization.lr_factor(
                self.global_step, self.lr_anneal_steps, self.total_steps
            )
            for group in self.opt.param_groups:
                group["lr"] = self.lr * factor * self.lr_scale

    # -- divergence ---------------------------------------------------------------------------

    def _go_back(self, batch: Batch, cond: Cond) -> None:
        """Go on from the last checkpoint with a lowered rate; the second time, give up.

        :raises Diverged: on every process.
        """
        self._saver.wait()
        reports = dist_util.gather_objects(divergence_report(self, batch, cond))
        step, layer = self.global_step, most_telling(reports)["first_nonfinite"]
        path = os.path.join(logger.get_dir() or ".", f"divergence_{step:06d}.json")
        if dist_util.get_rank() == 0:
            write_file(path, (json.dumps(reports, indent=1) + "\n").encode())
        text = f"{PATIENCE} steps in a row up to step {step} had non-finite losses or gradients"
        text += f", first in {layer}; timesteps and images are in {path}"
        dist_util.barrier()
        first_bad = step - PATIENCE + 1
        good = checkpoint.find_newest_model(get_blob_logdir(), before=first_bad)
        if self.lr_scale < 1 or good is None:
            raise Diverged(f"training diverged: {text}; lower --lr, or try --grad_clip 1")
        logger.warn(
            f"WARNING: {text}; going back once, with {LOWERED_RATE:g} times the learning rate"
        )
        self.resume_checkpoint = good
        restore(self, good)
        self._set_newer_aside()
        self.lr_scale, self.skipped_in_row = LOWERED_RATE, 0

    # -- logging ------------------------------------------------------------------------------

    def _log_grad_norm(self) -> Tensor:
        norm = whole(nn.utils.get_total_norm(self._gradients()))
        logger.logkv_mean("grad_norm", norm)  # stays on the device until the log is written
        return norm

    def log_step(self) -> None:
        """Log the step and the number of images seen by all processes."""
        logger.logkv("step", self.global_step)
        logger.logkv("samples", self.images)
        if self._scaled_loss:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)
        if self.skipped:
            logger.logkv("skipped_steps", self.skipped)

    def _flush_losses(self) -> None:
        """Log the losses since the last time, copied from the device in one go."""
        if self.pending_losses:
            ts, losses = zip(*self.pending_losses, strict=True)
            keys = losses[0].keys()
            together = {key: torch.cat([entry[key] for entry in losses]).cpu() for key in keys}
            log_loss_dict(self.diffusion, torch.cat(ts).cpu(), together)
            self.pending_losses.clear()

    # -- saving -------------------------------------------------------------------------------

    def _save_if_due(self, signals: StopSignals) -> bool:
        """Save at the interval, by the clock of the first process, and after a signal to any."""
        self._saver.check()
        by_clock = dist_util.get_rank() == 0 and self._saver.due
        stop, due = dist_util.any_rank(bool(signals.received), by_clock)
        self._stopping = stop
        if stop and not signals.received:
            signals.received = "a signal to another process"
        if not (stop or due or self.global_step % self.save_interval == 0):
            return False
        self.save()
        return True

    def save(self) -> None:
        """Write a checkpoint of the current step; inside :meth:`run_loop`, in the background.

        Weights that are not finite are not saved, which a warning says.
        """
        step, folder = self.global_step, get_blob_logdir()
        liveness.doing(f"saving step {step}")
        self._last_saved = step
        if dist_util.get_rank() == 0 or self.parallel.sharded:
            if self._weights_finite():
                logger.log(f"saving step {step} to {folder}")
                self._saver.save(folder, step, checkpoint_files(self, step))
            elif dist_util.get_rank() == 0:
                logger.warn(
                    f"WARNING: step {step} is not saved: weights or averages are not finite"
                )
        if not self._saver.in_background:
            dist_util.barrier()


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


def log_loss_dict(diffusion: Objective, ts: Tensor, losses: dict[str, Any]) -> None:
    """Log the mean of each loss, and its mean over each quarter of the timesteps.

    :param ts: int64 [N] timesteps.
    :param losses: name -> [N]; logged as NAME and NAME_q0 ... NAME_q3.
    """
    quartiles = (4 * ts // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quartile, value in zip(quartiles, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quartile}", value)
