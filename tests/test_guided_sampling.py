"""Guided samples by the scripts: what leads them, what may lead them, and what is refused."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from launchers import start
from script_runner import (
    TINY,
    TINY_SUPER_RES,
    command_line,
    error_of,
    names,
    samples,
    script_environment,
    script_path,
    succeed,
    tree,
)

from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.errors import UserError
from improved_diffusion.flags import defaults, pick
from improved_diffusion.guidance import Autoguidance, ClassifierFree, GuidanceOptions
from improved_diffusion.guides import (
    Classifier,
    describe_guidance,
    load_classifier,
    load_weak,
)
from improved_diffusion.sample_util import to_uint8
from improved_diffusion.sampling import SAMPLERS, SampleOptions, draw_samples
from improved_diffusion.script_util import ModelAndDiffusionOptions

FREE, PLAIN, OTHER = "free/ema_0.5_000008.pt", "plain/ema_0.5_000008.pt", "other/ema_0.9_000008.pt"
WEAK, UPSAMPLER, LED_BY = "weak/weights.pt", "sr/ema_0.5_000004.pt", "led_by/ema_0.5_000060.pt"
TRAIN = {"lr": 1e-2, "batch_size": 8, "ema_rate": 0.5}
CLASSIFIER = {
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": 4,
    "classifier_num_head_channels": 16,
}
JOB = {"num_samples": 5, "classes": "all", "sampler": "dpmpp_2m", "steps": 4}
FREE_JOB = {**JOB, "model_path": FREE, "guidance_scale": 4}
WEAK_JOB = {**JOB, "model_path": FREE, "guidance_scale": 4, "guide_path": WEAK}
LED_JOB = {**JOB, "model_path": PLAIN, "classifier_path": LED_BY, "classifier_scale": 4}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, digits_dir, run_script, trained):
    """A folder with runs of 8 steps or so: do not write to them.

    ``free`` knows images without a class, ``weak`` is a narrower one that has learned nothing,
    ``other`` knows none, ``plain`` knows no classes, ``led_by`` is a classifier for it, ``sr``
    upsamples.
    """
    folder = tmp_path_factory.mktemp("guided").resolve()
    flags = {**TINY, **TRAIN, "data_dir": digits_dir}

    def train(name, *parts, steps, script="image_train"):
        own = {**flags, "log_dir": name, "train_steps": steps}
        succeed(run_script(script, own, *parts, cwd=folder))

    classes = {"class_cond": True, "class_dropout": 0.5}
    train("free", classes, {"learn_sigma": True}, steps=8)
    train("plain", steps=8)
    flags = {**TRAIN, "data_dir": digits_dir, "classifier_for": PLAIN, **CLASSIFIER}
    train("led_by", {"lr": 3e-3}, steps=60, script="classifier_train")
    flags = {**TINY_SUPER_RES, **TRAIN, "data_dir": digits_dir, **classes}
    train("sr", steps=4, script="super_res_train")
    shutil.copytree(trained.folder, folder / "other")
    write_weak(folder / "weak", json.loads((folder / "free" / "config.json").read_text()))
    return folder


def write_weak(folder, flags):
    """A network of random weights, with its flags beside it."""
    flags |= {"channel_mult": "1,1", "learn_sigma": False}
    torch.manual_seed(0)
    model = pick(ModelAndDiffusionOptions, flags).model()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    folder.mkdir()
    torch.save(model.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(flags))


@pytest.fixture
def sample(workplace, run_script, tmp_path):
    """Sample into a folder by name, by the script that the flags are of; images and labels."""

    def run(name, *parts, **flags):
        given = {key: value for part in (*parts, flags) for key, value in part.items()}
        script = "classifier_sample" if "classifier_path" in given else "image_sample"
        script = "super_res_sample" if "base_samples" in given else script
        out = tmp_path / name
        run.done = succeed(run_script(script, *parts, flags, log_dir=out, cwd=workplace))
        return samples(out)

    return run


def assert_same_images(a, b):
    """Equal but for truncation of what rounding moved across a level."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def assert_other_images(a, b):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() > 3


# -- what the flags do ----------------------------------------------------------------------------


def test_a_scale_of_one_is_no_guidance_to_the_bit(sample):
    plain, labels = sample("plain", JOB, model_path=FREE)
    images, same_labels = sample("one", JOB, model_path=FREE, guidance_scale=1)
    assert images.tobytes() == plain.tobytes()
    assert labels.tolist() == same_labels.tolist() == [0, 1, 2, 3, 4]
    assert "guidance" not in sample.done.stdout


