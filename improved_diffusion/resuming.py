"""What a training run needs to go on exactly: stored in a checkpoint, restored from one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, dist_util, logger, parallel, sharded, state_dicts
from .errors import UserError
from .image_datasets import Seekable
from .optimization import load_portable_state, portable_state
from .resample import LossAwareSampler
from .webdata import Reshuffled

if TYPE_CHECKING:
    from .train_util import TrainLoop


def restore(loop: TrainLoop, path: str) -> None:
    """Go on from a checkpoint, saying of each thing whether it is restored or cold."""
    loop.resume_step, loop.step = checkpoint.parse_resume_step_from_filename(path), 0
    files = _Files(path, loop)
    _load_model(loop, files)
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        name = checkpoint.ema_name(rate, loop.resume_step)
        _load_average(loop, f"EMA {rate}", files, name, params)
    for width, params in zip(loop.posthoc_widths, loop.posthoc_params, strict=True):
        name = checkpoint.posthoc_name(width, loop.resume_step)
        _load_average(loop, f"post-hoc EMA {width:g}", files, name, params)
    _load_optimizer(loop, files)
    _load_state(loop, path if checkpoint.is_model_name(path) else "")


class _Files:
    """The files of a checkpoint: those that lie beside the model's, or its shares."""

    def __init__(self, path: str, loop: TrainLoop) -> None:
        self.path = path
        self.shares = sharded.ShardedCheckpoint(path) if checkpoint.is_sharded(path) else None
        self.parameters = list(loop.model_params)
        self.names = [name for name, _ in loop.model.named_parameters()]

    def find(self, name: str) -> str | None:
        """Where a file is, for messages; None if there is none."""
        if self.shares is not None:
            return os.path.join(self.path, name) if name in self.shares.names else None
        # other files lie beside those named by the loop
        beside = checkpoint.is_model_name(self.path)
        return checkpoint.find_beside(self.path, name) if beside else None

    def read(self, path: str) -> Any:
        """What a file that was found holds; of the shares each process reads its own."""
        if self.shares is not None:
            return self.shares.read(os.path.basename(path), self._layout)
        return dist_util.load_state_dict(path, map_location="cpu")

    def _layout(self, place: tuple[str, ...], shape: torch.Size) -> Tensor | None:
        if place[0] == "state":  # of the optimiser, which numbers the parameters
            param = self.parameters[int(place[1])]
        elif place[-1] in self.names:
            param = self.parameters[self.names.index(place[-1])]
        else:
            return None
        return param if parallel.is_sharded(param) and param.shape == shape else None


def _load_model(loop: TrainLoop, files: _Files) -> None:
    name = checkpoint.model_name(loop.resume_step)
    state = files.read(files.path if files.shares is None else os.path.join(files.path, name))
    state_dicts.check_fit(loop.model, state, files.path)
    current = loop.model.state_dict()
    loop.model.load_state_dict(
        {key: parallel.like(current[key], value) for key, value in state.items()}
    )
    if loop.use_fp16:
        loop.fill_from(state, loop.master_params)
    logger.log(f"resume: model restored from {files.path}, step {loop.resume_step}")


def _load_average(
    loop: TrainLoop, what: str, files: _Files, name: str, params: list[nn.Parameter]
) -> None:
    path = files.find(name)
    if path is None:
        logger.log(f"resume: {what} cold, no file {name}: starts at the model's weights")
        state = loop.state_dict_of(loop.master_params)
    else:
        state = files.read(path)
        state = state["weights"] if name.startswith("posthoc") else state
        state_dicts.check_fit(loop.model, state, path)
        logger.log(f"resume: {what} restored from {path}")
    loop.fill_from(state, params)


def _load_optimizer(loop: TrainLoop, files: _Files) -> None:
    name = checkpoint.opt_name(loop.resume_step)
    path = files.find(name)
    if path is None:
        logger.log(f"resume: optimiser cold, no file {name}: starts without momentum")
        return
    state = files.read(path)
    try:
        stored_lr = state["param_groups"][0]["lr"]
        updates = {int(entry["step"]) for entry in state["state"].values()}
        load_portable_state(loop.opt, _shared(state, loop.master_params))
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


def _shared(state: dict[str, Any], params: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The optimiser's state with moments shared among processes as the parameters are."""
    entries = {
        index: {
            key: parallel.like(params[index], value) if value.ndim else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


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
    elif isinstance(loop.data, Reshuffled):
        loop.data.reshuffle(loop.images)
        logger.log(
            f"resume: data reshuffled after {loop.images:,} images: tar shards cannot go on from "
            "a position"
        )
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
        checkpoint.opt_name(step): portable_state(loop.opt),
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
