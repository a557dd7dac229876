import re

import numpy as np
import pytest
import torch
from golden_data import (
    FormulaModel,
    assert_rel,
    group,
    load_json,
    make_diffusion,
    npz,
)

from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.respace import SpacedDiffusion, _WrappedModel, space_timesteps

CASES = load_json("space_timesteps")
RESPACED = sorted({key.split("/")[0] for key in npz("respaced")})
TYPES = {
    "model_mean_type": ModelMeanType.EPSILON,
    "model_var_type": ModelVarType.FIXED_SMALL,
    "loss_type": LossType.MSE,
}


def case_name(case):
    return f"{case['num_timesteps']}-{case['section_counts']}"


def test_there_are_recorded_cases():
    assert len(CASES) == 34
    assert len(RESPACED) == 5


@pytest.mark.parametrize("case", [case for case in CASES if "steps" in case], ids=case_name)
def test_kept_timesteps_equal_the_recorded_ones(case):
    kept = space_timesteps(case["num_timesteps"], case["section_counts"])
    assert isinstance(kept, set)
    assert sorted(kept) == case["steps"]


@pytest.mark.parametrize("case", [case for case in CASES if "raises" in case], ids=case_name)
def test_respacing_that_the_reference_refuses_is_a_users_mistake(case):
    with pytest.raises(UserError) as caught:
        space_timesteps(case["num_timesteps"], case["section_counts"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RESPACED)
def test_respaced_tables_equal_the_recorded_ones(name):
    schedule, steps, sections = name.split("-")
    diffusion = make_diffusion(int(steps), schedule=schedule, respacing=sections)
    recorded = group("respaced", name)
    assert len(recorded) == 5
    assert list(diffusion.timestep_map) == recorded.pop("timestep_map").tolist()
    for table, values in recorded.items():
        assert_rel(getattr(diffusion, table), values, 1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["1", "2", "37", "20,10,5", "ddim25", ""])
def test_respacing_keeps_alpha_bar_at_the_kept_steps(schedule, respacing):
    base = make_diffusion(100, schedule=schedule, cls=GaussianDiffusion)
    spaced = make_diffusion(100, schedule=schedule, respacing=respacing)
    assert_rel(spaced.alphas_cumprod, base.alphas_cumprod[spaced.timestep_map], 1e-12)
    assert spaced.num_timesteps == len(spaced.timestep_map) == len(spaced.use_timesteps)
    assert spaced.original_num_steps == 100


def test_any_collection_of_timesteps_can_be_kept_in_any_order():
    betas = np.linspace(0.01, 0.3, 10)
    tables = [
        SpacedDiffusion(use_timesteps=kept, betas=betas, **TYPES)
        for kept in ([7, 2, 4], {2, 4, 7}, (2, 4, 7, 7), range(2, 8, 1))
    ]
    assert [list(d.timestep_map) for d in tables] == [[2, 4, 7]] * 3 + [[2, 3, 4, 5, 6, 7]]
    assert np.array_equal(tables[0].betas, tables[1].betas)


def test_every_count_up_to_the_number_of_steps_works():
    for steps in (1, 2, 7, 24):
        for count in range(1, steps + 1):
            kept = space_timesteps(steps, str(count))
            assert len(kept) == count
            assert kept <= set(range(steps))
            assert 0 in kept
            assert count == 1 or steps - 1 in kept


def test_sections_are_equal_shares_and_the_first_ones_take_the_rest():
    kept = space_timesteps(11, [4, 4, 3])
    assert kept == set(range(11))
    assert space_timesteps(11, [1, 1, 1]) == {0, 4, 8}


@pytest.mark.parametrize(("steps", "spec"), [(1000, "ddim300"), (4000, "ddim3999"), (50, "ddim51")])
def test_ddim_error_names_counts_that_do_work(steps, spec):
    with pytest.raises(UserError, match=spec) as caught:
        space_timesteps(steps, spec)
    message = str(caught.value)
    assert str(steps) in message
    named = set(re.findall(r"ddim\d+", message)) - {spec}
    assert named
    for nearest in named:
        assert len(space_timesteps(steps, nearest)) == int(nearest.removeprefix("ddim"))


def test_ddim300_of_1000_names_the_nearest_counts_on_both_sides():
    with pytest.raises(UserError, match="1000") as caught:
        space_timesteps(1000, "ddim300")
    assert "ddim250" in str(caught.value)
    assert "ddim334" in str(caught.value)


def test_ddim_steps_have_the_smallest_whole_stride_that_gives_so_many():
    assert sorted(space_timesteps(10, "ddim4")) == [0, 3, 6, 9]
    assert sorted(space_timesteps(1000, "ddim3")) == [0, 334, 668]
    assert sorted(space_timesteps(7, "ddim7")) == list(range(7))


def test_ddim1_keeps_the_only_step_of_a_process_of_one():
    assert space_timesteps(1, "ddim1") == {0}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ("101", ["101", "100"]),
        ("10,60", ["60", "50"]),
        ([5, 51], ["51", "50"]),
        ("-3", ["-3"]),
        ("10,-3", ["-3"]),
        ("0", ["0"]),
        ("ten", ["ten"]),
        ("10;20", ["10;20"]),
        ("ddimx", ["ddimx"]),
        ("ddim-5", ["ddim-5"]),
        ("ddim0", ["ddim0"]),
    ],
)
def test_bad_respacing_error_names_the_value_and_what_works(counts, words):
    with pytest.raises(UserError) as caught:
        space_timesteps(100, counts)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# -- what the model is handed ----------------------------------------------------------------------


