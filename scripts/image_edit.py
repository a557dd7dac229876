"""Edit pictures by a checkpoint: fill in, vary, to the noise and back, interpolate."""

from improved_diffusion import logger, runs
from improved_diffusion.checkpoint import describe_weights
from improved_diffusion.compiling import CompileOptions, check_compiler, compile_if_asked
from improved_diffusion.dist_util import run_main
from improved_diffusion.editing_options import EditOptions, check_own_flags
from improved_diffusion.editing_results import check_folder, write_results
from improved_diffusion.editing_tasks import (
    Editor,
    check_guidance,
    load_given,
    refuse_others,
)
from improved_diffusion.flags import ArgumentParser, make_parser, pick
from improved_diffusion.guidance import GuidanceOptions, guided_model
from improved_diffusion.guides import describe_guidance, load_weak
from improved_diffusion.sample_util import collect_samples
from improved_diffusion.sampling import check_sampler
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options, guidance = pick(EditOptions, flags), pick(GuidanceOptions, flags)
    check_own_flags(options, given)
    flags = runs.prepare_from_checkpoint(flags, given)
    options = pick(EditOptions, flags)  # with the checkpoint's --labels_from
    refuse_others(options.model_path)
    editor = make_editor(options, guidance, flags)
    check_folder(flags["log_dir"], editor.given, flags)
    runs.open_folder(flags["log_dir"], flags)
    logger.log(f"{options.model_path}: {describe_weights(options.model_path)}")
    logger.log(editor.describe())
    if text := describe_guidance(guidance):
        logger.log(text)
    result = collect_samples(editor.make, editor.num_rows, options.batch_size)
    if result is not None:
        write_results(flags["log_dir"], options, editor.given, result[0])


def make_editor(options: EditOptions, guidance: GuidanceOptions, flags: runs.Flags) -> Editor:
    """Load the checkpoints and the pictures, and check that they and the flags fit together."""
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    respacing = flags["timestep_respacing"]
    sampling = options.sampling(respacing, flags["diffusion_steps"])
    check_sampler(model, diffusion, sampling, respacing)
    runs.load_for_evaluation(model, options.model_path)  # tells first what does not fit
    check_compiler(pick(CompileOptions, flags))
    weak = load_weak(flags, diffusion) if guidance.guide_path else None
    guided = guided_model(model, diffusion, guidance, weak)
    # a picture may go without a class if all networks know such
    null_class = model.null_class if weak is None or weak.null_class is not None else None
    given = load_given(options, flags, model.num_classes, null_class)
    check_guidance(given, null_class, guidance)
    if options.use_fp16:
        model.convert_to_fp16()
        if weak is not None:
            weak.convert_to_fp16()
    compile_if_asked(pick(CompileOptions, flags), model, weak)
    return Editor(guided, diffusion, options, sampling, given, flags["seed"])


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Edit pictures by a checkpoint.",
        EditOptions,
        GuidanceOptions,
        CompileOptions,
        ModelAndDiffusionOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
