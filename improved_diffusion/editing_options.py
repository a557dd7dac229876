"""The flags of image_edit.py, and what belongs to which task."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError
from .flags import option, require, require_at_least
from .image_datasets import LABEL_SOURCES
from .noise_levels import SPACINGS
from .sampling import OF_THE_PROCESS, SAMPLERS, SampleOptions

STEPS = {"inpaint": 50, "image_to_image": 50, "reconstruct": 100, "interpolate": 100}
TASKS = tuple(STEPS)
DEFAULT_SAMPLER = {"inpaint": "ancestral", "image_to_image": "dpmpp_2m"}
# In RePaint each step stands alone, so that a sampler that remembers would do as Euler's method
STEP_BY_STEP = ("ddpm", "ddim", "euler", "heun", "sde", "ancestral")
RANDOM = ("inpaint", "image_to_image")
OWN_FLAGS = {
    "mask": ("inpaint",),
    "jump_length": ("inpaint",),
    "jump_samples": ("inpaint",),
    "strength": ("image_to_image",),
    "from_t": ("image_to_image",),
    "image2": ("interpolate",),
    "points": ("interpolate",),
    "sampler": RANDOM,
    "num_samples": RANDOM,
}
UNSET_T = -1


@dataclass(frozen=True)
class EditOptions:
    """What to do with which pictures."""

    task: str = option(
        "",
        "inpaint: make a part anew; image_to_image: add noise and take it away; reconstruct: to "
        "the noise and back; interpolate: from one picture to another",
    )
    model_path: str = option("", "checkpoint; its flags are read from the folder it lies in")
    image: str = option("", "the picture to edit, or a folder of them")
    image2: str = option(
        "", "interpolate: the picture at the other end, or a folder with as many as --image"
    )
    mask: str = option(
        "",
        "inpaint: a picture as large as --image, or a folder with one of each name: white (128 of "
        "255 or more) is made anew, black is kept, whether transparent or not",
    )
    num_samples: int = option(1, "inpaint, image_to_image: variants of each picture")
    strength: float = option(
        0.5, "image_to_image: how far to go to the noise, above 0 and at most 1 (nothing is kept)"
    )
    from_t: int = option(
        UNSET_T, "image_to_image: the timestep to begin at, instead of --strength; -1: as it says"
    )
    jump_length: int = option(2, "inpaint: steps to jump back, so that the new part fits the rest")
    jump_samples: int = option(10, "inpaint: how often each stretch is gone down; 1: no jumps")
    points: int = option(8, "interpolate: pictures on the way, both ends included")
    sampler: str = option(
        "", f"inpaint, image_to_image: {', '.join(SAMPLERS)}; '': what suits the task"
    )
    steps: int = option(
        0,
        "steps from pure noise to the picture; 0: those of --timestep_respacing, else "
        + ", ".join(f"{steps} to {task}" for task, steps in STEPS.items()),
    )
    spacing: str = option("", f"of the steps: {', '.join(SPACINGS)}; '': what suits the task")
    clip_denoised: bool = option(True, "clamp each estimate of the image to the range of images")
    classes: str = option(
        "",
        "for a class-conditional model: numbers or names, taken in turn by the pictures; with "
        "interpolate one for both ends, or two; '': by the names of the files, as in training",
    )
    labels_from: str = option(
        "filename",
        "a class is 'filename': the name up to the first _, or 'folder': the folder it lies in",
    )
    batch_size: int = option(16, "pictures at a time and process; does not change the results")
    use_fp16: bool = option(False, "compute in float16")

    def __post_init__(self) -> None:
        if not self.task:
            raise UserError(f"--task is missing: choose one of {', '.join(TASKS)}")
        require(self.task in TASKS, "task", self.task, f"one of {', '.join(TASKS)}")
        require_at_least(1, self, ["num_samples", "batch_size", "jump_length", "jump_samples"])
        require_at_least(0, self, ["steps"])
        require_at_least(2, self, ["points"])
        require(0 < self.strength <= 1, "strength", self.strength, "above 0 and at most 1")
        labels = " or ".join(LABEL_SOURCES)
        require(self.labels_from in LABEL_SOURCES, "labels_from", self.labels_from, labels)
        samplers = STEP_BY_STEP if self.task == "inpaint" else SAMPLERS
        fits = self.sampler in ("", *samplers)
        require(fits, "sampler", self.sampler, f"one of {', '.join(samplers)} to {self.task}")
        spacings = ", ".join(SPACINGS)
        require(self.spacing in ("", *SPACINGS), "spacing", self.spacing, f"one of {spacings}")

    def sampling(self, respacing: str, num_timesteps: int) -> SampleOptions:
        """The sampler, its steps and their spacing.

        :param respacing: ``--timestep_respacing``.
        :param num_timesteps: T of the process that the model was trained for.
        :raises ValueError: naming the flags, for what contradicts each other.
        """
        sampler = self.sampler or DEFAULT_SAMPLER.get(self.task, "euler")
        own_steps = bool(respacing) or sampler == "ode"
        steps = self.steps or (0 if own_steps else min(STEPS[self.task], num_timesteps))
        spacing = self.spacing
        if self.task == "inpaint" and steps and sampler not in OF_THE_PROCESS:
            spacing = spacing or "log_snr"  # so that jumps are as long at all levels
        return SampleOptions(
            sampler=sampler, steps=steps, spacing=spacing, clip_denoised=self.clip_denoised
        )


def check_own_flags(options: EditOptions, given: set[str]) -> None:
    """Refuse flags of another task, which would be ignored.

    :param given: the names of the flags that the user gave.
    """
    for name, tasks in OWN_FLAGS.items():
        if name in given and options.task not in tasks:
            raise UserError(f"--{name} is of --task {' or '.join(tasks)}, not of {options.task}")
    if {"strength", "from_t"} <= given and options.from_t != UNSET_T:
        raise UserError(
            f"--strength {options.strength} and --from_t {options.from_t} both say where to begin: "
            "leave one of them out"
        )