def test_a_classifier_of_scale_zero_leaves_the_images_alone(sample):
    plain, labels = sample("plain", {**JOB, "classes": ""}, model_path=PLAIN)
    assert labels is None
    images, labels = sample("zero", {**LED_JOB, "classes": ""}, classifier_scale=0)
    assert_same_images(images, plain)
    assert labels.tolist() != sorted(labels.tolist())  # at random, over the classifier's classes
    assert set(labels.tolist()) <= set(range(10))


def load(workplace, path, **changes):
    """The network and the process of a checkpoint."""
    flags = json.loads((workplace / path).parent.joinpath("config.json").read_text())
    options = pick(ModelAndDiffusionOptions, {**flags, **changes})
    model = options.model()
    model.load_state_dict(torch.load(workplace / path))
    return model.eval(), options.diffusion()


def test_the_script_makes_what_the_wrappers_make(workplace, sample):
    model, diffusion = load(workplace, FREE)
    weak, _ = load(workplace, WEAK)
    how = {"interval": (0.1, 3.0), "rescale": 0.5}
    assert model.null_class == 10
    wrappers = {
        "free": ClassifierFree(model, diffusion, 4.0, 10, **how),
        "weak": Autoguidance(model, weak, diffusion, 4.0, **how),
    }
    own = {"guidance_interval": "0.1,3", "guidance_rescale": 0.5}
    options = SampleOptions(sampler="dpmpp_2m", steps=4)
    for name, flags in (("free", FREE_JOB), ("weak", WEAK_JOB)):
        images, labels = sample(name, flags, own)
        y = {"y": torch.from_numpy(labels)}
        made = draw_samples(wrappers[name], diffusion, range(5), (1, 8, 8), options, 0, y)
        assert_same_images(images, to_uint8(made).numpy())
        assert images.std() > 10


@pytest.mark.parametrize(
    ("flags", "others"),
    [
        (FREE_JOB, [{"guidance_scale": 2}, {"guidance_interval": "0.1,1"}]),
        (FREE_JOB, [{"guidance_rescale": 0.7}, {"guide_path": WEAK}, {"sampler": "ddim"}]),
        (LED_JOB, [{"classifier_scale": 8}, {"sampler": "ddim"}, {"classes": "5,6"}]),
        ({**LED_JOB, "model_path": FREE}, [{"guidance_scale": 3}, {"classifier_scale": 0}]),
    ],
)
def test_each_flag_makes_other_images(sample, flags, others):
    images, _ = sample("one", flags)
    for other in others:
        assert_other_images(sample("other", flags, other)[0], images)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_follows_the_gradient_of_each_sample(sampler):
    """A model of no images, pushed to brighter or darker ones by the label."""

    def model(x, t, y):
        return 0.7 * x

    def cond_fn(x, t, y):
        return torch.full_like(x, 0.2) * y.view(-1, 1, 1, 1)

    options = SampleOptions(sampler=sampler, steps=0 if sampler == "ode" else 6)
    diffusion = ModelAndDiffusionOptions(diffusion_steps=30, noise_schedule="cosine").diffusion()
    y = {"y": torch.tensor([2, 0, -2])}
    arguments = (model, diffusion, [7, 8, 9], (1, 4, 4), options, 0, y)
    push = (draw_samples(*arguments, cond_fn) - draw_samples(*arguments)).mean(dim=(1, 2, 3))
    assert push[0] > 0.02
    assert push[1] == pytest.approx(0, abs=1e-6)
    assert push[2] < -0.02


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", pytest.param("heun", marks=pytest.mark.slow)])
def test_a_classifier_gets_what_it_asks_for(workplace, sample, sampler):
    """Of images that it leads it is surer, by every form of the gradient."""
    flags = json.loads((workplace / "led_by" / "config.json").read_text())
    classifier = pick(ClassifierOptions, flags).model()
    classifier.load_state_dict(torch.load(workplace / LED_BY))

    def surety(scale):
        own = {"sampler": sampler, "steps": 6, "num_samples": 20, "classifier_scale": scale}
        images, labels = sample(f"{scale}", {**LED_JOB, **own})
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        log_p = classifier.eval()(x, torch.zeros(len(x))).log_softmax(dim=1)
        return log_p[range(len(x)), labels].mean().item()

    unled, led = surety(0), surety(20)
    assert led > unled + 0.1, (led, unled)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (FREE_JOB, "guidance classifier-free, scale 4\n"),
        (WEAK_JOB, f"guidance away from {WEAK}, scale 4\n"),
        (LED_JOB, f"guidance by the classifier {LED_BY}, scale 4\n"),
    ],
)
def test_any_batch_makes_the_same_images_and_the_log_says_how(sample, flags, said):
    images, labels = sample("all", flags)
    assert said in sample.done.stdout
    assert "guidance" not in sample.done.stdout.replace(said, "")
    by_two, same_labels = sample("two", flags, batch_size=2)
    assert_same_images(by_two, images)
    assert labels.tolist() == same_labels.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc", "sde", "ancestral", "ode"])
