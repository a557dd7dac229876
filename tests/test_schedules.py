import argparse

import numpy as np
import pytest
from golden_data import assert_rel, group, make_diffusion, npz

from improved_diffusion import gaussian_diffusion
from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.schedules import (
    LINEAR_MIN_STEPS,
    NAMED_SCHEDULES,
    SCALED_LINEAR_MIN_STEPS,
    betas_flag,
    betas_for_alpha_bar,
    betas_text,
    check_falling,
    get_named_beta_schedule,
    read_betas,
    shorten,
    zero_terminal_snr,
)

SCHEDULES = [("linear", 100), ("linear", 1000), ("cosine", 100), ("cosine", 1000)]


@pytest.mark.parametrize(("name", "steps"), SCHEDULES)
def test_tables_equal_the_recorded_ones(name, steps):
    recorded = group("schedules", f"{name}-{steps}")
    assert len(recorded) == 13
    diffusion = make_diffusion(steps, schedule=name, cls=GaussianDiffusion)
    for table, values in recorded.items():
        ours = getattr(diffusion, table)
        assert ours.dtype == np.float64
        assert_rel(ours, values, 1e-12)


def test_every_recorded_schedule_is_compared():
    assert {key.split("/")[0] for key in npz("schedules")} == {f"{n}-{s}" for n, s in SCHEDULES}


@pytest.mark.parametrize(("name", "steps"), SCHEDULES)
def test_named_schedule_gives_the_recorded_betas(name, steps):
    betas = get_named_beta_schedule(name, steps)
    assert isinstance(betas, np.ndarray)
    assert_rel(betas, npz("schedules")[f"{name}-{steps}/betas"], 1e-12)


@pytest.mark.parametrize("steps", [LINEAR_MIN_STEPS, 22, 50, 4000])
def test_linear_schedule_is_finite_from_its_shortest_length_on(steps):
    betas = get_named_beta_schedule("linear", steps)
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas < 1))
    assert np.all(np.cumprod(1 - betas) > 0)


@pytest.mark.parametrize("steps", [1, 19, 20])
def test_linear_schedule_too_short_says_so_and_names_cosine(steps):
    with pytest.raises(UserError, match=rf"at least 21 .*not {steps};.*cosine"):
        get_named_beta_schedule("linear", steps)


@pytest.mark.parametrize("steps", [1, 2, 20, 4000])
def test_cosine_schedule_works_with_any_length(steps):
    betas = get_named_beta_schedule("cosine", steps)
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas <= 0.999))


def test_cosine_schedule_follows_iddpm_eq_17():
    steps = 200
    time = np.arange(steps + 1) / steps
    f = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("cosine", steps))
    np.testing.assert_allclose(alpha_bar[:-1], f[1:-1] / f[0], rtol=1e-10)  # the last is capped


def test_linear_schedule_scales_so_that_any_length_ends_at_a_like_noise_level():
    """1000 steps are DDPM's own; half as many steps add twice the noise each."""
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", 1000), np.linspace(1e-4, 0.02, 1000), rtol=1e-12
    )
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", 500), np.linspace(2e-4, 0.04, 500), rtol=1e-12
    )


def test_unknown_schedule_error_lists_the_choices():
    with pytest.raises(UserError, match="quadratic") as caught:
        get_named_beta_schedule("quadratic", 100)
    for name in NAMED_SCHEDULES:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [0, -5])
def test_fewer_than_one_step_is_an_error_that_names_the_number(name, steps):
    with pytest.raises(UserError, match=str(steps)):
        get_named_beta_schedule(name, steps)


def test_betas_for_alpha_bar_reproduce_the_function_they_came_from():
    betas = betas_for_alpha_bar(40, lambda t: np.exp(-3 * t - 2 * t**2))
    time = np.arange(1, 41) / 40
    np.testing.assert_allclose(np.cumprod(1 - betas), np.exp(-3 * time - 2 * time**2), rtol=1e-12)


def test_betas_for_alpha_bar_are_capped_at_max_beta():
    betas = betas_for_alpha_bar(4, lambda t: 1 - t)
    np.testing.assert_allclose(betas, [1 / 4, 1 / 3, 1 / 2, 0.999], rtol=1e-12)
    capped = betas_for_alpha_bar(4, lambda t: 1 - t, max_beta=0.4)
    np.testing.assert_allclose(capped, [1 / 4, 1 / 3, 0.4, 0.4], rtol=1e-12)


