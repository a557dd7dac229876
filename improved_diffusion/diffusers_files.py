"""Folders of diffusers: a pipeline of ``UNet2DModel`` and scheduler, or the network alone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .diffusers_format import Config, Flags
from .errors import UserError

log = logging.getLogger(__name__)

INDEX, CONFIG = "model_index.json", "config.json"
FLAGS = "improved_diffusion.json"  # what diffusers cannot say, such as the names of classes
PARTS = {"unet": "UNet2DModel", "scheduler": ""}  # of a pipeline -> its class; '': any
PART_FILES = {"unet": CONFIG, "scheduler": "scheduler_config.json"}  # without which it is none
WEIGHTS = "diffusion_pytorch_model"
# whole, or the index of several files; a variant, such as fp16, has a name in it
WEIGHT_FILES = (
    rf"{WEIGHTS}(?:\.([^.-]+))?\.(?:safetensors|bin)",
    rf"{WEIGHTS}\.(?:safetensors|bin)\.index(?:\.([^.]+))?\.json",
)


@dataclass(frozen=True)
class Scheduler:
    """Arguments of a scheduler, and the betas [T] it makes without ``rescale_betas_zero_snr``."""

    config: Config
    betas: np.ndarray


@dataclass(frozen=True)
class Pretrained:
    """What a folder of diffusers holds.

    ``unet`` is the network, a ``UNet2DModel`` in evaluation mode; ``scheduler`` is None for a
    network alone. ``flags`` are ours, {} unless the folder holds some, or that of the pipeline
    around it. ``config`` is the folder of the network's ``config.json``.
    """

    unet: nn.Module
    scheduler: Scheduler | None
    flags: Flags
    config: str

    @property
    def options(self) -> Config:
        """All arguments of the network."""
        return dict(self.unet.config)  # type: ignore[arg-type]

    def evaluate(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The output of the network, [N, C or 2 C, H, W]; the arguments are those of ours."""
        return self.unet(x, timesteps, class_labels=y).sample


def is_folder_of_diffusers(path: str) -> bool:
    """Whether a path is a folder of a pipeline, or of a network, of diffusers."""
    return _exists(path, INDEX) or _exists(path, "unet", CONFIG) or "_class_name" in _config(path)


def read_folder(path: str) -> Pretrained:
    """Load a network and the arguments of its scheduler, if it has one.

    :raises ValueError: naming the part that has no counterpart here; if a file is damaged or
        missing; without the package diffusers.
    """
    if _exists(path, INDEX):
        _check_parts(_json(os.path.join(path, INDEX)), path)
    folder = os.path.join(path, "unet") if _exists(path, "unet", CONFIG) else path
    kind = _config(folder).get("_class_name")
    if kind != PARTS["unet"]:
        raise _foreign("network", kind)
    diffusers = _library()
    home = _home(path)
    file = os.path.join(home, "scheduler", PART_FILES["scheduler"])
    scheduler = _scheduler(diffusers, _json(file)) if _exists(file) else None
    flags = _json(os.path.join(home, FLAGS)) if _exists(home, FLAGS) else {}
    return Pretrained(_load_unet(diffusers, folder), scheduler, flags, folder)


def _home(path: str) -> str:
    """The pipeline of ours whose ``unet`` a path is, for the process; else the path."""
    above, name = os.path.split(os.path.abspath(path))
    inside = name == "unet" and _exists(above, FLAGS) and not _exists(path, FLAGS)
    return above if inside else path


def write_pipeline(
    folder: str, unet: Config, scheduler: Config, weights: Mapping[str, Tensor], flags: Flags
) -> None:
    """Write a folder for ``DDPMPipeline.from_pretrained``.

    :param unet: arguments of the network.
    :param scheduler: arguments of ``DDPMScheduler``.
    :param weights: of the network.
    :param flags: ours, which the folder keeps for the way back.
    """
    diffusers = _library()
    network = diffusers.UNet2DModel(**unet)
    network.load_state_dict(weights)
    process = diffusers.DDPMScheduler(**scheduler)
    diffusers.DDPMPipeline(unet=network, scheduler=process).save_pretrained(folder)
    with open(os.path.join(folder, FLAGS), "w", encoding="utf-8") as file:
        json.dump(flags, file, indent=1)


