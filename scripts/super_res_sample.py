"""Upsample images by a super-resolution checkpoint, into an npz file and a grid."""

from dataclasses import dataclass

import torch

from improved_diffusion import dist_util, logger, runs
from improved_diffusion.base_samples import load_base_samples
from improved_diffusion.checkpoint import describe_weights
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import ArgumentParser, height_width, make_parser, option, pick
from improved_diffusion.pixels import parse_value_range
from improved_diffusion.same_job import deciding_flags
from improved_diffusion.sample_parts import SampleParts
from improved_diffusion.sample_util import (
    check_png,
    class_labels,
    collect_samples,
    parse_classes,
    to_values,
    write_samples,
)
from improved_diffusion.sampling import (
    SampleOptions,
    check_sampler,
    describe_sampler,
    draw_samples,
)
from improved_diffusion.script_util import (
    SuperResOptions,
    args_to_dict,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


@dataclass(frozen=True)
class BaseOptions:
    """What to upsample."""

    base_samples: str = option(
        "", "images to upsample, in turn: an npz of image_sample.py, a folder, or one picture"
    )
    num_samples: int = option(
        10000,
        "how many images to make, going through the given ones again and again; if not given, one "
        "for each of a folder or picture",
    )

    def __post_init__(self) -> None:
        if not self.base_samples:
            raise UserError("--base_samples is missing: name an npz file, a folder or a picture")


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options, base_path = pick(SampleOptions, flags), pick(BaseOptions, flags).base_samples
    flags = runs.prepare_from_checkpoint(flags, given)
    model, diffusion = sr_create_model_and_diffusion(
        **args_to_dict(flags, sr_model_and_diffusion_defaults())
    )
    value_range = parse_value_range(flags["value_range"])
    check_sampler(model, diffusion, options, flags["timestep_respacing"])
    check_png(options.save_png, flags["channels"], value_range)
    classes = parse_classes(options.classes, model.num_classes, flags["class_names"])
    runs.load_for_evaluation(model, options.model_path)
    base = load_base_samples(
        base_path,
        flags["small_size"],
        flags["channels"],
        want_labels=model.num_classes is not None and not classes,
        class_names=flags["class_names"],
        num_classes=model.num_classes or 0,
        value_range=value_range,
    )
    one_each = "num_samples" not in given and not base_path.endswith(".npz")
    num_samples = len(base.images) if one_each else options.num_samples
    given_images = [base.images] if base.labels is None else [base.images, base.labels]
    deciding = deciding_flags(
        flags | options.resolved(),
        model_path=model.state_dict().values(),
        base_samples=given_images,
    )
    parts = SampleParts(flags["log_dir"], deciding)
    runs.open_folder(flags["log_dir"], flags)
    logger.log(f"{options.model_path}: {describe_weights(options.model_path)}")
    logger.log(describe_sampler(diffusion, options))
    logger.log(f"upsampling {len(base.images)} images to {num_samples} samples")

    def make(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = torch.tensor(indices) % len(base.images)
        labels, kwargs = None, {"low_res": base.images[rows].to(dist_util.dev())}
        if model.num_classes is not None:
            labels = (
                base.labels[rows]
                if base.labels is not None
                else class_labels(indices, classes, model.num_classes, flags["seed"])
            )
            kwargs["y"] = labels.to(dist_util.dev())
        shape = (flags["channels"], *height_width(flags["large_size"]))
        images = draw_samples(model, diffusion, indices, shape, options, flags["seed"], kwargs)
        return to_values(images, value_range), labels

    result = collect_samples(make, num_samples, options.batch_size, parts=parts)
    if result is not None:
        path = write_samples(
            flags["log_dir"],
            *result,
            class_names=flags["class_names"],
            save_png=options.save_png,
            value_range=value_range,
        )
        parts.remove()
        logger.log(f"sampling complete: {path}")


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Upsample images by a super-resolution checkpoint.",
        BaseOptions,
        SampleOptions,
        SuperResOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