@pytest.mark.parametrize("flags", [FREE_JOB, WEAK_JOB, LED_JOB], ids=["free", "weak", "led"])
def test_any_batch_makes_the_same_images_by_all_samplers(sample, flags, sampler):
    own = {"sampler": sampler, "steps": 5}
    if sampler == "ode":
        own = {"sampler": sampler, "steps": 0, "ode_tolerance": 0.1, "num_samples": 3}
    images, _ = sample("all", flags, own)
    assert_same_images(sample("two", flags, own, batch_size=2)[0], images)


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(workplace, tmp_path):
    """Guided by everything at once."""
    flags = {**WEAK_JOB, "classifier_path": LED_BY, "classifier_scale": 4}
    made = []
    for launcher, batch_size in (("torchrun", 2), ("single", 5)):
        own = {"log_dir": tmp_path / launcher, "batch_size": batch_size}
        words = [script_path("classifier_sample"), *command_line(flags, own)]
        succeed(start(launcher, *words, cwd=workplace, env=script_environment()))
        made.append(samples(tmp_path / launcher))
    assert_same_images(made[0][0], made[1][0])
    assert made[0][1].tolist() == made[1][1].tolist()


def test_upsampled_images_are_guided_too(workplace, sample, tmp_path):
    np.savez(tmp_path / "base.npz", np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1) * 8)
    own = {**JOB, "model_path": UPSAMPLER, "base_samples": tmp_path / "base.npz"}
    images, labels = sample("plain", own)
    guided, same_labels = sample("guided", own, guidance_scale=4)
    assert labels.tolist() == same_labels.tolist()
    assert_other_images(guided, images)
    weak = {**own, "guidance_scale": 4, "guide_path": "sr/ema_0.5_000000.pt"}
    assert_other_images(sample("weak", weak)[0], guided)
    assert_same_images(sample("batch", weak, batch_size=2)[0], samples(tmp_path / "weak")[0])


@pytest.mark.parametrize(
    ("flags", "half"),
    [
        ({**JOB, "model_path": FREE}, {"use_fp16": True}),
        ({**WEAK_JOB, "guidance_scale": 1.5}, {"use_fp16": True}),
        ({**LED_JOB, "classifier_scale": 50}, {"classifier_use_fp16": True}),
    ],
)
def test_half_precision_makes_nearly_the_same_images(sample, flags, half):
    images, halved = (sample(str(own), flags, own)[0].astype(int) for own in ({}, half))
    assert 0 < np.abs(images - halved).max() < 40
    assert np.abs(images - halved).mean() < 2


def test_guidance_in_words():
    words = describe_guidance(
        GuidanceOptions(
            guidance_scale=2.5, guidance_interval="0.2,5", guidance_rescale=0.7, guide_path="a.pt"
        ),
        Classifier("b.pt", None, {}, (), 0.5),
    )
    assert words == (
        "guidance away from a.pt, scale 2.5, at sigma 0.2 to 5, rescaled by 0.7; and by the "
        "classifier b.pt, scale 0.5"
    )
    assert describe_guidance(GuidanceOptions()) == ""


# -- flags of the second network ------------------------------------------------------------------


def copy(workplace, folder, source, name=None, **changes):
    """A checkpoint in a folder of its own, with other flags beside it; None drops one."""
    folder.mkdir()
    shutil.copy(workplace / source, folder / (name or os.path.basename(source)))
    path = (workplace / source).parent / "config.json"
    flags = {**json.loads(path.read_text()), **changes}
    flags = {name: value for name, value in flags.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(flags))
    return folder / (name or os.path.basename(source))


