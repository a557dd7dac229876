"""scripts/image_edit.py on real pictures, by small models; and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from launchers import start
from PIL import Image
from script_runner import TINY, error_of, names, run_folder, script_path, succeed, tree

from improved_diffusion.editing_pictures import load_masks, load_pictures

SIX = ["0_0000.png", "1_0001.png", "2_0002.png", "3_0003.png", "4_0004.png", "5_0005.png"]
FAST = {"steps": 6, "jump_samples": 2}


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


def save_mask(path, size=(8, 8), level=255, columns=slice(4, 8)):
    """A mask whose right half is to be made anew."""
    mask = np.zeros(size, np.uint8)
    mask[:, columns] = level
    Image.fromarray(mask).save(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, digits_dir):
    """Pictures and masks, right and wrong."""
    folder = tmp_path_factory.mktemp("workplace").resolve()
    for place in ("three", "other", "six"):
        (folder / place).mkdir()
    for i, name in enumerate(SIX):
        shutil.copy(digits_dir / name, folder / ("three" if i < 3 else "other"))
        shutil.copy(digits_dir / name, folder / "six")
    save_mask(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, digits_dir, run_script):
    """A run on 16-bit digits whose model knows images without a class; and a picture of it."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "data").mkdir()
    for path in sorted(digits_dir.glob("*.png"))[:20]:
        grey = pixels(path).astype(np.uint16)
        Image.fromarray(grey * 257).save(folder / "data" / path.name)
    flags = {**TINY, "data_dir": "data", "log_dir": "run", "batch_size": 4, "ema_rate": 0.5}
    flags |= {"value_range": "0,65535", "class_cond": True, "class_dropout": 0.5}
    succeed(run_script("image_train", flags, lr_anneal_steps=2, cwd=folder))
    shutil.copy(folder / "data" / "1_0001.png", folder / "photo.png")
    save_mask(folder / "mask.png")
    return folder


@pytest.fixture
def edit(workplace, trained, run_script):
    """Run image_edit.py in the workplace; its process."""

    def run(task, *parts, **flags):
        shutil.rmtree(workplace / "out", ignore_errors=True)
        own = {"model_path": trained.path, "log_dir": "out", "task": task, "image": "three"}
        return run_script("image_edit", own, *parts, **flags, cwd=workplace)

    return run


@pytest.fixture
def results(edit, workplace):
    """Run image_edit.py, which must succeed: {name: pixels} of what it made."""

    def run(task, *parts, **flags):
        succeed(edit(task, *parts, **flags))
        made = workplace / "out" / "edited"
        return {name: pixels(made / name) for name in names(made)}

    return run


# -- inpainting


def test_inpainting_keeps_what_is_known_and_makes_the_rest(results, workplace):
    made = results("inpaint", FAST, mask="mask.png", num_samples=2)
    assert list(made) == [f"{name[:-4]}_00{k}.png" for name in SIX[:3] for k in (0, 1)]
    for name in SIX[:3]:
        picture = pixels(workplace / "three" / name)
        variants = [made[f"{name[:-4]}_00{k}.png"] for k in (0, 1)]
        for variant in variants:
            assert variant.dtype == np.uint8
            np.testing.assert_array_equal(variant[:, :4], picture[:, :4])
            assert np.abs(variant[:, 4:] - picture[:, 4:].astype(int)).mean() > 10
        assert np.abs(variants[0] - variants[1].astype(int))[:, 4:].mean() > 10
    assert names(workplace / "out") == ["edited", "grid.png", "image_edit.json", "log.txt"]
    grid = pixels(workplace / "out" / "grid.png")
    assert grid.shape == (3 * 50 + 2, 4 * 50 + 2, 3)  # picture, hole, two variants, of 48 pixels
    assert grid[20, 60].tolist() == [pixels(workplace / "three" / SIX[0])[3, 1]] * 3
    assert grid[20, 52 + 40].tolist() == [214, 96, 77]


