"""Sample images from a checkpoint, into an npz file and a grid."""

import torch

from improved_diffusion import dist_util, logger, runs
from improved_diffusion.checkpoint import describe_weights
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, height_width, make_parser, pick
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
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options = pick(SampleOptions, flags)
    flags = runs.prepare_from_checkpoint(flags, given)
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    value_range = parse_value_range(flags["value_range"])
    check_sampler(model, diffusion, options, flags["timestep_respacing"])
    check_png(options.save_png, flags["channels"], value_range)
    classes = parse_classes(options.classes, model.num_classes, flags["class_names"])
    runs.load_for_evaluation(model, options.model_path)
    deciding = deciding_flags(flags | options.resolved(), model_path=model.state_dict().values())
    parts = SampleParts(flags["log_dir"], deciding)
    runs.open_folder(flags["log_dir"], flags)
    logger.log(f"{options.model_path}: {describe_weights(options.model_path)}")
    logger.log(describe_sampler(diffusion, options))

    def make(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (flags["channels"], *height_width(flags["image_size"]))
        labels, kwargs = None, {}
        if model.num_classes is not None:
            labels = class_labels(indices, classes, model.num_classes, flags["seed"])
            kwargs["y"] = labels.to(dist_util.dev())
        images = draw_samples(model, diffusion, indices, shape, options, flags["seed"], kwargs)
        return to_values(images, value_range), labels

    result = collect_samples(make, options.num_samples, options.batch_size, parts=parts)
    if result is not None:
        path = write_samples(
            flags["log_dir"],
            *result,
            classes=classes,
            class_names=flags["class_names"],
            save_png=options.save_png,
            value_range=value_range,
        )
        parts.remove()
        logger.log(f"sampling complete: {path}")


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Sample images from a checkpoint.", SampleOptions, ModelAndDiffusionOptions, runs.RunOptions
    )


if __name__ == "__main__":
    run_main(main)
