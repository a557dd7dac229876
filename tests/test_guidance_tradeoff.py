"""The measures of the trade that guidance makes mean what they say, and the comparison runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launchers import environment
from PIL import Image
from script_runner import load_module, start_script, succeed

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "guidance_tradeoff.py"


def precision_recall(samples, real):
    return load_module("benchmarks", "guidance_tradeoff").precision_recall(samples, real)


def test_precision_and_recall_of_samples_like_the_data_are_high():
    points = np.random.default_rng(0).standard_normal((400, 2))
    precision, recall = precision_recall(points[:200], points[200:])
    assert precision > 0.85
    assert recall > 0.85


def test_samples_that_are_all_alike_are_precise_and_recall_little():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 2))
    precision, recall = precision_recall(0.05 * rng.standard_normal((200, 2)), real)
    assert precision == 1
    assert recall < 0.1


def test_samples_that_are_spread_too_far_recall_and_are_not_precise():
    rng = np.random.default_rng(0)
    real = 0.05 * rng.standard_normal((200, 2))
    precision, recall = precision_recall(rng.standard_normal((200, 2)), real)
    assert precision < 0.1
    assert recall > 0.9


def test_quality_of_real_digits_is_that_of_the_data():
    module = load_module("benchmarks", "guidance_tradeoff")
    data, target = module.real_digits()
    images = (data * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    found = module.qualities(images, target)
    assert found["recognised"] > 0.99
    assert found["precision"] == found["recall"] == 1
    assert found["frechet"] < 0.1
    wrong = module.qualities(images, (target + 1) % 10)
    assert wrong["recognised"] < 0.01
    assert wrong["precision"] < 0.3  # of the class asked for


@pytest.mark.slow
def test_both_kinds_of_guidance_are_measured_over_the_scale(tmp_path, digits_dir):
    network = {"image_size": 8, "channels": 1, "noise_schedule": "cosine", "diffusion_steps": 50}
    unet = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": 4}
    run = {"data_dir": digits_dir, "ema_rate": 0.9, "batch_size": 16, "lr": 1e-3}
    labels = {"class_cond": True, "class_dropout": 0.1}
    train = {**network, **unet, **run, "train_steps": 5}
    for folder, more in (("cfg", labels), ("uncond", {})):
        done = start_script("image_train", train, more, cwd=tmp_path, log_dir=folder)
        succeed(done)
    half = {"classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": 4}
    done = start_script(
        "classifier_train",
        {**run, **half, "iterations": 5, "log_dir": "classifier"},
        cwd=tmp_path,
        classifier_for="uncond/ema_0.9_000005.pt",
    )
    succeed(done)
    words = [sys.executable, str(BENCHMARK), "--model_path", "cfg/ema_0.9_000005.pt"]
    words += ["--unconditional", "uncond/ema_0.9_000005.pt", "--scales", "0,3"]
    words += ["--classifier_path", "classifier/ema_0.9_000005.pt", "--samples", "60"]
    words += ["--out", "tradeoff.json", "--picture", "tradeoff.png"]
    subprocess.run(
        words, check=True, cwd=tmp_path, env=environment(), capture_output=True, timeout=600
    )
    result = json.loads((tmp_path / "tradeoff.json").read_text())
    for kind in ("classifier-free", "classifier"):
        assert [point["scale"] for point in result[kind]] == [0, 3]
        assert result[kind][0]["frechet"] != result[kind][1]["frechet"]
    assert result["real"]["recall"] > 0.7
    with Image.open(tmp_path / "tradeoff.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