def test_a_variant_depends_on_seed_picture_and_its_number_alone(results, workplace):
    def near(one, other):
        return np.abs(one - other.astype(int)).max() <= 1  # a network rounds by the batch

    whole = results("inpaint", FAST, mask="mask.png", num_samples=3)
    parted = results("inpaint", FAST, mask="mask.png", num_samples=2, batch_size=4)
    assert all(near(whole[name], picture) for name, picture in parted.items())
    alone = results("inpaint", FAST, mask="mask.png", image=f"three/{SIX[0]}")
    assert list(alone) == ["0_0000.png"]  # one variant: named as the picture
    assert near(alone["0_0000.png"], whole["0_0000_000.png"])
    other = results("inpaint", FAST, mask="mask.png", image=f"three/{SIX[0]}", seed=1)
    assert not near(other["0_0000.png"], whole["0_0000_000.png"])


def test_each_picture_may_have_a_mask_of_its_own(results, workplace):
    masks = workplace / "masks"
    masks.mkdir()
    for i, name in enumerate(SIX[:3]):
        save_mask(masks / name, columns=slice(i, i + 3))
    made = results("inpaint", FAST, mask="masks")
    for i, name in enumerate(SIX[:3]):
        same = (made[name] == pixels(workplace / "three" / name)).all(axis=0)
        assert same[[k for k in range(8) if not i <= k < i + 3]].all()
        assert not same[i : i + 3].all()


def test_picture_of_another_size_is_resized_with_its_mask_and_that_is_said(edit, workplace):
    large = workplace / "large.png"
    Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(48, 32) // 6 * 6).save(large)
    mask = np.zeros((48, 32), np.uint8)
    mask[8:24] = 255  # the upper half of the centre that is cut out
    Image.fromarray(mask).save(workplace / "large_mask.png")
    flags = {**FAST, "mask": "large_mask.png", "classes": "3"}
    done = succeed(edit("inpaint", flags, image="large.png"))
    assert "'large.png' (48x32): resized and cut to the model's 8" in done.stdout
    made = pixels(workplace / "out" / "edited" / "large.png")
    resized = np.array(Image.open(large).resize((16, 24), Image.Resampling.BOX))
    resized = np.array(Image.fromarray(resized).resize((8, 12), Image.Resampling.BOX))[2:10]
    np.testing.assert_array_equal(made[4:], resized[4:])
    assert (made[:4] != resized[:4]).any()


def test_mask_that_keeps_nothing_is_told(edit, workplace):
    save_mask(workplace / "full.png", columns=slice(0, 8))
    done = succeed(edit("inpaint", FAST, mask="full.png"))
    assert "is white all over: nothing of the pictures is kept" in done.stdout


# -- image to image


def test_strength_is_how_far_it_goes(results, workplace):
    pictures = np.stack([pixels(workplace / "three" / name) for name in SIX[:3]]).astype(int)

    def distance(**flags):
        made = results("image_to_image", steps=10, **flags)
        assert list(made) == SIX[:3]
        return np.abs(np.stack(list(made.values())) - pictures).mean()

    distances = [distance(from_t=0), distance(strength=0.3), distance(strength=1)]
    assert distances[0] < 10
    assert distances[0] < distances[1] < distances[2]


def test_log_says_where_it_begins(edit, workplace):
    done = succeed(edit("image_to_image", strength=0.5, steps=10, sampler="heun"))
    line = "image_to_image: sampler heun, 10 of 30 steps, spaced by trailing, 5 of them from t = 14"
    assert line in done.stdout
    assert "editing complete: 3 pictures in" in done.stdout
    assert str(run_folder(done)) == str(workplace / "out")
    stored = json.loads((workplace / "out" / "image_edit.json").read_text())
    assert stored["strength"] == 0.5


def test_adaptive_solver_and_classes_by_number(results):
    flags = {"sampler": "ode", "strength": 0.3, "image": f"three/{SIX[0]}"}
    by_name = results("image_to_image", flags)
    others = results("image_to_image", flags, classes="5")
    assert list(by_name) == list(others) == ["0_0000.png"]
    assert (by_name["0_0000.png"] != others["0_0000.png"]).any()


# -- to the noise and back


def ratios(done):
    """{name: dB} by the lines of the process, and the mean."""
    each = dict(re.findall(r"^(\w+): PSNR ([\d.]+) dB$", done.stdout, flags=re.MULTILINE))
    (mean,) = re.findall(r"^mean PSNR ([\d.]+) dB of 3 pictures$", done.stdout, re.MULTILINE)
    return {name: float(value) for name, value in each.items()}, float(mean)


