"""Training a classifier of noised images, which is to guide a diffusion model.

Guided diffusion: arXiv 2105.05233, section 4 and appendix H.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .flags import option, pick, require_at_least
from .gaussian_diffusion import GaussianDiffusion, Model
from .loss_weights import NO_WEIGHT
from .respace import SpacedDiffusion

log = logging.getLogger(__name__)

Flags = dict[str, Any]

TOP = (1, 5)  # the accuracies that are measured: the label is among so many of the likeliest


@dataclass(frozen=True)
class ClassifierTrainOptions:
    """What training a classifier has of its own, by the names of guided-diffusion."""

    noised: bool = option(
        True, "train on noised images, to guide sampling; False: a classifier of clean images"
    )
    iterations: int = option(
        150000,
        "train so many steps, unless --train_steps, --train_images, --train_hours or "
        "--lr_anneal_steps says how long; 0: no such bound",
    )
    anneal_lr: bool = option(False, "the learning rate falls linearly to 0 at the last step")
    eval_interval: int = option(0, "another name of --val_interval; 0: as that says")
    classifier_for: str = option(
        "",
        "a checkpoint of the diffusion model to guide, with its flags beside it: the classifier "
        "takes noise levels, image size and classes from it",
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, ["iterations", "eval_interval"])


class ClassifierLoss:
    """Cross-entropy and accuracies of a classifier, where training expects a diffusion process.

    A model is any callable ``model(x, t)`` from [N, C, ...] and [N] to logits [N, K].

    :param diffusion: the process whose x_t are to be classified, respaced or not.
    :param noised: False classifies x_start, at the timestep 0; it is the only one then.
    """

    terms = ("loss", *(f"acc@{k}" for k in TOP))

    def __init__(self, diffusion: GaussianDiffusion, noised: bool = True) -> None:
        self.diffusion = diffusion
        self.noised = noised
        self.num_timesteps = diffusion.num_timesteps if noised else 1

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss at one timestep per image.

        :param model: sees the timesteps that the diffusion model sees: those of the process that
            was respaced, scaled if they are to be.
        :param x_start: [N, C, ...] data in [-1, 1].
        :param t: [N] timesteps.
        :param model_kwargs: "y": [N] int64 labels.
        :param noise: [N, C, ...] standard normal noise, drawn if None.
        :return: "loss": -log p(y | x_t) in nats; "acc@1" and "acc@5": 1 where the label is the
            likeliest class, or one of five, else 0; each float [N].
        :raises ValueError: for images without labels.
        """
        labels = (model_kwargs or {}).get("y")
        if labels is None:
            raise UserError("a classifier learns the classes of images: give their labels y [N]")
        x = self.diffusion.q_sample(x_start, t, noise=noise) if self.noised else x_start
        if isinstance(self.diffusion, SpacedDiffusion):
            model = self.diffusion._wrap_model(model)
        logits = model(x, self.diffusion._scale_timesteps(t)).float()  # [N, K]
        hits = {f"acc@{k}": top_k_hits(logits, labels, k) for k in TOP}
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), **hits}


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """1 where the label is among the k likeliest classes, else 0.

    :param logits: [N, K].
    :param labels: int64 [N].
    :return: float32 [N].
    """
    likeliest = torch.topk(logits.detach(), min(k, logits.shape[1]), dim=1).indices  # [N, k]
    return (likeliest == labels.view(-1, 1)).any(dim=1).float()


# -- flags ------------------------------------------------------------------------------------


def training_flags(flags: Flags, given: set[str]) -> Flags:
    """Say in the flags of every training what those of a classifier say.

    :param given: the names of the flags that the user gave.
    :return: the flags, with the bound, the learning rate's course, precision and classes filled in.
    :raises ValueError: naming both, for flags that contradict each other; and for those that a
        classifier has no use for.
    """
    pick(ClassifierTrainOptions, flags)  # says what is wrong with them
    _refuse_what_is_for_samples(flags)
    flags = {**flags, "class_cond": True}
    flags = _half_precision(flags, given)
    return _intervals(_course(_bound(flags, given), given), given)


