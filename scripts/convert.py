"""Convert a checkpoint: to safetensors, to and from diffusers, and try out what was made."""

import logging
import os
from dataclasses import dataclass

from improved_diffusion import interchange
from improved_diffusion.checkpoint import model_name
from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import (
    ArgumentParser,
    given_flags,
    make_parser,
    option,
    pick,
    require,
)
from improved_diffusion.interchange import FORMATS, Checkpoint, Kind
from improved_diffusion.network_comparison import Comparison
from improved_diffusion.safetensors_format import SUFFIX
from improved_diffusion.script_util import ModelAndDiffusionOptions, SuperResOptions


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and into what."""

    model_path: str = option(
        "", "checkpoint, .pt or .safetensors, or a folder of diffusers: a pipeline or a UNet2DModel"
    )
    to: str = option("", f"{', '.join(FORMATS)} (model000000.pt and config.json)")
    out: str = option("", "new folder; for safetensors a new file, NAME.safetensors")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError(
                "--model_path is missing: name a checkpoint, such as runs/x/ema_....pt, or a "
                "folder of diffusers"
            )
        require(self.to in FORMATS, "to", f"'{self.to}'", f"one of {', '.join(FORMATS)}")
        if not self.out or "://" in self.out:
            raise UserError(f"--out '{self.out}': name a new local folder or file")
        if os.path.lexists(self.out):
            raise UserError(f"--out {self.out} exists already: name a new folder or file")
        above = os.path.dirname(os.path.abspath(self.out))
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above):
            raise UserError(f"--out {self.out}: {above} is no folder: name a path in a folder")
        if self.to == "safetensors" and not self.out.endswith(SUFFIX):
            raise UserError(f"--out {self.out}: must end in {SUFFIX}, by which it is known again")


# Which script a network is for
USES: dict[Kind, str] = {
    ModelAndDiffusionOptions: "sample with image_sample.py --model_path",
    SuperResOptions: "sample with super_res_sample.py --model_path",
    ClassifierOptions: "guide with classifier_sample.py --classifier_path",
}


class Messages(logging.Handler):
    """Keeps what the package logs until all has gone well: an error comes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines:  # a network is made more than once
            self.lines.append(line)


def main() -> None:
    messages = Messages()
    logging.getLogger("improved_diffusion").addHandler(messages)
    parser = create_argparser()
    flags, given = vars(parser.parse_args()), given_flags(parser, None)
    options = pick(ConvertOptions, flags)
    source = interchange.read_checkpoint(options.model_path, flags, given - set(vars(options)))
    comparison = interchange.convert(source, options.to, options.out)
    print("\n".join(messages.lines + report(source, comparison, options)))


def report(source: Checkpoint, comparison: Comparison, options: ConvertOptions) -> list[str]:
    weights = sum(parameter.numel() for parameter in source.network.parameters())
    which = ", with noise for the weights that are 0" if comparison.of_noise else ""
    lines = [
        f"{options.model_path}: {interchange.KINDS[source.kind]}, {weights:,} weights",
        f"largest difference of the outputs{which}: {comparison.difference:.2g}, "
        f"{comparison.relative:.1e} of the largest",
        f"wrote {os.path.abspath(options.out)}",
    ]
    if options.to == "openai":
        lines.append(f"{USES[source.kind]} {os.path.join(options.out, model_name(0))}")
    return lines


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Convert a checkpoint into another format.",
        ConvertOptions,
        ModelAndDiffusionOptions,
        SuperResOptions,
        ClassifierOptions,
    )


if __name__ == "__main__":
    run_main(main)