def test_reconstruction_tells_its_psnr(edit, workplace):
    fine, mean = ratios(succeed(edit("reconstruct")))
    assert mean == pytest.approx(np.mean(list(fine.values())), abs=0.01)
    for name, ratio in fine.items():
        there, made = (
            pixels(workplace / place / f"{name}.png") for place in ("three", "out/edited")
        )
        error = np.square(there - made.astype(float)).mean()
        assert ratio == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    _, coarse = ratios(succeed(edit("reconstruct", steps=5)))
    assert mean > coarse + 3
    assert mean > 20


def test_interpolation_goes_from_one_picture_to_the_other(results, workplace):
    back = results("reconstruct", steps=20, image="six")
    made = results("interpolate", steps=20, points=3, image2="other")
    pairs = list(zip(SIX[:3], SIX[3:], strict=True))
    expected = [f"{a[:-4]}-{b[:-4]}_00{k}.png" for a, b in pairs for k in range(3)]
    assert list(made) == expected
    for (first, second), row in zip(pairs, np.array_split(expected, 3), strict=True):
        np.testing.assert_allclose(made[row[0]], back[first], atol=1)
        np.testing.assert_allclose(made[row[2]], back[second], atol=1)
    grid = pixels(workplace / "out" / "grid.png")
    assert grid.shape == (3 * 50 + 2, 5 * 50 + 2, 3)
    one_class = results("interpolate", steps=20, points=3, image2="other", classes="7")
    assert any((one_class[name] != made[name]).any() for name in made)


# -- other models and files


def test_values_of_16_bits_stay_exact(deep_model, run_script):
    flags = {"model_path": "run/ema_0.5_000002.pt", "task": "inpaint", "mask": "mask.png"}
    done = succeed(
        run_script("image_edit", flags, FAST, image="photo.png", log_dir="out", cwd=deep_model)
    )
    assert "1 of 1 pictures have no class: their names tell none" in done.stdout
    with Image.open(deep_model / "out" / "edited" / "photo.png") as made:
        assert made.mode == "I;16"
        values = np.array(made)
    picture = pixels(deep_model / "photo.png")
    np.testing.assert_array_equal(values[:, :4], picture[:, :4])
    assert (values[:, 4:] != picture[:, 4:]).any()


def test_guidance_needs_a_class_to_follow(deep_model, run_script):
    own = {"model_path": "run/ema_0.5_000002.pt", "image": "photo.png", "task": "image_to_image"}
    own |= {"steps": 3, "guidance_scale": 3}
    line = error_of(run_script("image_edit", own, log_dir="no", cwd=deep_model))
    for word in ("--guidance_scale 3", "photo.png", "--classes"):
        assert word in line
    succeed(run_script("image_edit", own, classes="1", log_dir="led", cwd=deep_model))


def test_array_of_floats_comes_out_as_one(deep_model, run_script):
    array = (pixels(deep_model / "photo.png") * 0.731 + 0.0123)[..., None].astype(np.float32)
    np.save(deep_model / "1_scan.npy", array)
    flags = {"model_path": "run/ema_0.5_000002.pt", "task": "inpaint", "mask": "mask.png"}
    flags |= {"guidance_scale": 2, "log_dir": "guided", "image": "1_scan.npy"}
    done = succeed(run_script("image_edit", flags, FAST, cwd=deep_model))
    assert "guidance classifier-free, scale 2" in done.stdout
    made = np.load(deep_model / "guided" / "edited" / "1_scan.npy")
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[:, :4], array[:, :4])
    assert (made[:, 4:] != array[:, 4:]).any()


@pytest.mark.slow
def test_processes_share_the_work(workplace, trained):
    flags = ["--model_path", trained.path, "--image", "six", "--mask", "mask.png"]
    flags += ["--task", "inpaint", "--steps", "6", "--num_samples", "2", "--batch_size", "2"]
    made = []
    for launcher in ("single", "torchrun"):
        folder = workplace / f"out_{launcher}"
        done = start(
            launcher, script_path("image_edit"), *flags, "--log_dir", folder, cwd=workplace
        )
        assert done.returncode == 0, done.stderr
        made.append({name: pixels(folder / "edited" / name) for name in names(folder / "edited")})
    assert len(made[0]) == 12
    for name, picture in made[0].items():
        np.testing.assert_allclose(made[1][name], picture, atol=1)


