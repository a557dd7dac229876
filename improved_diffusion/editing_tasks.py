"""The tasks of image_edit.py: what is given to each, and what a batch of it makes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util, editing
from .denoiser import Denoiser
from .editing_options import UNSET_T, EditOptions
from .editing_pictures import Pictures, load_masks, load_pictures
from .errors import UserError
from .flags import require
from .gaussian_diffusion import GaussianDiffusion, Model
from .guidance import OFF, GuidanceOptions
from .image_datasets import label as read_labels
from .pixels import parse_value_range
from .rng import randn, sample_generators
from .sample_util import parse_classes
from .sampling import SampleOptions, describe_sampler, sampling_levels
from .solvers import get_solver
from .stored_flags import flags_of

log = logging.getLogger(__name__)

SOLVER_OF = {"ddpm": "ancestral", "ddim": "euler"}  # the same steps, between any levels


@dataclass(frozen=True)
class Given:
    """What is edited: pictures, with those at the other end or masks, and their classes.

    ``masks`` are bool [N, H, W]; ``labels`` are int64 [N] of the pictures and of the others, or
    None for a model without classes.
    """

    pictures: Pictures
    others: Pictures | None = None
    masks: np.ndarray | None = None
    labels: tuple[Tensor, Tensor] | None = None


def refuse_others(path: str) -> None:
    """Refuse the checkpoint of a model that makes no pictures from noise alone.

    :raises ValueError: naming the file, on every process.
    """
    _, stored = flags_of(path)
    if "large_size" in stored:
        raise UserError(
            f"--model_path {path} is of super-resolution: name a checkpoint of image_train.py"
        )


def load_given(
    options: EditOptions,
    flags: dict[str, Any],
    num_classes: int | None,
    null_class: int | None = None,
) -> Given:
    """Read what the flags name.

    :param flags: of the script, with those of the checkpoint.
    :param num_classes: of the model; None if it knows none.
    :param null_class: its label for images without a class, if it has one.
    :raises ValueError: on every process, naming the flag or the file that does not fit.
    """
    how = (flags["image_size"], flags["channels"], parse_value_range(flags["value_range"]))
    pictures = load_pictures(options.image, *how)
    others = masks = None
    if options.task == "inpaint":
        masks = load_masks(options.mask, pictures)
    if options.task == "interpolate":
        others = load_pictures(options.image2, *how, flag="image2")
        if len(others) != len(pictures):
            raise UserError(
                f"--image2 '{options.image2}' holds {len(others)} pictures, --image "
                f"'{options.image}' {len(pictures)}: give as many"
            )
    names = flags["class_names"]
    classes = parse_classes(options.classes, num_classes, names)
    if num_classes is None:
        return Given(pictures, others, masks)
    labels = _labels_of_ends(options, pictures, others, classes, names, null_class)
    return Given(pictures, others, masks, labels)


def _labels_of_ends(
    options: EditOptions,
    pictures: Pictures,
    others: Pictures | None,
    classes: list[int],
    class_names: Sequence[str],
    null_class: int | None,
) -> tuple[Tensor, Tensor]:
    """The classes of the pictures and of those at the other end, as asked for or by their names."""
    asked = classes, classes
    if others is not None and classes:
        if len(classes) > 2:
            raise UserError(
                f"--classes {options.classes}: give one class for both ends of the way, or one for "
                "--image and one for --image2"
            )
        asked = classes[:1], classes[-1:]
    ends = (pictures,) if others is None else (pictures, others)
    labels = [
        torch.tensor(
            [own[i % len(own)] for i in range(len(end.paths))]
            if own
            else _classes_by_names(end.paths, options.labels_from, class_names, null_class)
        )
        for end, own in zip(ends, asked, strict=False)
    ]
    return labels[0], labels[-1]


def _classes_by_names(
    paths: Sequence[str], labels_from: str, class_names: Sequence[str], null_class: int | None
) -> list[int]:
    """The class that each picture's name tells; where it tells none, the null class if there is."""
    indices, found = read_labels(paths, labels_from)
    names = [found[index] for index in indices]
    unknown = [path for path, name in zip(paths, names, strict=True) if name not in class_names]
    if unknown and null_class is None:
        raise UserError(
            f"'{unknown[0]}': its name tells no class of this class-conditional model, read from "
            f"the {labels_from} (--labels_from): give it by --classes"
        )
    if unknown:
        log.info(f"{len(unknown)} of {len(paths)} pictures have no class: their names tell none")
    known = {name: index for index, name in enumerate(class_names)}
    return [known[name] if name in known else int(null_class or 0) for name in names]


def check_guidance(given: Given, null_class: int | None, guidance: GuidanceOptions) -> None:
    """Refuse classifier-free guidance of a picture without a class, which would do nothing.

    :raises ValueError: naming the first of them.
    """
    if guidance.guidance_scale == OFF or guidance.guide_path or given.labels is None:
        return
    ends = zip((given.pictures, given.others or given.pictures), given.labels, strict=True)
    for pictures, labels in ends:
        for path, label in zip(pictures.paths, labels.tolist(), strict=True):
            if label == null_class:
                raise UserError(
                    f"--guidance_scale {guidance.guidance_scale:g} has no class to follow at "
                    f"'{path}', whose name tells none: give it by --classes"
                )