def test_schedules_are_also_found_in_gaussian_diffusion():
    assert gaussian_diffusion.get_named_beta_schedule is get_named_beta_schedule
    assert gaussian_diffusion.betas_for_alpha_bar is betas_for_alpha_bar


# -- schedules of later papers


def alpha_bar_of(name, steps, **arguments):
    return np.cumprod(1 - get_named_beta_schedule(name, steps, **arguments))


def log_snr_of(alpha_bar):
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


@pytest.mark.parametrize("name", NAMED_SCHEDULES)
@pytest.mark.parametrize("steps", [21, 1000])
def test_log_snr_of_every_schedule_falls(name, steps):
    betas = get_named_beta_schedule(name, steps, image_size=128)
    assert betas.dtype == np.float64
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas <= 1))
    check_falling(np.cumprod(1 - betas))


def test_sigmoid_schedule_goes_from_minus_3_to_3():
    """Jabri et al., algorithm 1 with their names: the last step alone is capped."""
    steps = 100
    t = np.arange(steps) / steps
    v_start, v_end, at_t = (1 / (1 + np.exp(-x)) for x in (-3, 3, t * 6 - 3))
    gamma = (-at_t + v_end) / (v_end - v_start)
    np.testing.assert_allclose(alpha_bar_of("sigmoid", steps)[:-1], gamma[1:], rtol=1e-9)
    assert get_named_beta_schedule("sigmoid", steps)[-1] == 0.999


@pytest.mark.parametrize(
    ("size", "pixels"), [(128, 128), (32, 32), ((32, 128), 64), ((64, 256), 128), (256, 256)]
)
def test_cosine_schedule_is_shifted_by_the_size_of_the_image(size, pixels):
    shift = log_snr_of(alpha_bar_of("cosine_shifted", 100, image_size=size)) - log_snr_of(
        alpha_bar_of("cosine", 100)
    )
    np.testing.assert_allclose(shift[:-1], 2 * np.log(64 / pixels), rtol=1e-6, atol=1e-8)


def test_cosine_schedule_of_64_pixels_is_not_shifted():
    shifted = get_named_beta_schedule("cosine_shifted", 50, image_size=64)
    np.testing.assert_allclose(shifted, get_named_beta_schedule("cosine", 50), rtol=1e-9)
    assert get_named_beta_schedule("cosine_shifted", 50, 256)[-1] == 0.999


def test_shifted_schedule_without_a_size_names_the_argument():
    with pytest.raises(UserError, match="'cosine_shifted' needs the argument image_size"):
        get_named_beta_schedule("cosine_shifted", 100)


def test_scaled_linear_schedule_is_linear_in_its_roots():
    betas = get_named_beta_schedule("scaled_linear", 1000)
    assert betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(betas), n=2), 0, atol=1e-12)
    np.testing.assert_allclose(
        get_named_beta_schedule("scaled_linear", 500)[[0, -1]], [0.0017, 0.024], rtol=1e-12
    )


def test_scaled_linear_schedule_has_a_least_length_of_its_own():
    betas = get_named_beta_schedule("scaled_linear", SCALED_LINEAR_MIN_STEPS)
    assert betas.max() < 1
    with pytest.raises(UserError, match=r"'scaled_linear' needs at least 13 .*not 12;.*cosine"):
        get_named_beta_schedule("scaled_linear", SCALED_LINEAR_MIN_STEPS - 1)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_linear_path_is_the_line_from_data_to_noise(steps):
    """x_t / (a + s) = (1 - tau) x_start + tau eps."""
    alpha_bar = alpha_bar_of("linear_path", steps)
    tau = (np.arange(steps) + 1) / steps
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    np.testing.assert_allclose(s / (a + s), tau, rtol=1e-6)
    assert alpha_bar[-1] == 0
    assert get_named_beta_schedule("linear_path", steps)[-1] == 1


