"""What a training run needs to go on exactly: stored in a checkpoint, restored from one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from . import checkpoint, dist_util, logger, state_dicts
from .errors import UserError
from .image_datasets import Seekable
from .resample import LossAwareSampler

if TYPE_CHECKING:
    from .train_util import TrainLoop


def restore(loop: TrainLoop, path: str) -> None:
    """Go on from a checkpoint, saying of each thing whether it is restored or cold."""
    _load_model(loop, path)
    whole = checkpoint.is_model_name(path)  # other files lie beside those named by the loop
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        name = checkpoint.ema_name(rate, loop.resume_step)
        _load_average(loop, f"EMA {rate}", path if whole else "", name, params)
    for width, params in zip(loop.posthoc_widths, loop.posthoc_params, strict=True):
        name = checkpoint.posthoc_name(width, loop.resume_step)
        _load_average(loop, f"post-hoc EMA {width:g}", path if whole else "", name, params)
    _load_optimizer(loop, path if whole else "")
    _load_state(loop, path if whole else "")


def _load_model(loop: TrainLoop, path: str) -> None:
    loop.resume_step, loop.step = checkpoint.parse_resume_step_from_filename(path), 0
    state = dist_util.load_state_dict(path, map_location="cpu")
    state_dicts.check_fit(loop.model, state, path)
    loop.model.load_state_dict(state)
    if loop.use_fp16:
        loop.fill_from(state, loop.master_params)
    logger.log(f"resume: model restored from {path}, step {loop.resume_step}")


def _load_average(
    loop: TrainLoop, what: str, beside: str, name: str, params: list[nn.Parameter]
) -> None:
    path = checkpoint.find_beside(beside, name) if beside else None
    if path is None:
        logger.log(f"resume: {what} cold, no file {name}: starts at the model's weights")
        state = loop.state_dict_of(loop.master_params)
    else:
        state = dist_util.load_state_dict(path, map_location="cpu")
        state = state["weights"] if name.startswith("posthoc") else state
        state_dicts.check_fit(loop.model, state, path)
        logger.log(f"resume: {what} restored from {path}")
    loop.fill_from(state, params)


def _load_optimizer(loop: TrainLoop, beside: str) -> None:
    name = checkpoint.opt_name(loop.resume_step)
    path = checkpoint.find_beside(beside, name) if beside else None
    if path is None:
        logger.log(f"resume: optimiser cold, no file {name}: starts without momentum")
        return
    state = dist_util.load_state_dict(path, map_location="cpu")
    try:
        stored_lr = state["param_groups"][0]["lr"]
        loop.opt.load_state_dict(state)
        updates = {int(entry["step"]) for entry in state["state"].values()}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"'{path}' does not fit this run's optimiser ({error}): was --use_fp16 the same?"
        ) from None
    logger.log(f"resume: optimiser restored from {path}")
    for group in loop.opt.param_groups:  # the flags win over the file
        group["lr"], group["weight_decay"] = loop.lr, loop.weight_decay
    if not (loop.lr_anneal_steps or loop.optimization.changes_lr) and stored_lr != loop.lr:
        logger.log(f"resume: learning rate {loop.lr}, was {stored_lr} in {name}")
    if updates and updates != {loop.resume_step}:
        loop.step = 1  # written inside the loop: the step of that name is done


def _load_state(loop: TrainLoop, beside: str) -> None:
    """Counters, loss scale, sampler and what the log has pending; then the data's position."""
    name = checkpoint.state_name(loop.resume_step)
    path = checkpoint.find_beside(beside, name) if beside else None
    state = dist_util.load_state_dict(path, map_location="cpu") if path else {}
    if path:
        loop.step = state["step"] - loop.resume_step
        loop.seconds = state["seconds"]
        loop.lg_loss_scale = state["lg_loss_scale"]
        loop.lr_scale = state["lr_scale"]
        loop.skipped, loop.skipped_in_row = state["skipped"], state["skipped_in_row"]
        logger.log(f"resume: counters and loss scale restored from {path}")
    else:
        logger.log(f"resume: loss scale and counters cold, no file {name}")
    loop.steps_done = loop.global_step
    loop.images = state.get("images", loop.global_step * loop.global_batch)
    if isinstance(loop.schedule_sampler, LossAwareSampler):
        _load_sampler(loop.schedule_sampler, state.get("sampler"))
    logger.rewind(loop.global_step)
    if path and dist_util.get_rank() == 0:  # whose log it is
        loop.pending_losses = [(t, losses) for t, losses in state["pending_losses"]]
        current = logger.get_current()
        current.name2val.update(state["log_values"])
        current.name2cnt.update(state["log_counts"])
    if isinstance(loop.data, Seekable):
        loop.data.seek(loop.images)
        logger.log(f"resume: data restored, goes on after {loop.images:,} images")
    else:
        logger.log("resume: data cold, as it comes: an iterator without seek(images)")


def _load_sampler(sampler: LossAwareSampler, state: dict[str, Tensor] | None) -> None:
    try:
        if state:
            sampler.load_state_dict(state)
    except UserError as error:
        logger.warn(f"resume: history of the schedule sampler cold: {error}")
        return
    logger.log(f"resume: history of the schedule sampler {'restored' if state else 'cold'}")


# -- what is stored ---------------------------------------------------------------------------


def checkpoint_files(loop: TrainLoop, step: int) -> dict[str, Any]:
    """What to write under which name, in the order of writing: the model comes last.

    The tensors are those of the run, not copies.
    """
    files = {
        checkpoint.state_name(step): _run_state(loop),
        checkpoint.opt_name(step): loop.opt.state_dict(),
    }
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        files[checkpoint.ema_name(rate, step)] = loop.state_dict_of(params)
    for width, params in zip(loop.posthoc_widths, loop.posthoc_params, strict=True):
        files[checkpoint.posthoc_name(width, step)] = {
            "updates": loop.steps_done - loop.skipped,
            "sigma_rel": width,
            "weights": loop.state_dict_of(params),
        }
    files[checkpoint.model_name(step)] = loop.state_dict_of(loop.master_params)
    return files


def _run_state(loop: TrainLoop) -> dict[str, Any]:
    """What else a run needs to go on exactly."""
    sampler, current = loop.schedule_sampler, logger.get_current()
    return {
        "step": loop.steps_done,
        "images": loop.images,
        "seconds": loop.seconds,
        "lg_loss_scale": loop.lg_loss_scale,
        "lr_scale": loop.lr_scale,
        "skipped": loop.skipped,
        "skipped_in_row": loop.skipped_in_row,
        "sampler": sampler.state_dict() if isinstance(sampler, LossAwareSampler) else {},
        "pending_losses": loop.pending_losses,
        "log_values": {key: _plain(value) for key, value in current.name2val.items()},
        "log_counts": dict(current.name2cnt),
        "flags": json.dumps(loop.flags),  # with the map of the classes
    }


def _plain(value: Any) -> Any:
    """A number or tensor that loads with ``weights_only``."""
    return value.item() if isinstance(value, np.generic) else value
