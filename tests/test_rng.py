"""Random draws that depend on a seed, a purpose and an index alone."""

import random

import numpy as np
import pytest
import torch

from improved_diffusion.rng import (
    StepDraws,
    derive_seed,
    jittered,
    randn,
    randn_like,
    sample_generators,
    seed_everything,
)


def test_derived_seeds_stay_the_same_across_versions():
    """A change here changes every image that a user has published with its seed."""
    assert derive_seed(0) == 2968811710
    assert derive_seed(7, "noise") == 3483218060
    assert derive_seed(7, "epoch", 3) == 2738660498


def test_sample_137_of_seed_0_stays_the_same_across_versions():
    first = randn((1, 3), sample_generators(0, [137]))
    torch.testing.assert_close(
        first, torch.tensor([[-0.5119399, -0.7081259, 1.4895455]]), atol=1e-6, rtol=0
    )


def test_every_seed_and_purpose_has_a_seed_of_its_own():
    uses = [
        (),
        ("a",),
        ("b",),
        ("a", 1),
        ("a", 2),
        ("a1",),
        ("a", "1"),
        (1,),
        (1, 0),
        (0,),
        ("ab",),
        ("a", "b"),
        ("b", "a"),
        (12,),
        (1, 2),
    ]
    seeds = [derive_seed(seed, *use) for seed in (0, 1, 2**32, 2**40) for use in uses]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_negative_seed_is_an_error():
    with pytest.raises(ValueError, match="negative"):
        derive_seed(-1, "noise")


def test_generators_of_consecutive_samples_are_all_different():
    indices = [*range(20_000), *range(2**31, 2**31 + 100), *range(2**32 - 100, 2**32)]
    seeds = [generator.initial_seed() for generator in sample_generators(3, indices)]
    assert len(set(seeds)) == len(indices)
    assert max(seeds) < 2**32  # torch's CPU generator keeps no more


def test_a_sample_depends_on_its_index_alone():
    together = randn((5, 2), sample_generators(1, range(10, 15)))
    alone = torch.cat([randn((1, 2), sample_generators(1, [i])) for i in (14, 13, 12, 11, 10)])
    assert torch.equal(together, alone.flip(0))


def test_seeds_and_purposes_give_other_samples():
    draws = [
        randn((4, 2), sample_generators(seed, range(4), purpose))
        for seed, purpose in [(0, "sample"), (1, "sample"), (0, "labels")]
    ]
    assert not torch.isclose(draws[0], draws[1]).any()
    assert not torch.isclose(draws[0], draws[2]).any()


def test_first_draws_of_neighbouring_samples_are_independent_and_normal():
    x = randn((20_000, 2), sample_generators(0, range(20_000)))
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02
    assert (x[:-1, 0] * x[1:, 0]).mean().abs() < 0.03
    assert (x[:, 0] * x[:, 1]).mean().abs() < 0.03