# -- no signal at the end


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "linear_path"])
@pytest.mark.parametrize("steps", [21, 1000])
def test_zero_terminal_snr_keeps_the_first_step_and_ends_without_signal(name, steps):
    betas = get_named_beta_schedule(name, steps)
    rescaled = zero_terminal_snr(betas)
    assert rescaled[-1] == 1
    assert np.cumprod(1 - rescaled)[-1] == 0
    assert rescaled[0] == pytest.approx(betas[0], rel=1e-9)
    before, after = (np.sqrt(np.cumprod(1 - b)) for b in (betas, rescaled))
    # an affine map of the roots: differences keep their ratios
    np.testing.assert_allclose(
        np.diff(after) * (before[0] - before[-1]),
        np.diff(before) * before[0],
        rtol=1e-6,
        atol=1e-12,
    )
    check_falling(np.cumprod(1 - rescaled))


def test_zero_terminal_snr_of_a_schedule_that_has_it_changes_nothing():
    betas = zero_terminal_snr(get_named_beta_schedule("linear", 50))
    np.testing.assert_allclose(zero_terminal_snr(betas), betas, rtol=1e-9)


def test_one_step_cannot_keep_its_signal_and_lose_it():
    with pytest.raises(UserError, match="--zero_terminal_snr True needs at least 2"):
        zero_terminal_snr(np.array([0.5]))


# -- a user's own betas

OWN = [0.1, 0.123456789012345678, 1 / 3, 1.0]


@pytest.fixture(params=["npy", "lines", "commas", "text", "list", "float32"])
def own(request, tmp_path):
    """A source of the betas OWN, and what they are."""
    path = tmp_path / "betas.npy"
    if request.param in ("npy", "float32"):
        array = np.array(OWN, dtype="float64" if request.param == "npy" else "float32")
        np.save(path, array)
        return str(path), array.astype(np.float64)
    if request.param in ("lines", "commas"):
        path = tmp_path / "betas.txt"
        path.write_text({"lines": "\n", "commas": ", "}[request.param].join(map(repr, OWN)) + "\n")
        return str(path), np.array(OWN)
    text = ",".join(map(repr, OWN))
    return (text if request.param == "text" else OWN), np.array(OWN)


def test_betas_are_read_from_files_texts_and_lists(own):
    source, expected = own
    betas = read_betas(source)
    assert betas.dtype == np.float64
    np.testing.assert_array_equal(betas, expected)


def test_betas_travel_as_text_without_loss(own):
    source, expected = own
    text = betas_flag(source) if isinstance(source, str) else betas_text(read_betas(source))
    assert betas_flag(text) == text
    np.testing.assert_array_equal(read_betas(text), expected)
    np.testing.assert_array_equal([float(word) for word in text.split(",")], expected)


def test_one_beta_is_a_list_too():
    assert read_betas("0.5").tolist() == [0.5]
    assert betas_flag("") == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("0.1,0", ["number 1", "0.0", "(0, 1]"]),
        ("0.1 1.5", ["number 1", "1.5", "(0, 1]"]),
        ("nan", ["number 0", "(0, 1]"]),
        ("0.1,1,0.5", ["does not fall at step 2 of 3", "only the last"]),
        ("1e-20,0.5", ["does not fall at step 0 of 2"]),
        ("", ["must hold numbers"]),
        ("beta\n0.1\n", ["must hold numbers"]),
    ],
)
def test_impossible_betas_say_which(tmp_path, content, words):
    path = tmp_path / "own.txt"
    path.write_text(content)
    for source in [str(path), *([content] if content and "beta" not in content else [])]:
        with pytest.raises(UserError) as error:
            read_betas(source)
        for word in ["--betas", *words]:
            assert word in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_are_no_betas_are_named(tmp_path):
    np.save(tmp_path / "table.npy", np.full((2, 2), 0.1))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("table.npy", "object.npy", "damaged.npy", "binary.txt"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^/.*{name}") as error:
            betas_flag(str(tmp_path / name))
        assert "\n" not in str(error.value)
    absent = str(tmp_path / "none.npy")
    assert betas_flag(absent) == absent  # a run that goes on has its numbers
    with pytest.raises(UserError, match=r"--betas .*none\.npy: no such file"):
        read_betas(absent)


def test_long_lists_are_shortened_in_messages():
    text = betas_text(get_named_beta_schedule("linear", 1000))
    assert shorten(text).startswith("0.0001,")
    assert shorten(text).endswith(",... (1000 in all)")
    assert len(shorten(text)) < 60
    assert shorten("0.1,0.2") == "0.1,0.2"
    with pytest.raises(UserError) as error:
        read_betas(text + ",2")
    assert len(str(error.value)) < 150