def test_a_classifier_without_flags_is_taken_to_be_of_the_model(workplace, sample, tmp_path):
    """As published ones are: its own flags are given."""
    images, labels = sample("known", LED_JOB)
    shutil.copy(workplace / LED_BY, tmp_path / "alone.pt")
    own = {**LED_JOB, **CLASSIFIER, "classifier_path": tmp_path / "alone.pt", "num_classes": 10}
    same, same_labels = sample("alone", own)
    assert_same_images(same, images)
    assert labels.tolist() == same_labels.tolist()
    said = "alone.pt: its flags are those given and the defaults, such as --classifier_width 32"
    assert said in sample.done.stdout


def test_a_weak_model_without_flags_is_taken_to_be_like_the_model(workplace, sample, tmp_path):
    path = tmp_path / "alone.pt"
    shutil.copy(workplace / "free/ema_0.5_000000.pt", path)
    images, _ = sample("known", {**WEAK_JOB, "guide_path": "free/ema_0.5_000000.pt"})
    assert_same_images(sample("alone", {**WEAK_JOB, "guide_path": path})[0], images)
    assert f"no config.json beside --guide_path {path}" in sample.done.stdout


def test_a_classifier_of_clean_images_is_warned_of(workplace, sample, tmp_path):
    path = copy(workplace, tmp_path / "clean", LED_BY, noised=False)
    sample("out", {**LED_JOB, "classifier_path": path})
    assert f"{path} was trained on images without noise (--noised False)" in sample.done.stdout
    sample("out", LED_JOB)
    assert "without noise" not in sample.done.stdout


def test_the_flags_of_all_networks_are_stored(workplace, sample, tmp_path):
    sample("led", LED_JOB)
    flags = json.loads((tmp_path / "led" / "classifier_sample.json").read_text())
    assert flags["classifier_width"] == 32
    assert flags["num_classes"] == 10
    assert flags["class_names"] == [str(digit) for digit in range(10)]
    sample("png", LED_JOB, save_png=True)
    assert names(tmp_path / "png" / "png")[3] == "000003_3.png"


# -- a job that was cut off -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "others"),
    [
        (
            "image_sample",
            WEAK_JOB,
            {
                "guidance_scale": (2, "--guidance_scale 4.0, not --guidance_scale 2.0"),
                "guidance_rescale": (0.5, "--guidance_rescale 0.0, not --guidance_rescale 0.5"),
                "guide_path": ("free/ema_0.5_000000.pt", "--guide_path free/ema_0.5_000000.pt"),
            },
        ),
        (
            "classifier_sample",
            LED_JOB,
            {
                "classifier_scale": (2, "--classifier_scale 4.0, not --classifier_scale 2.0"),
                "classifier_path": ("led_by/model000060.pt", "not --classifier_path led_by/model"),
            },
        ),
    ],
)
def test_a_job_goes_on_by_the_same_command_alone(
    workplace, sample, run_script, tmp_path, script, flags, others
):
    images, labels = sample("whole", flags)
    own = {**flags, "batch_size": 2, "log_dir": tmp_path / "out"}
    env = {"SCRIPT": script, "FAULT": "after 000002-000004.npz"}
    assert run_script("faulty_sample", own, cwd=workplace, env=env).returncode == -signal.SIGKILL
    before = tree(tmp_path / "out")
    for name, (value, said) in others.items():
        assert said in error_of(run_script(script, {**own, name: value}, cwd=workplace))
    assert tree(tmp_path / "out") == before
    done = succeed(run_script(script, own, cwd=workplace))
    assert "going on: 4 of 5 samples" in done.stdout
    assert_same_images(samples(tmp_path / "out")[0], images)
    assert samples(tmp_path / "out")[1].tolist() == labels.tolist()


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def refused(workplace, run_script, tmp_path):
    """Run a script that must end in one line and leave nothing; the line."""

    def run(*parts, script=None, **flags):
        given = {key: value for part in (*parts, flags) for key, value in part.items()}
        by_classifier = "classifier_path" in given
        script = script or ("classifier_sample" if by_classifier else "image_sample")
        before = names(tmp_path)
        out = tmp_path / "out"
        line = error_of(run_script(script, *parts, flags, log_dir=out, cwd=workplace))
        assert names(tmp_path) == before
        return line

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model_path": OTHER, "guidance_scale": 3}, ["--guidance_scale 3", "--class_dropout"]),
        ({"model_path": PLAIN, "classes": "", "guidance_scale": 3}, ["--guidance_scale 3", "clas"]),
        ({"guidance_scale": 1, "guide_path": WEAK}, [f"--guide_path {WEAK}", "--guidance_scale"]),
        ({"guidance_interval": "3,1"}, ["--guidance_interval 3,1"]),
        ({"classes": "10"}, ["--classes 10", "0 ... 9"]),  # the null class is none to ask for
        ({"guide_path": "gone.pt"}, ["gone.pt", "does not exist"]),
        ({"model_path": PLAIN, "classes": "", "guide_path": WEAK}, ["--class_cond True"]),
        ({"guide_path": "free"}, ["--guide_path free is a folder", FREE]),
        ({"model_path": "free"}, ["--model_path free is a folder", FREE]),
        ({"guide_path": LED_BY}, [LED_BY, "classifier"]),
        ({"guide_path": UPSAMPLER}, [f"--guide_path {UPSAMPLER}", "super-resolution"]),
        ({"model_path": LED_BY, "classes": ""}, [LED_BY, "classifier", "classifier_sample.py"]),
    ],
)
def test_guidance_that_cannot_be(refused, flags, words):
    line = refused(FREE_JOB, flags)
    assert all(word in line for word in words), line