# Flags of the process that change losses or samples of a diffusion model, not its noise levels
_REFUSED = {"loss_weight": NO_WEIGHT, "sigma_small": False}
# guided-diffusion's command lines may give these, for all its scripts alike
_WITHOUT_EFFECT = ("learn_sigma", "use_kl")


def _refuse_what_is_for_samples(flags: Flags) -> None:
    if flags["sample_interval"]:
        raise UserError(
            f"--sample_interval {flags['sample_interval']}: a classifier makes no samples to look "
            "at: leave it out; --val_data_dir and --val_fraction measure its accuracy"
        )
    for name, default in _REFUSED.items():
        if flags[name] != default:
            raise UserError(
                f"--{name} {flags[name]}: of the diffusion process a classifier sees the noise "
                "levels alone: leave it out"
            )
    told = [f"--{name} True" for name in _WITHOUT_EFFECT if flags[name]]
    if told:
        log.info(f"{' and '.join(told)}: without effect on a classifier, which sees noised images")


def _half_precision(flags: Flags, given: set[str]) -> Flags:
    """``use_fp16`` and ``classifier_use_fp16`` say the same."""
    ours, theirs = flags["classifier_use_fp16"], flags["use_fp16"]
    if ours != theirs and {"classifier_use_fp16", "use_fp16"} <= given:
        raise UserError(
            f"--classifier_use_fp16 {ours} contradicts --use_fp16 {theirs}: give one of them"
        )
    if ours and flags["precision"] not in ("", "fp16"):
        raise UserError(
            f"--classifier_use_fp16 True contradicts --precision {flags['precision']}: give one of "
            "them"
        )
    if ours and flags["parallel"] == "fsdp":
        raise UserError(
            "--classifier_use_fp16 True keeps one flat copy of all weights, which --parallel fsdp "
            "would have to share: use --precision fp16 or bf16"
        )
    return {**flags, "classifier_use_fp16": ours or theirs, "use_fp16": ours or theirs}


_BOUNDS = ("train_steps", "train_images", "lr_anneal_steps")


def _bound(flags: Flags, given: set[str]) -> Flags:
    """``iterations`` as ``train_steps``, if nothing else ends the training."""
    others = [name for name in _BOUNDS if flags[name]]
    iterations = flags["iterations"]
    for name in others if iterations and "iterations" in given else ():
        if flags[name] != iterations or name == "train_images":
            raise UserError(
                f"--iterations {iterations} and --{name} {flags[name]} both say how long to train: "
                "give one of them"
            )
    timed = flags["train_hours"] and not ("iterations" in given or flags["anneal_lr"])
    return flags if others or timed else {**flags, "train_steps": iterations}


def _course(flags: Flags, given: set[str]) -> Flags:
    """``anneal_lr`` as ``lr_schedule``."""
    anneal, schedule, steps = (flags[n] for n in ("anneal_lr", "lr_schedule", "lr_anneal_steps"))
    if anneal and schedule not in ("", "linear"):
        raise UserError(f"--anneal_lr True contradicts --lr_schedule {schedule}: give one of them")
    if not anneal and "anneal_lr" in given and (schedule == "linear" or steps):
        other = f"--lr_anneal_steps {steps}" if steps else f"--lr_schedule {schedule}"
        raise UserError(f"--anneal_lr False contradicts {other}: give one of them")
    if anneal and not any(flags[name] for name in _BOUNDS):
        raise UserError("--anneal_lr True needs a last step: give --iterations")
    return {**flags, "lr_schedule": "linear"} if anneal else flags


def _intervals(flags: Flags, given: set[str]) -> Flags:
    """``eval_interval`` as ``val_interval``."""
    ours, theirs = flags["eval_interval"], flags["val_interval"]
    if not ours:
        return flags
    if "val_interval" in given and ours != theirs:
        raise UserError(
            f"--eval_interval {ours} contradicts --val_interval {theirs}: give one of them"
        )
    return {**flags, "val_interval": ours}
