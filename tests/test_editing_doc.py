"""docs/editing.md: its commands and examples, one after the other; what it says of the code."""

import os
import re

import numpy as np
import pytest
from documents import missing_links, run_blocks
from PIL import Image
from script_runner import ROOT, load_module, succeed

from improved_diffusion.editing_options import EditOptions
from improved_diffusion.flags import defaults

TEXT = (ROOT / "docs" / "editing.md").read_text()
# as `make demo` trains, but for a moment only
DEMO = {
    "image_size": 8,
    "channels": 1,
    "class_cond": True,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "predict": "v",
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": 4,
    "batch_size": 16,
    "lr": 2e-3,
    "ema_rate": 0.99,
    "lr_anneal_steps": 10,
}


@pytest.mark.slow
def test_commands_run(tmp_path, digits_dir, run_script):
    demo = tmp_path / "runs" / "demo"
    succeed(
        run_script("image_train", DEMO, data_dir=digits_dir, log_dir=demo / "train", cwd=tmp_path)
    )
    (demo / "train" / "ema_0.99_000010.pt").rename(demo / "train" / "ema_0.99_001500.pt")
    (demo / "digits").symlink_to(digits_dir)
    run_blocks(TEXT, tmp_path, ["sh", "python", *["sh"] * 4, *["python"] * 2])
    counts = {"inpainting": 24, "variants": 24, "as_eights": 6, "reconstructed": 6}
    for folder, count in {**counts, "interpolation": 48}.items():
        assert len(os.listdir(tmp_path / "runs" / folder / "edited")) == count, folder
    for name in ("inpainting", "interpolation"):
        ours, made = (picture(place / "docs" / f"{name}.png") for place in (ROOT, tmp_path))
        assert made.shape == ours.shape
        if name == "inpainting":  # what was given, and what of it is hidden
            np.testing.assert_array_equal(made[:, :200], ours[:, :200])


def picture(path):
    with Image.open(path) as shown:
        return np.array(shown.convert("RGB"))


def test_flags_exist_and_all_of_the_script_are_mentioned():
    parser = load_module("scripts", "image_edit").create_argparser()
    known = {action.dest for action in parser._actions} | {"class_dropout"}
    mentioned = set(re.findall(r"(?<![\w-])--(\w+)", TEXT))
    assert mentioned <= known
    assert set(defaults(EditOptions)) - mentioned <= {"clip_denoised", "use_fp16"}


def test_links_exist():
    assert missing_links(TEXT, ROOT / "docs") == []