OTHERS = [
    ({"image_size": 16}, ["--image_size 16", "--image_size 8"]),
    ({"image_size": [8, 16]}, ["--image_size 8x16", "--image_size 8"]),
    ({"channels": 3}, ["--channels 3", "--channels 1"]),
    ({"value_range": "0,4095"}, ["--value_range 0,4095", "--value_range ''"]),
    ({"noise_schedule": "linear"}, ["--noise_schedule linear", "--noise_schedule cosine"]),
    ({"betas": "0.1," * 29 + "0.1", "noise_schedule": "linear"}, ["--betas 0.1,", "--betas ''"]),
    ({"diffusion_steps": 40}, ["--diffusion_steps 40", "--diffusion_steps 30"]),
    ({"rescale_timesteps": False}, ["--rescale_timesteps False", "--rescale_timesteps True"]),
    ({"num_classes": 7}, ["--num_classes 7", "--num_classes 10"]),
]


def flags_of(workplace, path, *others, **flags):
    """All flags of a script that samples from a checkpoint, and the checkpoint's process."""
    stored = json.loads((workplace / path).parent.joinpath("config.json").read_text())
    known = [defaults(cls) for cls in (ModelAndDiffusionOptions, ClassifierOptions, *others)]
    known = {name: value for own in known for name, value in own.items()}
    merged = {**known, **stored, "model_path": str(workplace / path), "class_names": [], **flags}
    if "class_names" not in flags:
        merged["class_names"] = stored["class_names"]
    return merged, pick(ModelAndDiffusionOptions, merged).diffusion()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *OTHERS,
        ({"predict": "v"}, ["--predict v", "--predict eps"]),
        ({"predict_xstart": True}, ["--predict xstart", "--predict eps"]),
        ({"predict": "flow", "noise_schedule": "linear"}, ["--noise_schedule linear_path"]),
    ],
)
def test_a_weak_model_of_other_images_or_another_process(workplace, tmp_path, changes, words):
    path = str(copy(workplace, tmp_path / "changed", WEAK, **changes))
    flags, diffusion = flags_of(workplace, FREE, guide_path=path)
    with pytest.raises(UserError) as error:
        load_weak(flags, diffusion)
    line = str(error.value)
    assert line.startswith(f"--guide_path {path} was trained with ")
    theirs, ours = line.split(", but --model_path ")
    assert words[0] in theirs
    assert all(word in ours for word in words[1:]), line


def test_a_weak_model_may_differ_in_its_network_and_its_variance(workplace):
    """``free`` learned its variance; ``weak`` did not, and has other widths."""
    flags, diffusion = flags_of(workplace, FREE, guide_path=str(workplace / WEAK))
    weak = load_weak(flags, diffusion)
    assert (weak.out_channels, weak.channel_mult, weak.null_class) == (1, (1, 1), 10)
    assert not any(param.requires_grad for param in weak.parameters())
    respaced = {**flags, "timestep_respacing": "5"}
    load_weak(respaced, pick(ModelAndDiffusionOptions, respaced).diffusion())


