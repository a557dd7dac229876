"""docs/guidance.md: its commands and its example, one after the other; what it says of the code."""

import itertools
import re

import numpy as np
import pytest
from documents import missing_links, run_blocks
from script_runner import ROOT, load_module, samples

TEXT = (ROOT / "docs" / "guidance.md").read_text()
SCRIPTS = ("image_train", "image_sample", "super_res_sample", "classifier_train")

# what the example leaves behind is as it says
CHECKS = """
assert images.shape == bright.shape == score.shape == (10, 1, 8, 8)
assert bright.mean() > images.mean() + 0.1, (bright.mean(), images.mean())
assert led(images, torch.full((10,), 3), **y).shape == images.shape
"""


@pytest.mark.slow
def test_commands_run_in_order(tmp_path):
    run_blocks(TEXT, tmp_path, [*["sh"] * 4, "python"], CHECKS)
    names = ("scale3", "interval", "auto", "by_classifier")
    drawn = {name: samples(tmp_path / "runs" / name) for name in names}
    for images, labels in drawn.values():
        assert images.shape == (20, 8, 8, 1)
        assert labels.tolist() == list(range(10)) * 2
    for one, other in itertools.combinations(names, 2):
        difference = drawn[one][0].astype(int) - drawn[other][0]
        assert np.abs(difference).max() > 2, (one, other)


def test_flags_exist():
    known = {
        action.dest
        for name in (*SCRIPTS, "classifier_sample")
        for action in load_module("scripts", name).create_argparser()._actions
    }
    mentioned = set(re.findall(r"(?<![\w-])--(\w+)", TEXT))
    assert mentioned - known <= {"unconditional"}  # of the benchmark
    assert {name for name in known if name.startswith(("guid", "class_dropout"))} <= mentioned


def test_links_exist():
    assert missing_links(TEXT, ROOT / "docs") == []