def test_results_of_two_edits_do_not_mix(edit, workplace, run_script, trained):
    succeed(edit("image_to_image", steps=3, num_samples=2))
    made = tree(workplace / "out" / "edited")
    own = {"model_path": trained.path, "log_dir": "out", "task": "image_to_image"}
    line = error_of(run_script("image_edit", own, image="three", steps=3, cwd=workplace))
    for word in ("out/edited", "--num_samples 2", "not --num_samples 1", "--log_dir"):
        assert word in line
    assert tree(workplace / "out" / "edited") == made
    own |= {"image": "three", "steps": 3, "num_samples": 2, "batch_size": 2}
    succeed(run_script("image_edit", own, cwd=workplace))  # the same again
    assert tree(workplace / "out" / "edited").keys() == made.keys()


def test_classes_are_read_as_in_training(workplace, run_script, trained, tmp_path):
    """From the names of folders, if the checkpoint was trained so."""
    for name in ("3", "7"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        shutil.copy(workplace / "six" / SIX[0], tmp_path / "pictures" / name / "photo.png")
    (tmp_path / "run").mkdir()
    path = shutil.copy(trained.path, tmp_path / "run")
    flags = json.loads((trained.folder / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**flags, "labels_from": "folder"}))
    own = {"model_path": path, "image": "pictures", "task": "reconstruct", "steps": 3}
    succeed(run_script("image_edit", own, log_dir="by_folder", cwd=tmp_path))
    succeed(run_script("image_edit", own, classes="3,7", log_dir="by_class", cwd=tmp_path))
    found = [tree(tmp_path / name / "edited") for name in ("by_folder", "by_class")]
    assert found[0] == found[1]
    line = error_of(run_script("image_edit", own, labels_from="filename", cwd=tmp_path))
    assert "photo.png'" in line
    assert "the filename (--labels_from)" in line


@pytest.mark.parametrize(
    "other", [{"clip_denoised": False}, {"sigma_small": True}], ids=["clip", "variance"]
)
def test_flags_of_the_process_count(results, other):
    first = results("inpaint", FAST, mask="mask.png")
    second = results("inpaint", FAST, other, mask="mask.png")
    assert any((first[name] != second[name]).any() for name in first)


def test_white_begins_at_half(tmp_path, workplace):
    pictures = load_pictures(str(workplace / "six" / SIX[0]), 8, 1)
    levels = np.full((8, 8), 127, np.uint8)
    levels[2, 3] = 128
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = load_masks(str(tmp_path / "mask.png"), pictures)
    assert np.argwhere(mask).tolist() == [[0, 2, 3]]


def test_whole_values_are_rounded(workplace):
    pictures = load_pictures(str(workplace / "six" / SIX[0]), 8, 1)
    levels = np.array([0.4, 0.6, 100.4, 254.6])
    stored = pictures.stored((levels / 127.5 - 1).reshape(1, 1, 1, 4))
    assert stored.ravel().tolist() == [0, 1, 100, 255]


# -- bad input


