"""What the sampling scripts share: from the flags of a checkpoint to a folder of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from . import dist_util, logger, runs, sampling
from .checkpoint import describe_weights
from .compiling import CompileOptions, check_compiler, compile_if_asked
from .flags import ImageSize, height_width, pick
from .gaussian_diffusion import GaussianDiffusion
from .guidance import GuidanceOptions, Unlabelled, guided_model
from .guides import Classifier, describe_guidance, load_weak
from .pixels import parse_value_range
from .same_job import deciding_flags
from .sample_parts import SampleParts
from .sample_util import (
    check_png,
    class_labels,
    collect_samples,
    parse_classes,
    to_values,
    write_samples,
)
from .sampling import SampleOptions
from .unet import UNetModel

Conditions = Callable[[list[int]], dict[str, Tensor]]


class SamplingJob:
    """The samples that flags ask of a checkpoint: how they are made, kept and written.

    All that the user may have got wrong is told when the job is made, before a file is.

    :param model: the network of the flags, into which the checkpoint is loaded.
    :param diffusion: its process.
    :param flags: of the script, with those of the checkpoint.
    :param size: of the samples.
    :param classifier: leads the samples to their classes, beside other guidance; None for none.
    :raises ValueError: if the flags cannot work together, or a checkpoint does not fit.
    """

    def __init__(
        self,
        model: UNetModel,
        diffusion: GaussianDiffusion,
        flags: runs.Flags,
        size: ImageSize,
        classifier: Classifier | None = None,
    ) -> None:
        self.options: SampleOptions = pick(SampleOptions, flags)
        self.guidance: GuidanceOptions = pick(GuidanceOptions, flags)
        self.compiled: CompileOptions = pick(CompileOptions, flags)
        self.model = model
        self.diffusion = diffusion
        self.flags = flags
        self.shape = (flags["channels"], *height_width(size))
        self.classifier = classifier
        self.value_range = parse_value_range(flags["value_range"])
        self.class_names: list[str] = flags["class_names"]
        self.num_classes = model.num_classes
        if classifier is not None:
            self.num_classes = classifier.num_classes
        sampling.check_sampler(model, diffusion, self.options, flags["timestep_respacing"])
        check_png(self.options.save_png, flags["channels"], self.value_range)
        self._all_finite = True
        self.classes = parse_classes(self.options.classes, self.num_classes, self.class_names)
        runs.load_for_evaluation(model, self.options.model_path)  # tells first what does not fit
        check_compiler(self.compiled)
        self.weak = load_weak(flags, diffusion) if self.guidance.guide_path else None
        self.guided = guided_model(model, diffusion, self.guidance, self.weak)
        if classifier is not None and model.num_classes is None:
            self.guided = Unlabelled(self.guided)

    def start(self, **contents: Iterable[Tensor]) -> None:
        """Open the run folder and say what will be done in it.

        :param contents: by the name of a flag that names a file: the tensors read from it.
        :raises ValueError: if the folder holds parts of another job.
        """
        networks: dict[str, nn.Module] = {"model_path": self.model}
        if self.weak is not None:
            networks["guide_path"] = self.weak
        if self.classifier is not None:
            networks["classifier_path"] = self.classifier.model
        contents |= {name: network.state_dict().values() for name, network in networks.items()}
        deciding = deciding_flags(self.flags | self.options.resolved(), **contents)
        self.parts = SampleParts(self.flags["log_dir"], deciding)
        if self.options.use_fp16:
            self.model.convert_to_fp16()
            if self.weak is not None:
                self.weak.convert_to_fp16()
        runs.open_folder(self.flags["log_dir"], self.flags)
        path = self.options.model_path
        logger.log(f"{path}: {describe_weights(path)}")
        logger.log(sampling.describe_sampler(self.diffusion, self.options))
        if guidance := describe_guidance(self.guidance, self.classifier):
            logger.log(guidance)
        compile_if_asked(self.compiled, *networks.values())

    def labels(self, indices: list[int]) -> dict[str, Tensor]:
        """The classes of samples as the argument ``y``, int64 [N]; {} for a model without."""
        if self.num_classes is None:
            return {}
        seed = self.flags["seed"]
        return {"y": class_labels(indices, self.classes, self.num_classes, seed)}

    def run(
        self,
        num_samples: int,
        conditions: Conditions | None = None,
        columns: Sequence[int] = (),
    ) -> None:
        """Make the samples that are missing, and write all.

        :param conditions: from global indices to the arguments of the model, N rows each; those of
            :meth:`labels` if None.
        :param columns: the classes of the grid's columns; () for a square.
        """
        conditions = conditions or self.labels

        def make(indices: list[int]) -> tuple[Tensor, Tensor | None]:
            given = conditions(indices)
            images = self._draw(indices, given)
            self._check_finite(images)
            return to_values(images, self.value_range), given.get("y")

        result = collect_samples(make, num_samples, self.options.batch_size, parts=self.parts)
        if result is not None:
            path = write_samples(
                self.flags["log_dir"],
                *result,
                classes=columns,
                class_names=self.class_names,
                save_png=self.options.save_png,
                value_range=self.value_range,
            )
            self.parts.remove()
            logger.log(f"sampling complete: {path}")

    def _check_finite(self, images: Tensor) -> None:
        """Warn once of images that are not finite; they come out black."""
        if self._all_finite and not images.isfinite().all():
            self._all_finite = False
            logger.warn(
                "WARNING: samples are not finite: lower the scale of guidance, or leave "
                "--use_fp16 out"
            )

    def _draw(self, indices: list[int], given: dict[str, Tensor]) -> Tensor:
        """The samples of the indices, float32 [N, C, H, W]."""
        kwargs = {name: value.to(dist_util.dev()) for name, value in given.items()}
        return sampling.draw_samples(
            self.guided,
            self.diffusion,
            indices,
            self.shape,
            self.options,
            self.flags["seed"],
            kwargs,
            None if self.classifier is None else self.classifier.cond_fn,
        )