class Editor:
    """One task on the given pictures, batch by batch.

    A row is a picture's variant, in the order picture by picture; what it draws depends on the
    seed, the number of its picture and that of the variant.

    :param model: the network, guided or not.
    :param sampling: from :meth:`EditOptions.sampling`.
    :raises ValueError: naming the flag, for a timestep or a jump that the process has no room for.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        options: EditOptions,
        sampling: SampleOptions,
        given: Given,
        seed: int,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.options = options
        self.sampling = sampling
        self.given = given
        self.seed = seed
        self.images = given.pictures.images()
        self.sigmas = sampling_levels(diffusion, sampling)
        levels = Denoiser(model, diffusion).levels
        self.t = options.from_t
        if options.task == "image_to_image":
            last = levels.num_timesteps - 1
            if self.t == UNSET_T:
                self.t = editing.start_of_strength(options.strength, last + 1)
            require(0 <= self.t <= last, "from_t", self.t, f"in 0 ... {last}, a timestep")
        self.sigma_start = float(levels.sigma_of_t(max(self.t, 0)))
        steps, jump = len(self.sigmas) - 1, options.jump_length
        if options.task == "inpaint" and options.jump_samples > 1:
            room = f"below the {steps} steps; or give --jump_samples 1, for no jumps"
            require(jump < steps, "jump_length", jump, room)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.images) * self.options.num_samples

    def describe(self) -> str:
        """The task in words."""
        options = self.options
        text = f"{options.task}: {describe_sampler(self.diffusion, self.sampling)}"
        if options.task == "inpaint":
            walk = editing.repaint_walk(
                len(self.sigmas) - 1, options.jump_length, options.jump_samples
            )
            down = sum(after > before for before, after in pairwise(walk))
            text += f", {down} with those gone again after jumps"
        if options.task == "image_to_image":
            below = len(editing.levels_from(self.sigmas, self.sigma_start)) - 1
            some = "" if self.sampling.chosen == "ode" else f"{below} of them "
            text += f", {some}from t = {self.t} on (sigma {self.sigma_start:.3g})"
        return text

    def make(self, rows: list[int]) -> tuple[Tensor, None]:
        """The results of some rows, float32 [N, C, H, W]; of interpolate [N, K, C, H, W]."""
        total = len(self.images)
        indices = [row // self.options.num_samples % total for row in rows]
        variants = [row % self.options.num_samples for row in rows]
        generators = [
            sample_generators(self.seed, [variant], "edit", index)[0]
            for index, variant in zip(indices, variants, strict=True)
        ]
        if self.sampling.chosen == "ode" and len(rows) > 1:
            # one at a time: its steps grow the rounding that a network does in another batch
            return torch.cat([self.make([row])[0] for row in rows]), None
        images = self.images[indices].to(dist_util.dev())
        tasks: dict[str, Callable[..., Tensor]] = {
            "inpaint": self._inpaint,
            "image_to_image": self._image_to_image,
            "reconstruct": self._reconstruct,
            "interpolate": self._interpolate,
        }
        with torch.no_grad():
            return tasks[self.options.task](images, indices, generators).float(), None

    def _inpaint(
        self, images: Tensor, indices: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        assert self.given.masks is not None
        denoise = self._denoiser(indices)
        noise = randn(images.shape, generators, images.device)
        return editing.inpaint(
            denoise,
            denoise.initial(noise, float(self.sigmas[0])),
            self.sigmas,
            known=images,
            mask=torch.from_numpy(self.given.masks[indices])[:, None].to(images.device),
            generator=generators,
            jump_length=self.options.jump_length,
            jump_samples=self.options.jump_samples,
            **self._solver(denoise),
        )

    def _image_to_image(
        self, images: Tensor, indices: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        denoise = self._denoiser(indices)
        return editing.image_to_image(
            denoise,
            images,
            self.sigmas,
            self.sigma_start,
            generator=generators,
            **self._solver(denoise),
        )

    def _reconstruct(
        self, images: Tensor, indices: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        denoise = self._denoiser(indices)
        latents = editing.encode(denoise, images, self.sigmas)
        return editing.decode(denoise, latents, self.sigmas)

    def _interpolate(
        self, images: Tensor, indices: list[int], generators: list[torch.Generator]
    ) -> Tensor:
        assert self.given.others is not None
        others = self.given.others.images()[indices].to(images.device)
        denoise, denoise_second = self._denoiser(indices), None
        if self.given.labels and not torch.equal(*self.given.labels):
            denoise_second = self._denoiser(indices, end=1)
        way = editing.interpolate(
            denoise,
            images,
            others,
            self.sigmas,
            self.options.points,
            denoise_second=denoise_second,
        )
        return way.transpose(0, 1)

    def _denoiser(self, indices: list[int], end: int = 0) -> Denoiser:
        """D for some pictures, or for those at the other end."""
        kwargs = {}
        if self.given.labels is not None:
            kwargs["y"] = self.given.labels[end][indices].to(dist_util.dev())
        return Denoiser(
            self.model, self.diffusion, kwargs, clip_denoised=self.options.clip_denoised
        )

    def _solver(self, denoise: Denoiser) -> dict[str, Any]:
        """The solver and its own arguments."""
        name = SOLVER_OF.get(self.sampling.chosen, self.sampling.chosen)
        own = {"posterior": denoise.posterior} if name == "ancestral" else {}
        return {"solver": get_solver(name), **own}
