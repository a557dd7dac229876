"""The README's commands, in order, as a newcomer would type them."""

import gzip
import json
import re
from pathlib import Path

import pytest
from documents import missing_links, run_blocks
from golden_data import GOLDEN, load_json

from improved_diffusion.flags import make_parser
from improved_diffusion.script_util import (
    ClassifierOptions,
    ModelAndDiffusionOptions,
    SuperResOptions,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_commands_run(tmp_path):
    run_blocks(README, tmp_path, [*["sh"] * 9, "python"])
    runs = tmp_path / "runs"
    for promised in (
        "few_steps/samples_20x8x8x1.npz",
        "guided/samples_20x8x8x1.npz",
        "edits/grid.png",
        "pipeline/unet/config.json",
        "nll/nll.json",
        "digits/config.json",
        "digits/log.txt",
        "digits/progress.csv",
        "digits/progress.json",
        "digits/model000020.pt",
        "digits/opt000020.pt",
        "samples/samples_20x8x8x1.npz",
        "samples/grid.png",
        "samples/png/000007_7.png",
        "nll/nll_images.npz",
        "sr_samples/samples_4x16x16x1.npz",
    ):
        assert (runs / promised).is_file(), promised


def test_links_and_modules_exist():
    assert missing_links(README, ROOT) == []
    listed = set(re.findall(r"`(\w+)`", README.split("## Map")[1].split("## Published")[0]))
    modules = {
        path.stem
        for path in (ROOT / "improved_diffusion").glob("*.py")
        if not path.stem.startswith("_")
    }
    assert modules - listed == set()


def published():
    """(name, flags) of every row of a table of published checkpoints."""
    return re.findall(r"^\| ([^|]+) \| `(--[^`]+)` \|$", README, flags=re.MULTILINE)


def test_published_flags_build_the_published_networks():
    manifests = load_json("state_dicts.json")
    rows = published()[: len(manifests)]
    for (name, flags), manifest in zip(rows, manifests.values(), strict=True):
        options = SuperResOptions if "--large_size" in flags else ModelAndDiffusionOptions
        args = vars(make_parser("", options).parse_args(flags.split()))
        for key, value in manifest["arguments"].items():
            assert args[key] == value, f"{name}: {key}"


def test_flags_of_guided_diffusion_build_its_networks():
    manifests = json.loads(gzip.decompress((GOLDEN / "guided_manifests.json.gz").read_bytes()))
    rows = dict(published()[-len(manifests) :])
    assert rows.keys() == manifests.keys()
    kinds = {"diffusion": ModelAndDiffusionOptions, "upsampler": SuperResOptions}
    for name, manifest in manifests.items():
        options = kinds.get(manifest["kind"], ClassifierOptions)
        parser = make_parser("", options)
        ours, theirs = (parser.parse_args(f.split()) for f in (rows[name], manifest["flags"]))
        theirs.noise_schedule = ours.noise_schedule  # makes no key
        assert vars(ours) == vars(theirs), name
