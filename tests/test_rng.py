import pytest
import torch

from improved_diffusion.rng import derive_seed, randn, randn_like, sample_generators


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
