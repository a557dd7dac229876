"""Which timesteps a batch gets, and the weights of their losses."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden_data import assert_rel, make_diffusion, npz

from improved_diffusion import logger
from improved_diffusion.errors import UserError
from improved_diffusion.resample import (
    SCHEDULE_SAMPLERS,
    LogitNormalSampler,
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    StratifiedSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from improved_diffusion.train_util import TrainLoop

STEPS = 5


@pytest.fixture
def diffusion():
    return make_diffusion(STEPS, schedule="cosine")


class FixedSampler(ScheduleSampler):
    def __init__(self, weights):
        self._weights = np.array(weights, dtype=np.float64)

    def weights(self):
        return self._weights


class RecordingSampler(LossAwareSampler):
    def weights(self):
        return np.ones(STEPS)

    def update_with_all_losses(self, ts, losses):
        self.ts, self.losses = list(ts), list(losses)


def assert_recorded_draw(sampler, prefix):
    timesteps, weights = sampler.sample(12, "cpu")
    assert timesteps.dtype == torch.int64
    assert weights.dtype == torch.float32
    np.testing.assert_array_equal(timesteps, npz("functions")[f"{prefix}/timesteps"])
    assert_rel(weights, npz("functions")[f"{prefix}/weights"], 1e-6)


def test_uniform_sampler_draws_the_recorded_timesteps(diffusion):
    np.random.seed(61)
    assert_recorded_draw(UniformSampler(diffusion), "uniform_sampler/seed61")


def test_second_moment_sampler_follows_the_recorded_weights_and_draws(diffusion):
    recorded = npz("functions")
    sampler = LossSecondMomentResampler(diffusion, history_per_term=4, uniform_prob=0.05)
    for timesteps, losses, weights in zip(
        recorded["second_moment/timesteps"],
        recorded["second_moment/losses"],
        recorded["second_moment/weights"],
        strict=True,
    ):
        sampler.update_with_all_losses(timesteps, losses)
        assert_rel(sampler.weights(), weights, 1e-9)
    assert not np.all(sampler.weights() == 1)  # the record goes on until after the warm-up
    np.random.seed(63)
    assert_recorded_draw(sampler, "second_moment/seed63")


def test_weighted_losses_keep_their_mean_whatever_the_distribution():
    """sum_t p_t w_t L_t is the plain mean of the losses, exactly; a large draw shows it."""
    losses = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    sampler = FixedSampler([1, 2, 3, 4, 10])
    timesteps, weights = sampler.sample(20_000, "cpu")
    np.testing.assert_allclose(weights, 20 / 5 / np.array([1, 2, 3, 4, 10])[timesteps], rtol=1e-6)
    assert (losses[timesteps] * weights).mean().item() == pytest.approx(2.8, abs=0.08)
    shares = np.bincount(timesteps, minlength=5) / 20_000
    np.testing.assert_allclose(shares, np.array([1, 2, 3, 4, 10]) / 20, atol=0.012)


def test_uniform_sampler_weighs_every_loss_by_one(diffusion):
    timesteps, weights = UniformSampler(diffusion).sample(200, "cpu")
    assert torch.equal(weights, torch.ones(200))
    assert set(timesteps.tolist()) == set(range(STEPS))


def test_second_moment_sampler_is_uniform_until_every_timestep_has_its_history(diffusion):
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2)
    for t in range(STEPS):
        sampler.update_with_all_losses([t], [10.0 * (t + 1)])
        np.testing.assert_array_equal(sampler.weights(), np.ones(STEPS))
    sampler.update_with_all_losses([0, 1, 2, 3], [10.0, 20.0, 30.0, 40.0])
    np.testing.assert_array_equal(sampler.weights(), np.ones(STEPS))
    sampler.update_with_all_losses([4], [50.0])
    assert not np.all(sampler.weights() == 1)


def test_second_moment_weights_are_the_root_mean_square_of_the_newest_losses(diffusion):
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2, uniform_prob=0.1)
    for losses in ([100.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], [7.0, 1.0, 3.0, 2.0, 5.0]):
        sampler.update_with_all_losses(range(STEPS), losses)
    rms = np.sqrt([(1 + 49) / 2, (4 + 1) / 2, 9, (16 + 4) / 2, 25])  # the 100s have dropped out
    np.testing.assert_allclose(sampler.weights(), 0.9 * rms / rms.sum() + 0.1 / STEPS, rtol=1e-12)
    assert sampler.weights().sum() == pytest.approx(1)


def test_one_process_updates_with_its_own_losses():
    sampler = RecordingSampler()
    sampler.update_with_local_losses(torch.tensor([4, 0, 2]), torch.tensor([0.5, 1.5, 2.5]))
    assert sampler.ts == [4, 0, 2]
    assert sampler.losses == [0.5, 1.5, 2.5]


def _work_on_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        sampler = RecordingSampler()
        ts, losses = ([3], [0.25]) if rank == 0 else ([1, 4, 0], [1.5, 2.5, 3.5])
        sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))
        np.random.seed(rank)
        strata = [loop_timesteps(f"{folder}/{rank}", 6, *case) for case in SHARED]
        torch.save((sampler.ts, sampler.losses, strata), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(_work_on_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_with_batches_of_different_size_see_the_same_losses(two_processes):
    for ts, losses, _ in two_processes:
        assert ts == [3, 1, 4, 0]
        assert all(isinstance(t, int) for t in ts)
        assert losses == [0.25, 1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("uniform", UniformSampler),
        ("loss-second-moment", LossSecondMomentResampler),
        ("logit_normal", LogitNormalSampler),
        ("stratified", StratifiedSampler),
    ],
)
def test_samplers_are_made_by_name(diffusion, name, kind):
    sampler = create_named_schedule_sampler(name, diffusion)
    assert type(sampler) is kind
    assert sampler.weights().shape == (STEPS,)


def test_unknown_sampler_error_lists_the_choices(diffusion):
    with pytest.raises(UserError, match="importance") as caught:
        create_named_schedule_sampler("importance", diffusion)
    for name in SCHEDULE_SAMPLERS:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# -- draws that are given, and what goes with a checkpoint


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [1, 2, 3, 4, 10], [0.5, 1e-9, 7, 1e-9, 2]])
def test_given_uniforms_decide_as_numpys_choice_would(weights):
    sampler = FixedSampler(weights)
    p = np.array(weights, dtype=np.float64) / np.sum(weights)
    for seed in range(20):
        state = np.random.RandomState(seed)
        timesteps, factors = sampler.sample(50, "cpu", uniforms=state.random_sample(50))
        expected = np.random.RandomState(seed).choice(5, size=50, p=p)
        np.testing.assert_array_equal(timesteps, expected)
        np.testing.assert_allclose(factors, 1 / (5 * p[expected]), rtol=1e-6)
        assert timesteps.dtype == torch.int64
        assert factors.dtype == torch.float32


def test_given_uniforms_spread_over_the_timesteps_by_their_weights():
    weights = np.array([1, 2, 3, 4, 10]) / 20
    uniforms = (np.arange(2000) + 0.5) / 2000
    timesteps, _ = FixedSampler(weights).sample(2000, "cpu", uniforms=uniforms)
    np.testing.assert_array_equal(np.bincount(timesteps), 2000 * weights)
    ends, _ = FixedSampler(weights).sample(2, "cpu", uniforms=np.array([0, np.nextafter(1, 0)]))
    assert ends.tolist() == [0, 4]


def test_given_uniforms_leave_the_global_generator_alone(diffusion):
    before = np.random.get_state()[1].copy()
    UniformSampler(diffusion).sample(4, "cpu", uniforms=np.random.default_rng(0).random(4))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def filled(diffusion, terms=3, seed=0):
    sampler = LossSecondMomentResampler(diffusion, history_per_term=terms)
    rng = np.random.default_rng(seed)
    sampler.update_with_all_losses(np.tile(np.arange(STEPS), 4), rng.random(4 * STEPS))
    return sampler


@pytest.mark.parametrize("full", [True, False])
def test_history_goes_with_a_checkpoint(diffusion, tmp_path, full):
    one = filled(diffusion) if full else LossSecondMomentResampler(diffusion, history_per_term=3)
    one.update_with_all_losses([2, 2], [5.0, 7.0])
    torch.save(one.state_dict(), tmp_path / "x.pt")
    other = filled(diffusion, seed=9)
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    for step in range(3):
        np.testing.assert_array_equal(one.weights(), other.weights())
        for sampler in (one, other):
            sampler.update_with_all_losses(range(STEPS), np.arange(STEPS) + 0.5 * step)
    assert (one.weights() != 1).any()


def test_stored_history_is_a_copy(diffusion):
    sampler = filled(diffusion)
    state = sampler.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    other = filled(diffusion, seed=9)
    other.load_state_dict(state)
    for changed in (sampler, other):
        changed.update_with_all_losses([1, 2], [100.0, 100.0])
    assert all(torch.equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize("state", [{}, {"loss_history": torch.zeros(4, 3)}])
def test_history_of_another_sampler_is_refused(diffusion, state):
    sampler = filled(diffusion)
    before = sampler.weights().copy()
    with pytest.raises(UserError, match=r"shape \(5, 3\) here"):
        sampler.load_state_dict(state)
    np.testing.assert_array_equal(sampler.weights(), before)


def test_sampler_without_a_state_has_an_empty_one():
    sampler = RecordingSampler()
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_are_ignored(diffusion, bad):
    sampler, same = filled(diffusion), filled(diffusion)
    sampler.update_with_all_losses([0, 1, 2, 1], [1.5, bad, 2.5, 3.5])
    same.update_with_all_losses([0, 2, 1], [1.5, 2.5, 3.5])
    np.testing.assert_array_equal(sampler.weights(), same.weights())
    assert np.isfinite(sampler.weights()).all()
    young = LossSecondMomentResampler(diffusion, history_per_term=1)
    young.update_with_all_losses(range(STEPS), [1.0, 2.0, bad, 3.0, 4.0])
    np.testing.assert_array_equal(young.weights(), np.ones(STEPS))


# -- a density that is the weighting, and strata


def test_logit_normal_timesteps_have_a_normal_logit():
    """Location 0 and scale 1 of arXiv 2403.03206: its best setting."""
    diffusion = make_diffusion(1000, schedule="cosine")
    sampler = create_named_schedule_sampler("logit_normal", diffusion)
    assert sampler.weights().shape == (1000,)
    timesteps, weights = sampler.sample(40_000, "cpu")
    assert torch.equal(weights, torch.ones(40_000))  # no correction: the density is wanted
    tau = (timesteps.double() + 0.5) / 1000
    logits = (tau / (1 - tau)).log()
    assert logits.mean().abs() < 0.02
    assert logits.std().item() == pytest.approx(1, abs=0.02)
    ranks = torch.distributions.Normal(0, 1).cdf(logits).sort().values
    assert (ranks - (torch.arange(40_000) + 0.5) / 40_000).abs().max() < 0.02
    again, _ = sampler.sample(3, "cpu", uniforms=np.array([0.0, 0.5, 1 - 1e-12]))
    assert again[1] in (499, 500)
    assert again[0] < 10
    assert again[2] > 990


@pytest.mark.parametrize("steps", [1, 2])
def test_logit_normal_of_few_steps(steps):
    sampler = create_named_schedule_sampler(
        "logit_normal", make_diffusion(steps, schedule="cosine")
    )
    assert set(sampler.sample(50, "cpu")[0].tolist()) == set(range(steps))


def strata_of(timesteps, total, steps):
    """How many of the timesteps lie in each of ``total`` equal parts of 0 ... steps - 1."""
    return np.bincount(np.asarray(timesteps) * total // steps, minlength=total)


def test_stratified_timesteps_without_a_seed_have_one_in_each_stratum():
    sampler = create_named_schedule_sampler("stratified", make_diffusion(600, schedule="cosine"))
    drawn = []
    for _ in range(200):
        timesteps, weights = sampler.sample(6, "cpu")
        assert torch.equal(weights, torch.ones(6))
        np.testing.assert_array_equal(strata_of(timesteps, 6, 600), 1)
        drawn.append(timesteps)
    drawn = torch.stack(drawn)
    assert len(set(map(tuple, (drawn // 100).tolist()))) > 100  # strata come in any order
    np.testing.assert_allclose(drawn.double().mean(dim=0), 299.5, atol=50)  # for every image
    inside = torch.bincount((drawn % 100).flatten() // 10, minlength=10)
    np.testing.assert_allclose(inside / inside.sum(), 0.1, atol=0.04)  # anywhere in a stratum


def test_stratified_mean_of_losses_varies_less_about_the_same_value():
    diffusion = make_diffusion(600, schedule="cosine")
    losses = torch.linspace(1, 0, 600) ** 2

    def means(name):
        sampler = create_named_schedule_sampler(name, diffusion)
        return torch.stack([losses[sampler.sample(8, "cpu")[0]].mean() for _ in range(400)])

    plain, strata = means("uniform"), means("stratified")
    for found in (plain, strata):
        assert found.mean().item() == pytest.approx(losses.mean().item(), abs=0.02)
    assert strata.std() < 0.3 * plain.std()


class Line(torch.nn.Module):
    """The least model that learns."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.scale * x