def _library() -> ModuleType:
    try:
        import diffusers
    except ImportError:
        raise UserError(
            "networks of diffusers need packages: pip install 'improved-diffusion[diffusers]'"
        ) from None
    diffusers.utils.logging.set_verbosity_error()  # what it warns of is checked here
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@contextlib.contextmanager
def _silent(diffusers: ModuleType) -> Iterator[None]:
    """Without the library's messages, which tell as errors what is none, or is told here."""
    logs = diffusers.utils.logging
    before = logs.get_verbosity()
    logs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(before)


def _exists(*parts: str) -> bool:
    return os.path.isfile(os.path.join(*parts))


def _config(folder: str) -> Config:
    return _json(os.path.join(folder, CONFIG)) if _exists(folder, CONFIG) else {}


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise UserError(f"'{path}' is damaged")


def _check_parts(index: Mapping[str, Any], path: str) -> None:
    """Check that a pipeline is a network and a scheduler, and nothing else, and that they exist."""
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value[1] is None:
            continue
        if part not in PARTS:
            raise UserError(
                f"diffusers' {part} {value[1]} of {index.get('_class_name')} has no counterpart "
                "here: a network of pixels and its scheduler have"
            )
        if PARTS[part] not in ("", value[1]):
            raise _foreign(part, value[1])
        if not _exists(path, part, PART_FILES[part]):
            raise UserError(
                f"'{path}' is damaged: {part}/{PART_FILES[part]} is missing, and {INDEX} names "
                f"the {part}"
            )


def _foreign(part: str, kind: Any) -> UserError:
    return UserError(
        f"diffusers' {part} {kind} has no counterpart here: of its networks {PARTS['unet']} has"
    )


def _variant(folder: str) -> str | None:
    """The variant of the weights in a folder, None for those without a name.

    :raises ValueError: if there are no weights, or several variants alone.
    """
    matches = [re.fullmatch(form, name) for name in os.listdir(folder) for form in WEIGHT_FILES]
    found = {match.group(1) for match in matches if match}
    if not found:
        raise UserError(f"'{folder}' is damaged: it has no weights, such as {WEIGHTS}.safetensors")
    if None in found:
        return None
    names = sorted(name for name in found if name)
    if len(names) > 1:
        raise UserError(
            f"'{folder}' holds variants of the weights alone, {', '.join(names)}: leave the files "
            "of one in it"
        )
    log.warning(f"its weights are those of the variant {names[0]}: the folder holds no others")
    return names[0]


def _load_unet(diffusers: ModuleType, folder: str) -> nn.Module:
    variant = _variant(folder)
    try:
        with _silent(diffusers):
            unet, found = diffusers.UNet2DModel.from_pretrained(
                folder,
                variant=variant,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a damaged folder makes the library raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"'{folder}' is damaged or no network of diffusers: {lines[0]}") from None
    odd = [key for keys in ("missing_keys", "unexpected_keys") for key in found[keys]]
    if odd:
        raise UserError(
            f"'{folder}' is damaged: {len(odd)} weights are missing or unknown, such as "
            f"{', '.join(sorted(odd)[:3])}"
        )
    return unet.float().eval()


def _scheduler(diffusers: ModuleType, config: Config) -> Scheduler:
    """Given betas are taken as they are, a named schedule in the library's float32."""
    if "beta_schedule" not in config:
        kind = config.get("_class_name", "of this kind")
        raise UserError(f"diffusers' scheduler {kind} has no counterpart here: it has no betas")
    if config.get("trained_betas") is not None:
        return Scheduler(config, np.array(config["trained_betas"], dtype=np.float64))
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    known = {name: config[name] for name in names if name in config}
    try:
        return Scheduler(config, diffusers.DDPMScheduler(**known).betas.double().numpy())
    except NotImplementedError:
        raise UserError(
            f"diffusers' beta_schedule {config['beta_schedule']} has no counterpart here"
        ) from None