def test_model_gets_the_original_timesteps_as_integers():
    diffusion = make_diffusion(50, respacing="5,3,2")
    model = FormulaModel()
    diffusion.p_mean_variance(model, torch.zeros(10, 1, 2, 2), torch.arange(10))
    (seen,) = model.seen
    assert seen.dtype == torch.int64
    assert seen.tolist() == diffusion.timestep_map


@pytest.mark.parametrize("respacing", ["5,3,2", "ddim10", ""])
def test_rescaled_timesteps_run_to_1000_over_the_original_steps(respacing):
    diffusion = make_diffusion(50, respacing=respacing, rescale_timesteps=True)
    model = FormulaModel()
    steps = diffusion.num_timesteps
    diffusion.p_mean_variance(model, torch.zeros(steps, 1, 2, 2), torch.arange(steps))
    (seen,) = model.seen
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, torch.tensor(diffusion.timestep_map) * 20.0)


def test_training_and_bits_per_dimension_hand_over_the_original_timesteps():
    diffusion = make_diffusion(50, respacing="4")
    x = torch.zeros(4, 1, 2, 2)
    for loss in LossType:
        diffusion.loss_type = loss
        model = FormulaModel()
        diffusion.training_losses(model, x, torch.arange(4))
        assert [seen.tolist() for seen in model.seen] == [[0, 16, 33, 49]]
    model = FormulaModel()
    diffusion.calc_bpd_loop(model, x[:1])
    assert [seen.item() for seen in model.seen] == [49, 33, 16, 0]


def test_keeping_every_step_changes_nothing():
    x, t = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 30, 49])
    for rescale in (False, True):
        spaced = make_diffusion(50, rescale_timesteps=rescale)
        plain = make_diffusion(50, rescale_timesteps=rescale, cls=GaussianDiffusion)
        spaced_model, plain_model = FormulaModel(), FormulaModel()
        out = spaced.p_mean_variance(spaced_model, x, t)
        expected = plain.p_mean_variance(plain_model, x, t)
        for key in expected:
            torch.testing.assert_close(out[key], expected[key])
        assert torch.equal(spaced_model.seen[0], plain_model.seen[0])
        assert spaced_model.seen[0].dtype == plain_model.seen[0].dtype


def test_a_model_is_wrapped_once():
    diffusion = make_diffusion(50, respacing="5")
    wrapped = diffusion._wrap_model(FormulaModel())
    assert isinstance(wrapped, _WrappedModel)
    assert diffusion._wrap_model(wrapped) is wrapped


def test_wrapped_model_maps_a_plain_list_and_passes_keywords_on():
    model = FormulaModel()
    wrapped = _WrappedModel(model, [3, 8, 20], rescale_timesteps=True, original_num_steps=40)
    x, y = torch.randn(2, 1, 2, 2), torch.tensor([1, 2])
    out = wrapped(x, torch.tensor([2, 0]), y=y)
    assert model.seen[0].tolist() == [500.0, 75.0]
    torch.testing.assert_close(out, model(x, torch.tensor([500.0, 75.0]), y=y))


def test_wrapped_model_follows_a_map_that_its_user_changes():
    steps = np.array([3, 8, 20])
    model = FormulaModel()
    wrapped = _WrappedModel(model, steps, rescale_timesteps=False, original_num_steps=40)
    wrapped(torch.zeros(1, 1, 1, 1), torch.tensor([1]))
    steps[1] = 9
    wrapped(torch.zeros(1, 1, 1, 1), torch.tensor([1]))
    assert [seen.item() for seen in model.seen] == [8, 9]


# -- respaced quantities ---------------------------------------------------------------------------


def test_respaced_bound_is_the_sum_of_its_terms_last_timestep_first():
    """The last column is t = 0, where the decoder's likelihood takes the place of the KL."""
    diffusion = make_diffusion(100, respacing="6", var="FIXED_SMALL")
    x_start = torch.rand(3, 1, 4, 4) * 2 - 1
    model = FormulaModel(learns_variance=False)
    torch.manual_seed(4)
    out = diffusion.calc_bpd_loop(model, x_start)
    for key in ("vb", "mse", "xstart_mse"):
        assert out[key].shape == (3, 6)
    torch.testing.assert_close(out["total_bpd"], out["vb"].sum(dim=1) + out["prior_bpd"])
    torch.manual_seed(4)
    for column, i in enumerate(reversed(range(6))):
        t = torch.full((3,), i)
        noise = torch.randn_like(x_start)
        x_t = diffusion.q_sample(x_start, t, noise=noise)
        term = diffusion._vb_terms_bpd(model, x_start, x_t, t)["output"]
        torch.testing.assert_close(out["vb"][:, column], term)


def test_respaced_process_can_be_kept_to_its_noisiest_step():
    diffusion = SpacedDiffusion(use_timesteps=[49], betas=np.linspace(0.01, 0.2, 50), **TYPES)
    base_alpha_bar = np.cumprod(1 - np.linspace(0.01, 0.2, 50))[-1]
    np.testing.assert_allclose(diffusion.betas, [1 - base_alpha_bar], rtol=1e-12)
    model = FormulaModel(learns_variance=False)
    sample = diffusion.p_sample_loop(model, (2, 1, 2, 2))
    assert torch.isfinite(sample).all()
    assert [seen.tolist() for seen in model.seen] == [[49, 49]]