def test_a_weak_model_without_classes_stands_for_the_null_class(sample):
    free, _ = sample("plain", FREE_JOB, guidance_scale=1)
    led, labels = sample("led", FREE_JOB, guide_path=PLAIN)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert np.abs(led.astype(int) - free).max() > 2


def test_a_checkpoint_without_its_flags_tells_that_it_knows_a_null_class(
    workplace, refused, tmp_path
):
    (tmp_path / "bare").mkdir()
    path = shutil.copy(workplace / FREE, tmp_path / "bare")
    line = refused(
        {**TINY, **JOB},
        model_path=path,
        learn_sigma=True,
        class_cond=True,
        num_classes=10,
        guidance_scale=3,
    )
    assert "--num_classes (one more with --class_dropout) 10 here, 11 in the" in line


def test_rescaling_of_a_thousand_timesteps_changes_nothing(workplace, tmp_path):
    path = str(copy(workplace, tmp_path / "a", WEAK, diffusion_steps=1000, rescale_timesteps=False))
    flags, diffusion = flags_of(workplace, FREE, diffusion_steps=1000, guide_path=path)
    load_weak(flags, diffusion)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *OTHERS,
        ({"class_names": list("0123x56789")}, ["class 4 is 'x'", "'4'"]),
        ({"class_names": list("01234567")}, ["class 8 is 'None'", "'8'"]),
    ],
)
def test_a_classifier_of_other_images_classes_or_noise(workplace, tmp_path, changes, words):
    path = str(copy(workplace, tmp_path / "changed", LED_BY, **changes))
    own = {"classifier_path": path, "classifier_scale": 1.0}
    flags, diffusion = flags_of(workplace, OTHER, **own)
    with pytest.raises(UserError) as error:
        load_classifier({**flags, "num_classes": 0}, set(), flags, diffusion)
    line = str(error.value)
    assert line.startswith(f"--classifier_path {path} was trained ")
    assert all(word in line for word in words), line
    assert f"--model_path {flags['model_path']}" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"classifier_path": ""}, ["--classifier_path is missing"]),
        ({"model_path": ""}, ["--model_path is missing"]),
        ({"classifier_path": "gone.pt"}, ["gone.pt", "does not exist"]),
        ({"classifier_path": OTHER}, [OTHER, "is the checkpoint of a diffusion model"]),
        ({"model_path": LED_BY}, [LED_BY, "classifier", "--classifier_path"]),
        ({"classifier_scale": "-1"}, ["--classifier_scale -1"]),
        ({"classifier_width": 64}, ["--classifier_width 64", "--classifier_width 32"]),
        ({"num_classes": 7}, ["--num_classes 7", "--num_classes 10"]),
        ({"classes": "3,10"}, ["--classes 10", "0 ... 9"]),
        ({"guidance_scale": 3}, ["--guidance_scale 3"]),
        ({"sampler": "heun", "steps": 31}, ["--steps 31"]),
    ],
)
def test_guidance_by_a_classifier_that_cannot_be(refused, flags, words):
    line = refused({**LED_JOB, **flags}, script="classifier_sample")
    assert all(word in line for word in words), line


def test_checkpoints_alone_tell_what_they_are(workplace, refused, tmp_path):
    for source, name in ((LED_BY, "classifier.pt"), (PLAIN, "diffusion.pt")):
        shutil.copy(workplace / source, tmp_path / name)
    own = {**LED_JOB, **CLASSIFIER, "num_classes": 10}
    line = refused(own, classifier_path=tmp_path / "diffusion.pt")
    assert "diffusion.pt' is that of a diffusion model, not of a classifier" in line
    line = refused(TINY, model_path=tmp_path / "classifier.pt")
    assert "classifier.pt' is that of a classifier, not of a diffusion model" in line
    line = refused({**own, "classifier_path": tmp_path / "classifier.pt", "num_classes": 7})
    assert "--num_classes 7 here, 10 in the checkpoint" in line


@pytest.mark.parametrize(
    ("flags", "flag", "source"),
    [(WEAK_JOB, "guide_path", WEAK), (LED_JOB, "classifier_path", LED_BY)],
)
def test_a_second_network_that_diverged(workplace, refused, tmp_path, flags, flag, source):
    path = copy(workplace, tmp_path / "nan", source)
    state = torch.load(path)
    state["time_embed.0.weight"][0, 0] = float("nan")
    torch.save(state, path)
    assert "nan/" in (line := refused(flags, {flag: path}))
    assert "non-finite weights" in line
