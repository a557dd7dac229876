"""The second network of guided sampling, with flags of its own: a weaker model, or a classifier."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checkpoint, runs, stored_flags
from .classifier_options import NUM_CLASSES, ClassifierOptions
from .errors import UserError
from .flags import defaults, option, pick, require
from .gaussian_diffusion import GaussianDiffusion
from .guidance import OFF, CondFn, GuidanceOptions, classifier_gradient, parse_interval
from .predictions import named_prediction
from .process import prediction_name, schedule_name
from .respace import original_alphas_cumprod
from .same_job import as_stored, differences
from .script_util import ModelAndDiffusionOptions, SuperResOptions
from .unet import EncoderUNetModel, UNetModel

log = logging.getLogger(__name__)

# What two networks that look at the same x_t have in common, beside the noise levels
SAME_IMAGES = ("image_size", "large_size", "small_size", "channels", "value_range")
SAME_LEVELS = ("noise_schedule", "betas", "zero_terminal_snr")


@dataclass(frozen=True)
class ClassifierGuidanceOptions:
    """Which classifier leads the samples, and how far."""

    classifier_path: str = option(
        "", "checkpoint of a classifier; its flags are read from the folder it lies in"
    )
    classifier_scale: float = option(
        1.0, "how far to follow the classifier's gradient; 0 is not at all"
    )

    def __post_init__(self) -> None:
        scale = self.classifier_scale
        require(0 <= scale < math.inf, "classifier_scale", scale, "a number of at least 0")
        if not self.classifier_path:
            raise UserError(
                "--classifier_path is missing: name a checkpoint of classifier_train.py"
            )


# -- a weaker model -------------------------------------------------------------------------------


def load_weak(flags: runs.Flags, diffusion: GaussianDiffusion) -> UNetModel:
    """The model of ``--guide_path``, which may have an architecture of its own.

    :param flags: of the script, with those of ``--model_path``.
    :param diffusion: the process of ``--model_path``, respaced or not.
    :raises ValueError: naming both values of what differs, if it was trained on other images or
        for another process; if the checkpoint does not fit its flags.
    """
    path = flags["guide_path"]
    checkpoint.refuse_folder("guide_path", path)
    kind: type = SuperResOptions if "large_size" in flags else ModelAndDiffusionOptions
    theirs = _flags_of_weak(path, flags, kind)
    options = pick(kind, theirs)
    names = [*SAME_IMAGES, "predict"]
    if theirs["class_cond"]:  # else it is led away from as from no class
        names += ["class_cond", *(["num_classes"] if flags["class_cond"] else [])]
    _check_same("guide_path", flags, theirs, names, diffusion, options.diffusion())
    model: UNetModel = options.model()
    runs.load_for_evaluation(model, path).requires_grad_(False)
    return model


def _flags_of_weak(path: str, flags: runs.Flags, kind: type) -> runs.Flags:
    """The flags that a weaker model was trained with: those beside it, else the model's."""
    where, stored = stored_flags.flags_of(path)
    if not stored:
        log.warning(
            f"no {stored_flags.CONFIG} beside --guide_path {path}: its flags are taken to be those "
            "of --model_path"
        )
        return flags
    runs.refuse_classifier(path, stored)
    if ("large_size" in stored) != ("large_size" in flags):
        what = "super-resolution" if "large_size" in stored else "images without smaller ones"
        raise UserError(
            f"--guide_path {path} is a model of {what}, unlike --model_path {flags['model_path']}"
        )
    return runs.inherit({**flags, **defaults(kind)}, set(), where, stored)


# -- a classifier ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """A classifier of noised images, ready to lead samples.

    ``flags`` are those of :class:`.ClassifierOptions`, ``class_names`` empty if unknown.
    """

    path: str
    model: EncoderUNetModel
    flags: dict[str, Any]
    class_names: Sequence[str]
    scale: float

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart."""
        return self.flags["num_classes"]

    def add_to(self, flags: runs.Flags) -> runs.Flags:
        """The flags of a diffusion model with those of its classifier."""
        own = {name: value for name, value in self.flags.items() if name.startswith("classifier_")}
        own["num_classes"] = self.num_classes
        own["class_names"] = list(flags["class_names"] or self.class_names)
        return {**flags, **own}

    @property
    def cond_fn(self) -> CondFn:
        """The gradient to follow; see :func:`.classifier_gradient`."""
        return classifier_gradient(self.model, self.scale)


def load_classifier(
    asked: runs.Flags, given: set[str], flags: runs.Flags, diffusion: GaussianDiffusion
) -> Classifier:
    """The classifier of ``--classifier_path``, which looks at the images of the diffusion model.

    :param asked: the flags of the command line.
    :param given: the names of those that the user gave.
    :param flags: the same with those of ``--model_path``.
    :param diffusion: the process of ``--model_path``, respaced or not.
    :raises ValueError: naming both values of what differs, if it was trained on other images, for
        other noise levels or for other classes; if the checkpoint does not fit its flags.
    """
    path = flags["classifier_path"]
    checkpoint.refuse_folder("classifier_path", path)
    theirs, class_names = _flags_of_classifier(asked, given, flags)
    options = ClassifierOptions(**theirs)
    model = options.model()
    theirs = {**theirs, "num_classes": options.num_classes or NUM_CLASSES}
    names = [*SAME_IMAGES, *(["num_classes"] if flags["class_cond"] else [])]
    ours = {**flags, "num_classes": flags["num_classes"] or NUM_CLASSES}
    _check_same("classifier_path", ours, theirs, names, diffusion, options.diffusion())
    _check_names(path, class_names, flags)
    runs.load_for_evaluation(model, path).requires_grad_(False)
    if options.classifier_use_fp16:
        model.convert_to_fp16()
    return Classifier(path, model, theirs, class_names, flags["classifier_scale"])


