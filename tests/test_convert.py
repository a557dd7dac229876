"""scripts/convert.py as a process: what it makes serves the other scripts, and what it refuses.

The library's part is in test_interchange.py.
"""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from documents import run_blocks
from PIL import Image
from script_runner import (
    ROOT,
    TINY,
    TINY_SUPER_RES,
    error_of,
    names,
    samples,
    succeed,
    tree,
)

from improved_diffusion.classifier_options import classifier_defaults
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    SuperResOptions,
    create_classifier,
)

pytest.importorskip("diffusers")

CLASSIFIER = {"image_size": 8, "channels": 1, "classifier_width": 32, "classifier_depth": 1}
CLASSIFIER |= {"classifier_attention_resolutions": "4", "classifier_num_head_channels": 32}


def random_checkpoint(folder, **flags):
    """A network of random weights and its flags, for images of 8 x 8 grey pixels."""
    chosen = ModelAndDiffusionOptions(**{**TINY, "attention_resolutions": "4", **flags})
    torch.manual_seed(0)
    state = {key: 0.1 * torch.randn(v.shape) for key, v in chosen.model().state_dict().items()}
    folder.mkdir()
    torch.save(state, folder / "model000001.pt")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(chosen)))
    return state


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert").resolve()
    random_checkpoint(folder / "run", rescale_timesteps=False, class_cond=True, num_classes=3)
    random_checkpoint(folder / "scaled")
    random_checkpoint(folder / "flow", predict="flow", noise_schedule="linear")
    (folder / "sr").mkdir()
    shutil.copy(folder / "run" / "model000001.pt", folder / "sr")
    small = {**TINY_SUPER_RES, "attention_resolutions": "4"}
    (folder / "sr" / "config.json").write_text(json.dumps(small))
    (folder / "classifier").mkdir()
    flags = {**classifier_defaults(), **CLASSIFIER, "num_classes": 3}
    torch.save(create_classifier(**flags).state_dict(), folder / "classifier" / "model000001.pt")
    process = {"diffusion_steps": 30, "noise_schedule": "cosine"}
    (folder / "classifier" / "config.json").write_text(json.dumps({**flags, **process}))
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (folder / "file").write_text("")
    (folder / "notes.txt").write_text("hello")
    return folder


@pytest.fixture
def convert(run_script, workplace):
    def run(path, to, out, **flags):
        return run_script("convert", cwd=workplace, model_path=path, to=to, out=out, **flags)

    return run


def sample(run_script, folder, path, out, **flags):
    """The images that a checkpoint makes."""
    done = run_script(
        "image_sample", cwd=folder, model_path=path, log_dir=out, num_samples=4, **flags
    )
    succeed(done)
    return samples(folder / out)[0]


@pytest.mark.slow
def test_the_same_samples_after_diffusers_and_back(workplace, convert, run_script):
    done = succeed(convert("run/model000001.pt", "diffusers", "made/pipeline"))
    assert "diffusion model" in done.stdout
    relative = re.search(r"difference of the outputs: .*, (\S+) of the largest", done.stdout)
    assert 0 < float(relative[1]) < 1e-5
    assert done.stdout.splitlines()[-1] == f"wrote {workplace / 'made' / 'pipeline'}"
    assert names(workplace / "made") == ["pipeline"]
    assert {"model_index.json", "unet", "scheduler"} <= set(names(workplace / "made" / "pipeline"))

    done = succeed(convert("made/pipeline", "openai", "made/back"))
    assert names(workplace / "made" / "back") == ["config.json", "model000000.pt"]
    assert "sample with image_sample.py --model_path made/back/model000000.pt" in done.stdout
    before = sample(run_script, workplace, "run/model000001.pt", "before", classes="all")
    after = sample(run_script, workplace, "made/back/model000000.pt", "after", classes="all")
    assert before.std() > 10
    assert np.array_equal(before, after)


def test_samples_from_a_safetensors_file_alone(workplace, convert, run_script, tmp_path):
    succeed(convert("scaled/model000001.pt", "safetensors", str(tmp_path / "a.safetensors")))
    assert names(tmp_path) == ["a.safetensors"]
    before = sample(run_script, workplace, "scaled/model000001.pt", "scaled_before")
    after = sample(run_script, tmp_path, "a.safetensors", "after")
    assert np.array_equal(before, after)
    flags = {"model_path": "a.safetensors", "log_dir": "no", "num_channels": 64}
    line = error_of(run_script("image_sample", flags, cwd=tmp_path))
    assert "--num_channels 64 contradicts" in line
    assert "(a.safetensors)" in line