def loop_timesteps(folder, batch_size, microbatch, seed, step=3, sampler="stratified"):
    """The timesteps of one step of a training loop of this process."""
    diffusion = make_diffusion(600, schedule="cosine", var="FIXED_SMALL")
    with logger.scoped_configure(str(folder), format_strs=[]):
        loop = TrainLoop(
            model=Line(),
            diffusion=diffusion,
            data=iter(()),
            batch_size=batch_size,
            microbatch=microbatch,
            lr=1e-3,
            ema_rate="0.9",
            log_interval=10,
            save_interval=100,
            resume_checkpoint="",
            schedule_sampler=create_named_schedule_sampler(sampler, diffusion),
            seed=seed,
        )
        loop.step = step
        loop.forward_backward(torch.zeros(batch_size, 1, 2, 2), {})
    return torch.cat(loop.timesteps).tolist()


@pytest.mark.parametrize("seed", [0, 7])
def test_strata_of_a_training_step_depend_on_seed_and_step_alone(tmp_path, seed):
    whole = loop_timesteps(tmp_path, 12, -1, seed)
    np.testing.assert_array_equal(strata_of(whole, 12, 600), 1)
    torch.manual_seed(5)
    np.random.seed(5)
    for microbatch in (1, 5, 12):
        assert loop_timesteps(tmp_path, 12, microbatch, seed) == whole
    others = [
        loop_timesteps(tmp_path, 12, -1, seed + 1),
        loop_timesteps(tmp_path, 12, -1, seed, step=4),
        loop_timesteps(tmp_path, 12, -1, seed, sampler="uniform"),
    ]
    assert all(other != whole for other in others)
    assert (strata_of(others[2], 12, 600) != 1).any()


def test_strata_without_a_seed_cover_each_microbatch(tmp_path):
    found = loop_timesteps(tmp_path, 12, 4, None)
    for start in (0, 4, 8):
        np.testing.assert_array_equal(strata_of(found[start : start + 4], 4, 600), 1)


SHARED = [(-1, 0), (4, 0), (-1, None)]  # microbatch and seed of a step that is shared


@pytest.mark.parametrize("case", range(len(SHARED)))
def test_two_processes_share_the_strata_of_the_global_batch(two_processes, tmp_path, case):
    together = [t for *_, strata in two_processes for t in strata[case]]
    np.testing.assert_array_equal(strata_of(together, 12, 600), 1)
    _, seed = SHARED[case]
    assert (together == loop_timesteps(tmp_path, 12, -1, 0)) is (seed == 0)
