"""Checkpoints from one format into another, each conversion tried out before it counts.

Both networks, the one that was read and the one that was written, are run on the same input; where
they differ by more than rounding, nothing is left. Networks whose outputs are 0, such as untrained
ones, are compared with noise in place of the weights that are 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, diffusers_files, runs, state_dicts, stored_flags
from .classifier_options import ClassifierOptions
from .diffusers_files import Pretrained
from .diffusers_format import (
    EMBEDDING_STEPS,
    Config,
    Flags,
    layout_of,
    scheduler_config,
    scheduler_flags,
    unet_config,
    unet_flags,
)
from .diffusers_weights import from_diffusers, to_diffusers
from .errors import UserError
from .files import write_tensors
from .flags import defaults, pick
from .network_comparison import Comparison, compare
from .process import DiffusionOptions, prediction_name
from .safetensors_format import write_safetensors
from .script_util import ModelAndDiffusionOptions, SuperResOptions
from .unet import UNetModel

log = logging.getLogger(__name__)

FORMATS = ("safetensors", "diffusers", "openai")
TOLERANCE = 1e-4  # of the outputs, relative to the largest

Kind = type[ModelAndDiffusionOptions] | type[SuperResOptions] | type[ClassifierOptions]
KINDS: dict[Kind, str] = {
    ModelAndDiffusionOptions: "diffusion model",
    SuperResOptions: "super-resolution network",
    ClassifierOptions: "classifier",
}


@dataclass(frozen=True)
class Checkpoint:
    """A network that was read, from whichever format.

    ``flags`` are ours, as they lie beside a checkpoint. ``network`` is ours, with the weights, on
    the CPU. ``there`` is what was read, if it was of diffusers. ``name`` is that of the file or
    folder that the weights once came from, "" for unknown.
    """

    kind: Kind
    flags: Flags
    network: nn.Module
    there: Pretrained | None = None
    name: str = ""

    @property
    def evaluate(self) -> Callable[..., Tensor]:
        """The network that was read, of ours or of diffusers; the arguments are those of ours."""
        return self.network if self.there is None else self.there.evaluate


# -- reading --------------------------------------------------------------------------------------


def read_checkpoint(path: str, flags: Flags, given: set[str]) -> Checkpoint:
    """Read a file of ours or a folder of diffusers.

    :param flags: all flags of the options of KINDS.
    :param given: the names of those that count where the checkpoint tells nothing, and must agree
        where it does.
    :raises ValueError: if there is none, it is damaged, a flag contradicts it or is none of its
        kind of network, or an option of diffusers has no counterpart.
    """
    if diffusers_files.is_folder_of_diffusers(path):
        return _from_diffusers(path, flags, given)
    if os.path.isdir(path) and not checkpoint.is_sharded(path.rstrip("/")):
        raise UserError(
            f"--model_path {path} is a folder without a network of diffusers: name a file in it, "
            "such as ema_0.9999_010000.pt"
        )
    where, stored = stored_flags.flags_of(path)
    kind = _kind(stored or given)
    _check_names(given, kind, path)
    flags = runs.inherit(flags, given, where, stored)
    flags = _of_the_model(kind, flags, stored)
    network = pick(kind, flags).model()
    runs.load_for_evaluation(network, path).cpu()
    return Checkpoint(kind, flags, network, name=checkpoint.origin(path, stored) or _name(path))


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _kind(names: Collection[str]) -> Kind:
    """What a network is for, by the names of its flags."""
    if any(name.startswith("classifier_") for name in names):
        return ClassifierOptions
    return SuperResOptions if "large_size" in names else ModelAndDiffusionOptions


def _check_names(given: set[str], kind: Kind, path: str) -> None:
    """Refuse flags of another kind of network, which would count for nothing."""
    foreign = sorted(given - defaults(kind).keys())
    if foreign:
        what = "is no flag" if len(foreign) == 1 else "are no flags"
        raise UserError(
            f"{' '.join(f'--{name}' for name in foreign)} {what} of a {KINDS[kind]}, which "
            f"--model_path {path} is: leave {'it' if len(foreign) == 1 else 'them'} out"
        )


def _of_the_model(kind: Kind, flags: Flags, stored: Flags) -> Flags:
    """The flags of a model alone, without those of its training, and the names of its classes."""
    labels = {"labels_from": stored["labels_from"]} if "labels_from" in stored else {}
    names = {"class_names": flags["class_names"]} if flags["class_names"] else {}
    return {**{name: flags[name] for name in defaults(kind)}, **labels, **names}


def _from_diffusers(path: str, flags: Flags, given: set[str]) -> Checkpoint:
    _check_names(given, ModelAndDiffusionOptions, path)
    there = diffusers_files.read_folder(path)
    stored = _flags_of_diffusers(there, flags, given)
    flags = runs.inherit(flags, given, there.config, stored)
    flags = _of_the_model(ModelAndDiffusionOptions, flags, stored)
    network = pick(ModelAndDiffusionOptions, flags).model()
    weights = from_diffusers(there.unet.state_dict(), layout_of(network))
    state_dicts.check_fit(network, weights, path)
    network.load_state_dict(weights)
    runs.check_finite(network, path)
    name = stored.get(stored_flags.CONVERTED_FROM) or _name(path)
    return Checkpoint(ModelAndDiffusionOptions, flags, network.eval(), there, name)


def _flags_of_diffusers(there: Pretrained, flags: Flags, given: set[str]) -> Flags:
    """Our flags of a network of diffusers and of its scheduler."""
    size = flags["image_size"] if "image_size" in given else None
    found = {
        **unet_flags(there.options, size),
        "class_dropout": 0.0,
        # what there is no option for, and ours to choose
        "use_new_attention_order": flags["use_new_attention_order"],
        "value_range": flags["value_range"],
    }
    if "class_dropout" in given and flags["class_dropout"] > 0 and found["class_cond"]:
        # the last label stands for none
        found["num_classes"] -= 1
        found["class_dropout"] = flags["class_dropout"]
    if there.scheduler is not None:
        _warn_of_sampling(there.scheduler.config)
        found |= scheduler_flags(there.scheduler.config, there.scheduler.betas, found)
    if _says_the_same(there):
        return there.flags
    return found if there.scheduler is not None else {**_given_process(flags), **found}


def _given_process(flags: Flags) -> Flags:
    """The flags of the process of a network alone, which does not tell them."""
    prediction = prediction_name(flags["predict"], flags["predict_xstart"])
    log.warning(
        "no scheduler beside the network: its process is that of the flags given and the "
        f"defaults, such as --predict {prediction} --noise_schedule {flags['noise_schedule']} "
        f"--diffusion_steps {flags['diffusion_steps']}"
    )
    scaled = {"rescale_timesteps": flags["diffusion_steps"] == EMBEDDING_STEPS}
    return {**{name: flags[name] for name in defaults(DiffusionOptions)}, **scaled}


def _warn_of_sampling(scheduler: Config) -> None:
    """Say which options of a scheduler belong to sampling, which the checkpoint does not hold."""
    if not scheduler.get("clip_sample", True):
        log.warning("its scheduler does not clip: sample with --clip_denoised False")
    if scheduler.get("thresholding", False):
        log.warning("its scheduler's thresholding has no counterpart here: images are clamped")


def _says_the_same(there: Pretrained) -> bool:
    """Whether the flags in a folder of diffusers are those of the network that lies there now.

    And of its scheduler, if it has one.
    """
    if not there.flags:
        return False
    known = {**defaults(ModelAndDiffusionOptions), **there.flags}
    try:
        network, process = _configs(pick(ModelAndDiffusionOptions, known))
        pairs = [(there.options, network)]
        pairs += [(there.scheduler.config, process)] if there.scheduler is not None else []
        same = all(_plain(found.get(name)) == own[name] for found, own in pairs for name in own)
    except (UserError, TypeError):  # of flags that a hand has changed
        same = False
    if not same:
        log.warning(
            f"{diffusers_files.FLAGS} tells of another network than lies beside it: it does not "
            "count"
        )
    return same


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _configs(options: ModelAndDiffusionOptions) -> tuple[Config, Config]:
    """The arguments of the network and of the scheduler of diffusers that our options mean.

    :raises ValueError: naming the flag and its value, for one without a counterpart.
    """
    betas = dataclasses.replace(options, timestep_respacing="").diffusion().betas
    process = scheduler_config(dataclasses.asdict(options), betas)
    with torch.device("meta"):  # without memory for weights
        network = options.model()
    return unet_config(network, options.image_size), process


# -- writing --------------------------------------------------------------------------------------


def check_target(source: Checkpoint, form: str) -> None:
    """Check before anything is written that a format can hold a checkpoint.

    :param form: one of FORMATS.
    :raises ValueError: naming the flag without a counterpart there, and its value.
    """
    if form == "diffusers":
        _configs(_of_diffusion(source))


def _of_diffusion(source: Checkpoint) -> ModelAndDiffusionOptions:
    options = pick(source.kind, source.flags)
    if isinstance(options, ModelAndDiffusionOptions):
        return options
    raise UserError(
        f"a {KINDS[source.kind]} has no counterpart in diffusers' UNet2DModel: convert it to "
        "safetensors"
    )


def convert(source: Checkpoint, form: str, path: str) -> Comparison:
    """Write a checkpoint in another format, and try out what was written.

    :param form: one of FORMATS.
    :param path: the new file for safetensors, else the new folder; it appears when all is well.
    :return: how the networks' outputs differ.
    :raises ValueError: if they differ by more than TOLERANCE, or the format cannot hold the
        checkpoint; then nothing is left.
    """
    check_target(source, form)
    with _whole(path) as beside:
        _write(source, form, beside)
        back = beside if form != "openai" else os.path.join(beside, checkpoint.model_name(0))
        written = read_checkpoint(back, source.flags, set())
        comparison = compare(source, written)
        if not comparison.relative <= TOLERANCE:  # NaN too
            raise UserError(
                f"the converted network's outputs differ by {comparison.relative:.1e} of the "
                f"largest, more than {TOLERANCE:g}: nothing was written"
            )
        if not _same_weights(source.network, written.network):
            raise UserError("the weights did not come back as they were: nothing was written")
    return comparison


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def _write(source: Checkpoint, form: str, path: str) -> None:
    state, flags = source.network.state_dict(), source.flags
    if source.name:
        flags = {**flags, stored_flags.CONVERTED_FROM: source.name}
    if form == "safetensors":
        write_safetensors(path, state, flags)
    elif form == "openai":
        os.mkdir(path)
        write_tensors(os.path.join(path, checkpoint.model_name(0)), state)
        stored_flags.save_config(path, flags)
    else:
        unet, scheduler = _configs(_of_diffusion(source))
        assert isinstance(source.network, UNetModel)
        weights = to_diffusers(state, layout_of(source.network))
        diffusers_files.write_pipeline(path, unet, scheduler, weights, flags)


@contextlib.contextmanager
def _whole(path: str) -> Iterator[str]:
    """A path in a folder beside, whose file or folder becomes ``path`` if all goes well.

    The folders above ``path`` that this has to make go again if not.
    """
    path = os.path.abspath(path)
    above = os.path.dirname(path)
    made = [above]
    while not os.path.isdir(made[-1]):
        made.append(os.path.dirname(made[-1]))
    folder = f"{path}.tmp"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        os.makedirs(folder)
        beside = os.path.join(folder, os.path.basename(path))
        yield beside
        os.rename(beside, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in made[:-1]:
            with contextlib.suppress(OSError):  # not made, or not empty
                os.rmdir(empty)
        raise
    os.rmdir(folder)