def test_rows_of_a_batch_come_from_their_own_generators():
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    x = randn((3, 2, 4), generators)
    again = randn_like(x, tuple(generators))
    for row, row_again, seed in zip(x, again, (5, 6, 7), strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(row, torch.randn(2, 4, generator=generator))
        assert torch.equal(row_again, torch.randn(2, 4, generator=generator))


def test_one_generator_fills_the_whole_batch():
    x = randn((3, 2), torch.Generator().manual_seed(5))
    assert torch.equal(x, torch.randn(3, 2, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "generator",
    [lambda: torch.Generator().manual_seed(1), lambda: sample_generators(0, range(3))],
    ids=["one", "a list"],
)
def test_given_generators_leave_the_global_one_alone(generator):
    before = torch.get_rng_state()
    generator = generator()
    randn_like(randn((3, 2), generator), generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_is_used_as_torch_would():
    torch.manual_seed(9)
    x = randn((3, 2))
    y = randn_like(x)
    torch.manual_seed(9)
    assert torch.equal(x, torch.randn(3, 2))
    assert torch.equal(y, torch.randn_like(x))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_generators_is_an_error_with_both_numbers(count):
    with pytest.raises(ValueError, match=f"{count} generators.* 3"):
        randn((3, 2), sample_generators(0, range(count)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_like_a_tensor_has_its_type(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    one = randn_like(x, torch.Generator().manual_seed(1))
    rows = randn_like(x, sample_generators(0, range(2)))
    assert randn_like(x).dtype == one.dtype == rows.dtype == dtype


# -- the global generators


def test_seeds_depend_on_seed_and_purpose():
    def draw(*arguments):
        seed_everything(*arguments)
        return torch.rand(4).tolist(), np.random.rand(4).tolist()

    first = draw(0, "train", 0)
    random.seed(1)
    assert draw(0, "train", 0) == first
    others = [draw(1, "train", 0), draw(0, "train", 1), draw(0, "sample", 0)]
    for ours in zip(first, *others, strict=True):  # torch's, then NumPy's
        assert len({tuple(values) for values in ours}) == 4


# -- the draws of a training step


def test_draws_of_a_step_depend_on_seed_step_and_global_index_alone():
    x = torch.zeros(8, 2, 3)
    whole = StepDraws(3, 5, 0)
    noise, uniforms = whole.noise_like(x, slice(0, 8)), whole.uniforms(slice(0, 8))
    torch.manual_seed(99)
    np.random.seed(99)
    for first in (0, 2, 5):  # the index of a process's first image in the global batch
        part = slice(0, 3)
        draws = StepDraws(3, 5, first)
        assert torch.equal(draws.noise_like(x[part], part), noise[first : first + 3])
        np.testing.assert_array_equal(draws.uniforms(part), uniforms[first : first + 3])
    for other in (StepDraws(4, 5, 0), StepDraws(3, 6, 0)):
        assert not torch.isclose(other.noise_like(x, slice(0, 8)), noise).any()
        assert not np.isclose(other.uniforms(slice(0, 8)), uniforms).any()


@pytest.mark.parametrize("microbatch", [1, 2, 3, 5, 8])
def test_microbatches_have_the_draws_of_the_whole_batch(microbatch):
    x, draws = torch.zeros(7, 2, 3), StepDraws(1, 2, 4)
    parts = [slice(start, min(start + microbatch, 7)) for start in range(0, 7, microbatch)]
    noise = torch.cat([draws.noise_like(x[part], part) for part in parts])
    uniforms = np.concatenate([draws.uniforms(part) for part in parts])
    assert torch.equal(noise, draws.noise_like(x, slice(0, 7)))
    np.testing.assert_array_equal(uniforms, draws.uniforms(slice(0, 7)))


def test_draws_of_steps_and_images_are_uniform_normal_and_independent():
    uniforms = np.stack([StepDraws(0, step, 0).uniforms(slice(0, 50)) for step in range(200)])
    assert uniforms.dtype == np.float64
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    shares = np.histogram(uniforms, bins=10, range=(0, 1))[0] / uniforms.size
    np.testing.assert_allclose(shares, 0.1, atol=0.015)
    x = torch.zeros(50, 4)
    noise = torch.stack([StepDraws(0, step, 0).noise_like(x, slice(0, 50)) for step in range(200)])
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.02  # of neighbouring steps
    assert (noise[:, 1:] * noise[:, :-1]).mean().abs() < 0.02  # of neighbouring images
    steps = np.corrcoef(uniforms[1:].ravel(), uniforms[:-1].ravel())[0, 1]
    assert abs(steps) < 0.04


def test_draws_of_a_step_leave_the_global_generators_alone():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws = StepDraws(0, 0, 0)
    draws.uniforms(slice(0, 4))
    draws.noise_like(torch.zeros(4, 1), slice(0, 4))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)


def test_noise_of_a_step_has_the_type_of_the_images():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert StepDraws(0, 0, 0).noise_like(x, slice(0, 2)).dtype == torch.float64


# -- one draw in each stratum of the global batch


def test_stratified_draws_have_one_in_each_stratum_whatever_the_split():
    whole = StepDraws(3, 5, 0, 12).stratified(slice(0, 12))
    assert whole.dtype == np.float64
    np.testing.assert_array_equal(np.sort((whole * 12).astype(int)), np.arange(12))
    for first, part in [(0, slice(0, 4)), (4, slice(0, 4)), (4, slice(2, 8)), (8, slice(3, 4))]:
        found = StepDraws(3, 5, first, 12).stratified(part)
        np.testing.assert_array_equal(found, whole[first + part.start : first + part.stop])
    for other in (StepDraws(4, 5, 0, 12), StepDraws(3, 6, 0, 12)):
        assert not np.isclose(other.stratified(slice(0, 12)), whole).all()


def test_stratified_draws_of_an_image_are_uniform():
    draws = np.stack([StepDraws(0, step, 0, 5).stratified(slice(0, 5)) for step in range(2000)])
    assert ((draws >= 0) & (draws < 1)).all()
    for image in draws.T:
        shares = np.histogram(image, bins=10, range=(0, 1))[0] / len(image)
        np.testing.assert_allclose(shares, 0.1, atol=0.03)


def test_stratum_does_not_reach_into_the_next():
    ends = jittered(np.array([0, 2]), np.nextafter([1.0, 1.0], 0), 3)
    assert ends[0] < 1 / 3 + 1e-15
    assert ends[1] < 1
    assert jittered(np.array([1]), np.array([0.0]), 4).tolist() == [0.25]


def test_images_beyond_the_global_batch_have_no_stratum():
    with pytest.raises(ValueError, match="image 4 of a global batch of 4"):
        StepDraws(0, 0, 2, 4).stratified(slice(0, 3))