@pytest.mark.parametrize("kind", ["classifier"])
@pytest.mark.parametrize("to", ["safetensors", "openai"])
def test_other_networks_become_other_files(workplace, convert, tmp_path, kind, to):
    out = tmp_path / ("a.safetensors" if to == "safetensors" else "a")
    done = succeed(convert(f"{kind}/model000001.pt", to, str(out)))
    assert f"{kind}, " in done.stdout
    assert "outputs: 0, 0.0e+00 of" in done.stdout
    use = f"guide with classifier_sample.py --classifier_path {out}/model000000.pt\n"
    assert (use in done.stdout) == (to == "openai")


def test_untrained_network_of_super_resolution(workplace, convert, tmp_path):
    """Its outputs are 0, which is said, and it is for another script."""
    chosen = SuperResOptions(**{**TINY_SUPER_RES, "attention_resolutions": "4"})
    torch.save(chosen.model().state_dict(), tmp_path / "model000001.pt")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(chosen)))
    done = succeed(convert(str(tmp_path / "model000001.pt"), "openai", str(tmp_path / "a")))
    assert "outputs are 0 everywhere" in done.stdout
    assert "outputs, with noise for the weights that are 0: 0, 0.0e+00 of" in done.stdout
    use = f"sample with super_res_sample.py --model_path {tmp_path}/a/model000000.pt"
    assert done.stdout.splitlines()[-1] == use
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["converted_from"] == "model000001.pt"


def test_flags_may_be_given_where_none_are_stored(workplace, convert, tmp_path):
    shutil.copy(workplace / "scaled" / "model000001.pt", tmp_path)
    done = succeed(convert(str(tmp_path / "model000001.pt"), "openai", str(tmp_path / "a"), **TINY))
    assert done.stdout.startswith("no config.json beside the checkpoint")
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored.items() >= {**TINY, "attention_resolutions": "4"}.items()


@pytest.mark.parametrize(
    ("path", "to", "out", "flags", "words"),
    [
        ("", "openai", "new", {}, ["--model_path is missing"]),
        ("run/model000001.pt", "onnx", "new", {}, ["--to 'onnx'", "safetensors, diffusers"]),
        ("run/model000001.pt", "openai", "", {}, ["--out ''"]),
        ("run/model000001.pt", "openai", "file", {}, ["--out file exists already"]),
        ("run/model000001.pt", "openai", "run", {}, ["--out run exists already"]),
        ("run/model000001.pt", "safetensors", "new.pt", {}, ["--out new.pt", ".safetensors"]),
        ("run/model000001.pt", "openai", "file/x", {}, ["--out file/x", "file is no folder"]),
        ("no.pt", "openai", "new", {}, ["'no.pt' does not exist"]),
        ("notes.txt", "openai", "new", {}, ["notes.txt", "does not begin as", "torch.save"]),
        ("unet", "openai", "new", {"large_size": 8}, ["--large_size is no flag of a diffusion"]),
        ("run", "openai", "new", {}, ["--model_path run", "a file in it"]),
        ("broken.safetensors", "openai", "new", {}, ["broken.safetensors", "damaged"]),
        ("unet", "openai", "new", {}, ["UNet2DConditionModel"]),
        ("run/model000001.pt", "openai", "new", {"num_channels": 64}, ["--num_channels 64"]),
        ("scaled/model000001.pt", "diffusers", "new", {}, ["--rescale_timesteps True"]),
        ("flow/model000001.pt", "diffusers", "new", {}, ["--predict flow"]),
        ("classifier/model000001.pt", "diffusers", "new", {}, ["a classifier has no counterpart"]),
        ("sr/model000001.pt", "openai", "new", {}, ["sr/model000001.pt", "input channels"]),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(workplace, convert, path, to, out, flags, words):
    before = tree(workplace)
    line = error_of(convert(path, to, out, **flags))
    assert all(word in line for word in words), line
    assert tree(workplace) == before


@pytest.mark.slow
def test_commands_of_the_document_run(tmp_path):
    text = (ROOT / "docs" / "interchange.md").read_text()
    run_blocks(text, tmp_path, ["sh", "python", "sh"])
    back, file = (samples(tmp_path / "runs" / name)[0] for name in ("back_samples", "file_samples"))
    assert np.array_equal(back, file)
    with Image.open(tmp_path / "runs" / "digit.png") as image:
        assert image.size == (8, 8)