@pytest.fixture(scope="module")
def wrong(workplace, trained):
    """The workplace with what is wrong in it."""
    (workplace / "text.png").write_text("no picture\n")
    (workplace / "half").mkdir()
    shutil.copy(workplace / "six" / SIX[0], workplace / "half")
    (workplace / "half" / "1_broken.png").write_bytes(
        (workplace / "six" / SIX[1]).read_bytes()[:60]
    )
    (workplace / "empty").mkdir()
    (workplace / "twice").mkdir()
    for extension in ("png", "jpg"):
        Image.open(workplace / "six" / SIX[0]).save(workplace / "twice" / f"0_a.{extension}")
    save_mask(workplace / "small.png", size=(4, 8))
    save_mask(workplace / "black.png", level=1)
    (workplace / "few").mkdir()
    save_mask(workplace / "few" / SIX[0])
    shutil.copy(workplace / "six" / SIX[0], workplace / "photo.png")
    for name, flag in (("upsampler", "large_size"), ("classifier", "classifier_width")):
        (workplace / name).mkdir()
        shutil.copy(trained.path, workplace / name / "model000001.pt")
        (workplace / name / "config.json").write_text(json.dumps({flag: 8}))
    return workplace


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"task": ""}, ["--task is missing", "inpaint", "interpolate"]),
        ({"task": "inpant"}, ["--task inpant", "reconstruct"]),
        ({"model_path": ""}, ["--model_path is missing"]),
        ({"image": ""}, ["--image is missing"]),
        ({"image": "no/such.png"}, ["--image 'no/such.png' does not exist"]),
        ({"image": "empty"}, ["--image 'empty'"]),
        ({"image": "text.png"}, ["'text.png' cannot be read as an image"]),
        ({"image": "half"}, ["1_broken.png' cannot be read as an image"]),
        ({"image": "twice"}, ["0_a.jpg", "0_a.png", "rename one"]),
        ({"image": "photo.png"}, ["'photo.png'", "--classes"]),
        ({"classes": "12"}, ["--classes 12", "0 ... 9"]),
        ({"task": "inpaint"}, ["--mask is missing"]),
        ({"task": "inpaint", "mask": "no.png"}, ["--mask 'no.png' does not exist"]),
        ({"task": "inpaint", "mask": "text.png"}, ["'text.png' cannot be read"]),
        ({"task": "inpaint", "mask": "small.png"}, ["'small.png' is 4x8", "0_0000.png' is 8x8"]),
        ({"task": "inpaint", "mask": "black.png"}, ["'black.png' hides nothing", "level is 1 of"]),
        ({"task": "inpaint", "mask": "few"}, ["--mask 'few'", "'1_0001'"]),
        ({"task": "inpaint", "mask": "mask.png", "steps": 2}, ["--jump_length 2", "2 steps"]),
        ({"task": "inpaint", "mask": "mask.png", "sampler": "unipc"}, ["--sampler unipc", "heun"]),
        ({"task": "inpaint", "mask": "mask.png", "sampler": "dpmpp_2m"}, ["--sampler dpmpp_2m"]),
        ({"mask": "mask.png"}, ["--mask is of --task inpaint", "image_to_image"]),
        ({"from_t": 30}, ["--from_t 30", "0 ... 29"]),
        ({"from_t": -2}, ["--from_t -2", "0 ... 29"]),
        ({"strength": 0}, ["--strength 0"]),
        ({"strength": 1.2}, ["--strength 1.2"]),
        ({"strength": 0.5, "from_t": 3}, ["--strength 0.5", "--from_t 3"]),
        ({"steps": 31}, ["--steps 31", "30"]),
        ({"steps": 10, "timestep_respacing": "5"}, ["--steps 10", "--timestep_respacing 5"]),
        ({"steps": 10, "spacing": "even"}, ["--spacing even"]),
        ({"task": "reconstruct", "num_samples": 2}, ["--num_samples", "image_to_image"]),
        ({"task": "reconstruct", "sampler": "heun"}, ["--sampler is of --task"]),
        ({"task": "interpolate"}, ["--image2 is missing"]),
        ({"task": "interpolate", "image2": "six"}, ["--image2 'six' holds 6", "'three' 3"]),
        ({"task": "interpolate", "image2": "other", "points": 1}, ["--points 1"]),
        ({"task": "interpolate", "image2": "other", "classes": "1,2,3"}, ["--classes 1,2,3"]),
        ({"guidance_scale": 2}, ["--guidance_scale 2", "--class_dropout"]),
        ({"model_path": "upsampler/model000001.pt"}, ["upsampler", "super-resolution"]),
        ({"model_path": "classifier/model000001.pt"}, ["classifier/model000001.pt"]),
        ({"log_dir": "six/..", "image": "edited"}, ["edited", "--log_dir"]),
    ],
)
def test_mistake_is_one_line_and_nothing_is_written(wrong, trained, run_script, flags, words):
    if flags.get("image") == "edited":
        shutil.copytree(wrong / "three", wrong / "edited", dirs_exist_ok=True)
    before = tree(wrong)
    own = {"model_path": trained.path, "log_dir": "new", "task": "image_to_image", "image": "three"}
    line = error_of(run_script("image_edit", {**own, **flags}, cwd=wrong))
    for word in words:
        assert word in line, line
    assert tree(wrong) == before


@pytest.mark.slow
def test_mistake_ends_all_processes(wrong, trained):
    flags = ["--model_path", trained.path, "--task", "inpaint", "--image", "three"]
    flags += ["--log_dir", "never"]
    done = start(
        "torchrun", script_path("image_edit"), *flags, "--mask", "small.png", cwd=wrong, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.count("error: --mask 'small.png' is 4x8") == 2  # one line of each rank
    assert "Traceback" not in done.stderr.split("error: ")[0]
    assert not (wrong / "never").exists()
