"""docs/samplers.md: its commands and examples, one after the other; what it says of the code."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from analytic import Mixture
from golden_data import make_diffusion
from launchers import environment
from script_runner import ROOT, TINY_SUPER_RES, load_module, samples, succeed

from improved_diffusion.noise_levels import SPACINGS, noise_levels
from improved_diffusion.sampling import DEFAULT_SPACING, SampleOptions
from improved_diffusion.solvers import SOLVERS

TEXT = (ROOT / "docs" / "samplers.md").read_text()
SMALL = ["--num_samples", "10", "--batch_size", "10"]  # the last ones given count

# what the examples of the document leave behind is as it says
CHECKS = """
import numpy as np
with np.load("runs/dpmpp/samples_10x8x8x1.npz") as made:
    levels = ((images + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    difference = np.abs(made["arr_0"] - levels)
assert difference.max() < 1.01, difference.max()
assert sigmas.shape == (26,) and noise.shape == (1000, 1, 8, 8)
away = (again - images).abs().mean() / (images - images.roll(1, 0)).abs().mean()
assert away < 0.5, away  # a network that has hardly learned is rough
assert len(shown) == 8 and shown[0][0] == 80 and shown[-1][1] > shown[0][1]
assert abs(by_unipc.std() - 0.5) < 0.02 and abs(samples.std() - 0.5) < 0.05
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands():
    """The words of each command after ``python``, a backslash at a line's end joined."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines]
    assert all(line[0] == "python" for line in words)
    return [line[1:] for line in words]


@pytest.fixture(scope="module")
def session(tmp_path_factory, trained, digits_dir, run_script):
    """A folder in which the commands have run, with tiny checkpoints in place of the demo's."""
    folder = tmp_path_factory.mktemp("session")
    demo = folder / "runs" / "demo" / "train"
    shutil.copytree(trained.folder, demo)
    shutil.copyfile(trained.path, demo / "ema_0.99_001500.pt")
    flags = {**TINY_SUPER_RES, "large_size": 16, "small_size": 8, "class_cond": True}
    flags |= {"data_dir": digits_dir, "batch_size": 8, "ema_rate": 0.99, "lr_anneal_steps": 5}
    succeed(run_script("super_res_train", flags, cwd=folder, log_dir="runs/sr"))
    for path, *words in commands():
        words = [word.replace("500x8x8x1", "10x8x8x1") for word in words]
        name = re.fullmatch(r"scripts/(\w+)\.py", path)[1]
        succeed(run_script(name, *words, *SMALL, cwd=folder))
    return folder


def test_commands_make_images_of_their_own(session):
    made = {}
    for _, *words in commands():
        folder = words[words.index("--log_dir") + 1]
        made[folder] = samples(session / folder)[0]
    assert len(made) == len(commands()) == 7
    of_digits = [images for folder, images in made.items() if folder != "runs/upsampled"]
    assert made["runs/upsampled"].shape == (10, 16, 16, 1)
    for i, images in enumerate(of_digits):
        assert images.shape == (10, 8, 8, 1)
        assert all(np.abs(images - other.astype(int)).max() > 2 for other in of_digits[:i])


def test_examples_run_one_after_the_other(session):
    code = "\n".join(blocks("python")).replace(
        "samples.std())", "samples.std()); by_unipc = samples"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + CHECKS],
        cwd=session,
        env={**environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    evaluations, spread = done.stdout.split()
    assert evaluations == "15"
    assert spread.startswith("tensor(0.")


def rows(heading):
    """The cells of each row of the section's tables."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.+) \|$", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines if "`--" not in line[:3]]


def test_table_of_samplers_is_that_of_the_code():
    table = {cells[0].strip("`"): cells[1:] for cells in rows("Which") if cells[0] in names()}
    assert list(table) == list(DEFAULT_SPACING)
    assert {name: cells[3].strip("`") for name, cells in table.items()} == DEFAULT_SPACING


def names():
    return [f"`{name}`" for name in DEFAULT_SPACING]


def test_every_solver_is_in_the_document():
    for name in SOLVERS:
        assert f"`{name}`" in TEXT or f'"{name}"' in TEXT, name


def test_every_spacing_has_a_row():
    listed = [cells[0].strip("`") for cells in rows("Steps") if len(cells) == 3]
    assert set(listed) == set(SPACINGS)


def test_number_of_evaluations_is_as_the_table_says():
    table = {cells[0].strip("`"): cells[1] for cells in rows("Which") if cells[0] in names()}
    for name in set(DEFAULT_SPACING) & set(SOLVERS) - {"ode"}:
        seen = []

        def denoise(x, sigma, seen=seen):
            seen.append(sigma)
            return x / (1 + sigma**2)

        SOLVERS[name](denoise, torch.ones(1, 1), [5.0, 2.0, 1.0, 0.5, 0.0])
        assert len(seen) == {"S": 4, "2 S - 1": 7}[table[name]], name


def test_flags_exist_and_all_of_the_samplers_are_mentioned():
    parser = load_module("scripts", "image_sample").create_argparser()
    known = {action.dest for action in parser._actions}
    known |= {"base_samples", "predict", "zero_terminal_snr"}
    mentioned = set(re.findall(r"(?<![\w-])--(\w+)", TEXT))
    assert mentioned <= known
    own = set(inspect.signature(SampleOptions).parameters)
    assert own - mentioned <= {"save_png"}


def test_multistep_solvers_want_a_spacing_that_ends_gently():
    data = Mixture([0.3, 0.7], torch.tensor([[[[-0.6]]], [[[0.5]]]]), [0.1, 0.15])
    diffusion = make_diffusion(1000, schedule="cosine")
    x = 80 * torch.randn(200, 1, 1, 1, dtype=torch.float64)
    exact = SOLVERS["heun"](data, x, np.append(np.geomspace(80, 0.0064, 600), 0))

    def error(name, spacing):
        sigmas = noise_levels(diffusion, 20, spacing)
        sigmas = torch.cat([torch.tensor([80.0], dtype=torch.float64), sigmas[sigmas < 80]])
        return (SOLVERS[name](data, x, sigmas) - exact).square().mean().sqrt()

    for name in ("dpmpp_2m", "dpmpp_3m", "unipc"):
        for ends_roughly in ("leading", "linspace"):
            for gentle in ("log_snr", "karras", "trailing"):
                assert error(name, ends_roughly) > 1.2 * error(name, gentle), (name, gentle)
    assert error("euler", "linspace") < 1.5 * error("euler", "log_snr")


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