def _flags_of_classifier(
    asked: runs.Flags, given: set[str], flags: runs.Flags
) -> tuple[dict[str, Any], list[str]]:
    """The options that a classifier was trained with, and the names of its classes.

    Without flags beside it, it is taken to be of the images and the process of the diffusion model.
    """
    path = flags["classifier_path"]
    own = {name: flags[name] for name in defaults(ClassifierOptions)}
    own["num_classes"] = asked["num_classes"] or flags["num_classes"]
    where, stored = stored_flags.flags_of(path)
    if not stored:
        log.warning(
            f"no {stored_flags.CONFIG} beside --classifier_path {path}: its flags are those given "
            f"and the defaults, such as --classifier_width {own['classifier_width']}; images and "
            "process are taken to be those of --model_path"
        )
        return own, []
    if not runs.is_of_classifier(stored):
        raise UserError(
            f"--classifier_path {path} is the checkpoint of a diffusion model, not of a "
            "classifier: name one of classifier_train.py"
        )
    if stored.get("noised") is False:
        log.warning(
            f"--classifier_path {path} was trained on images without noise (--noised False): its "
            "gradients at noised images mean little"
        )
    of_classifier = {name for name in own if name.startswith("classifier_")}
    fixed = (of_classifier | {"num_classes"}) - {"classifier_use_fp16", "classifier_dropout"}
    named = given & of_classifier | ({"num_classes"} & given if asked["num_classes"] else set())
    own = {**defaults(ClassifierOptions), **{name: own[name] for name in named}}
    merged = stored_flags.merge_flags(own, named, stored, fixed, own, where)
    return merged, list(stored.get("class_names") or [])


def _check_names(path: str, class_names: Sequence[str], flags: runs.Flags) -> None:
    """Refuse a classifier whose classes mean something else, as far as both are known."""
    ours = flags["class_names"] if flags["class_cond"] else []
    if not ours or not class_names or list(ours) == list(class_names):
        return
    pairs = enumerate(itertools.zip_longest(class_names, ours))
    index, (name, our_name) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"--classifier_path {path} was trained on other classes than --model_path "
        f"{flags['model_path']}: class {index} is '{name}' to the one, '{our_name}' to the other"
    )


# -- agreement ------------------------------------------------------------------------------------


def _check_same(
    flag: str,
    ours: runs.Flags,
    theirs: runs.Flags,
    names: Iterable[str],
    our_process: GaussianDiffusion,
    their_process: GaussianDiffusion,
) -> None:
    """Refuse a network that was trained on other images, or for another process.

    :param flag: names the network's checkpoint.
    :param names: of flags that must agree, where both have them.
    """
    total = len(original_alphas_cumprod(our_process))
    both = [name for name in names if name in ours and name in theirs]
    both += [] if _same_levels(our_process, their_process) else ["diffusion_steps", *SAME_LEVELS]
    both += ["rescale_timesteps"] if total != 1000 else []  # of 1000 steps it changes nothing
    sides = [as_stored({name: _spelled(side)[name] for name in both}) for side in (theirs, ours)]
    their_words, our_words = differences(*sides)
    if their_words:
        raise UserError(
            f"--{flag} {ours[flag]} was trained with {their_words}, but --model_path "
            f"{ours['model_path']} with {our_words}: both must be of the same images and process"
        )


def _same_levels(one: GaussianDiffusion, other: GaussianDiffusion) -> bool:
    a, b = original_alphas_cumprod(one), original_alphas_cumprod(other)
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-6, atol=0)


def _spelled(flags: runs.Flags) -> runs.Flags:
    """The flags with what they leave to each other written out."""
    predict = prediction_name(flags["predict"], flags["predict_xstart"])
    schedule = schedule_name(flags["noise_schedule"], named_prediction(predict))
    return {**flags, "predict": predict, "noise_schedule": schedule}


def describe_guidance(options: GuidanceOptions, classifier: Classifier | None = None) -> str:
    """The guidance that is on, in words; '' for none."""
    texts = []
    if options.guidance_scale != OFF:
        how = f"away from {options.guide_path}" if options.guide_path else "classifier-free"
        text = f"{how}, scale {options.guidance_scale:g}"
        if interval := parse_interval(options.guidance_interval):
            text += f", at sigma {interval[0]:g} to {interval[1]:g}"
        if options.guidance_rescale:
            text += f", rescaled by {options.guidance_rescale:g}"
        texts.append(text)
    if classifier is not None:
        texts.append(f"by the classifier {classifier.path}, scale {classifier.scale:g}")
    return f"guidance {'; and '.join(texts)}" if texts else ""
