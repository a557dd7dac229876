"""Precision, clipping and the learning rate's course."""

import itertools
import math

import pytest
import torch

from improved_diffusion import optimization
from improved_diffusion.errors import UserError
from improved_diffusion.optimization import (
    LR_SCHEDULES,
    PRECISIONS,
    OptimizationOptions,
    autocast,
    check_precision,
    clip_gradients,
    load_portable_state,
    make_optimizer,
    portable_state,
)

CPU = torch.device("cpu")


def factors(steps, lr_anneal_steps=0, total_steps=None, **options):
    chosen = OptimizationOptions(**options)
    return [chosen.lr_factor(step, lr_anneal_steps, total_steps) for step in steps]


# -- the learning rate


def test_rate_is_constant_by_default():
    assert factors([0, 1, 10**6]) == [1, 1, 1]
    assert factors([0, 99], total_steps=100) == [1, 1]


@pytest.mark.parametrize("name", ["", "linear"])
def test_rate_falls_linearly_to_0_at_the_last_step_of_annealing(name):
    found = factors([0, 25, 99, 100], lr_anneal_steps=100, lr_schedule=name)
    assert found == pytest.approx([1, 0.75, 0.01, 0])


def test_rate_falls_to_the_end_of_training_where_no_other_is_named():
    assert factors([0, 30, 40], total_steps=40, lr_schedule="linear") == pytest.approx([1, 0.25, 0])
    found = factors([30], lr_anneal_steps=60, total_steps=40, lr_schedule="linear")
    assert found == [0.5]


def test_cosine_is_half_a_period():
    found = factors([0, 10, 20, 30, 40], total_steps=40, lr_schedule="cosine")
    root = math.sqrt(0.5) / 2
    assert found == pytest.approx([1, 0.5 + root, 0.5, 0.5 - root, 0], abs=1e-12)


def test_inverse_square_root_begins_after_the_warm_up():
    found = factors([0, 1, 3, 7, 15, 399], lr_warmup_steps=4, lr_schedule="inverse_sqrt")
    assert found == pytest.approx([0.25, 0.5, 1, math.sqrt(4 / 8), 0.5, 0.1])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_and_multiplies_the_schedule(name):
    plain = factors(range(20), total_steps=20, lr_schedule=name)
    warm = factors(range(20), total_steps=20, lr_schedule=name, lr_warmup_steps=5)
    rise = [0.2, 0.4, 0.6, 0.8, 1, *[1] * 15]  # not 0 in the first step, which would be lost
    assert warm == pytest.approx([a * b for a, b in zip(plain, rise, strict=True)])


def test_no_schedule_jumps_or_is_negative():
    for name in LR_SCHEDULES:
        found = factors(range(101), total_steps=100, lr_schedule=name, lr_warmup_steps=10)
        assert min(found) >= 0
        assert max(found) <= 1
        jumps = [abs(b - a) for a, b in itertools.pairwise(found)]
        assert max(jumps) < 0.11


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_falling_schedules_need_an_end(name):
    with pytest.raises(UserError, match=f"--lr_schedule {name} needs an end.*--train_steps"):
        factors([0], lr_schedule=name)


def test_constant_rate_contradicts_annealing():
    with pytest.raises(UserError, match="constant contradicts --lr_anneal_steps 100"):
        factors([0], lr_anneal_steps=100, lr_schedule="constant")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "--precision '?fp8"),
        ({"precision": "FP16"}, "--precision '?FP16"),
        ({"lr_schedule": "step"}, "--lr_schedule '?step"),
        ({"grad_clip": -0.5}, "--grad_clip -0.5"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps -1"),
        ({"lr_schedule": "inverse_sqrt"}, "inverse_sqrt needs --lr_warmup_steps"),
        ({"grad_clip": math.nan}, "--grad_clip nan"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(UserError, match=words) as error:
        OptimizationOptions(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, False),
        ({"lr_schedule": "constant"}, False),
        ({"lr_schedule": "linear"}, True),
        ({"lr_schedule": "cosine"}, True),
        ({"lr_warmup_steps": 3}, True),
        ({"lr_schedule": "constant", "lr_warmup_steps": 3}, True),
    ],
)
def test_rate_moves_by_itself(options, changes):
    assert OptimizationOptions(**options).changes_lr is changes


# -- averages


def test_rate_of_an_average_is_itself_without_warm_up():
    assert OptimizationOptions().ema_rate(0.9999, 0) == 0.9999


def test_warmed_up_average_forgets_the_start():
    options = OptimizationOptions(ema_warmup=True)
    steps = [0, 1, 90, 10**6]
    assert [options.ema_rate(0.99, step) for step in steps] == [0.1, 2 / 11, 0.91, 0.99]
    left = math.prod(options.ema_rate(0.9999, step) for step in range(1000))
    assert left < 1e-20  # rather than 0.9999**1000 = 90% of the initial weights


# -- the optimiser


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(3,), (2, 4), ()]]


def take_steps(opt, count):
    """Steps with gradients that depend on the parameters."""
    for _ in range(count):
        for param in opt.param_groups[0]["params"]:
            param.grad = torch.sin(7 * param.detach() + 1)
        opt.step()


def plain_adamw(params, lr=1e-2, weight_decay=0.1):
    """As the optimiser was made before it was fused."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def test_update_is_fused_and_that_of_adamw():
    ours, theirs = parameters(), parameters()
    opt = make_optimizer(ours, 1e-2, 0.1)
    assert opt.defaults["fused"]
    take_steps(opt, 20)
    take_steps(plain_adamw(theirs), 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_where_torch_has_no_fused_update_there_is_another():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    opt = make_optimizer(params, 1e-2, 0.0)
    assert not opt.defaults["fused"]
    take_steps(opt, 1)


@pytest.mark.parametrize("source", ["older file", "own file"])
def test_optimiser_goes_on_fused_and_as_if_it_had_not_stopped(tmp_path, source):
    params = parameters()
    opt = make_optimizer(params, 1e-2, 0.1)
    take_steps(opt, 5)
    state = portable_state(opt)
    groups = state["param_groups"]
    assert [(g["fused"], g["foreach"]) for g in groups] == [(None, None)]
    if source == "older file":  # which says how its machine computed
        state = {**state, "param_groups": [{**g, "fused": False, "foreach": True} for g in groups]}
    torch.save(state, tmp_path / "opt000005.pt")
    stored = torch.load(tmp_path / "opt000005.pt", weights_only=True)

    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = make_optimizer(again, 1e-2, 0.1)
    load_portable_state(resumed, stored)
    assert [(g["fused"], g["foreach"]) for g in resumed.param_groups] == [(True, None)]
    for each in (opt, resumed):
        take_steps(each, 5)
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b)
    assert opt.param_groups[0]["fused"]  # which storing left alone


def test_what_is_stored_is_what_an_older_version_stored():
    params = parameters()
    opt, older = make_optimizer(params, 1e-2, 0.1), plain_adamw(params)
    for each in (opt, older):
        take_steps(each, 1)
    state, theirs = portable_state(opt), older.state_dict()
    assert state["param_groups"] == theirs["param_groups"]
    for entry, other in zip(state["state"].values(), theirs["state"].values(), strict=True):
        assert list(entry) == list(other)
        assert [(v.shape, v.dtype) for v in entry.values()] == [
            (v.shape, v.dtype) for v in other.values()
        ]
    older.load_state_dict(state)  # and it goes on
    take_steps(older, 1)


# -- clipping


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 4.9, 5.1, 1e3])
def test_gradients_are_clipped_as_torch_does_it(max_norm):
    shapes = [(3,), (2, 4), (1,), ()]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape)
    scale = 5 / torch.nn.utils.get_total_norm([param.grad for param in params])
    for param in params:
        param.grad *= scale
    ours = [param.grad.clone() for param in params]
    clip_gradients(ours, torch.nn.utils.get_total_norm(ours), max_norm)
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    for grad, param in zip(ours, params, strict=True):
        torch.testing.assert_close(grad, param.grad, rtol=1e-6, atol=0)
    norm = torch.nn.utils.get_total_norm(ours).item()
    assert norm == pytest.approx(min(5, max_norm), rel=1e-4)


def test_gradients_of_zero_stay():
    grads = [torch.zeros(3)]
    clip_gradients(grads, torch.tensor(0.0), 1.0)
    assert grads[0].tolist() == [0, 0, 0]


# -- precision


@pytest.mark.parametrize("precision", ["", *PRECISIONS])
def test_every_precision_may_be_asked_for_on_a_cpu(precision):
    check_precision(OptimizationOptions(precision=precision), False, CPU)


@pytest.mark.parametrize("precision", ["", "fp16"])
def test_use_fp16_may_be_repeated_by_precision(precision):
    check_precision(OptimizationOptions(precision=precision), True, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_use_fp16_contradicts_another_precision(precision):
    with pytest.raises(UserError, match=f"--use_fp16 True contradicts --precision {precision}"):
        check_precision(OptimizationOptions(precision=precision), True, CPU)


@pytest.mark.parametrize(
    ("precision", "use_fp16", "flag"),
    [
        ("fp16", False, "--precision fp16"),
        ("bf16", False, "--precision bf16"),
        ("", True, "--use_fp16 True"),
        ("fp16", True, "--use_fp16 True"),
    ],
)
def test_precision_that_the_device_has_not_is_named(monkeypatch, precision, use_fp16, flag):
    def missing(*args, **kwargs):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(optimization.F, "conv2d", missing)
    with pytest.raises(UserError, match=f"{flag}: cpu cannot train in b?float16") as error:
        check_precision(OptimizationOptions(precision=precision), use_fp16, CPU)
    assert "\n" not in str(error.value)
    check_precision(OptimizationOptions(precision="fp32"), False, CPU)  # not even tried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_computes_in_another_type_and_returns_float32(dtype):
    model = torch.nn.Linear(8, 4)
    inside = []
    model.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    x = torch.randn(2, 8)
    y = autocast(model, dtype, "cpu")(x)
    assert inside == [dtype]
    assert y.dtype == torch.float32
    expected = model.weight.to(dtype) @ x.to(dtype).T
    torch.testing.assert_close(y, (expected.T + model.bias.to(dtype)).float(), rtol=2e-2, atol=2e-2)
    assert not torch.equal(y, model(x))
    y.square().mean().backward()
    assert model.weight.grad.dtype == model.weight.dtype == torch.float32
    assert model(x).dtype == torch.float32  # outside of it


def test_conditions_reach_the_model_in_autocast():
    seen = autocast(lambda x, t, y=None: x + t + y, torch.bfloat16, "cpu")
    assert seen(torch.ones(1), torch.ones(1), y=torch.ones(1)).item() == 3


def test_states_of_optimisers_that_have_no_fused_form_are_stored_and_loaded():
    weight = torch.nn.Parameter(torch.ones(3))
    first, second = (torch.optim.NAdam([weight], lr=1e-3) for _ in range(2))
    weight.square().sum().backward()
    first.step()
    stored = portable_state(first)
    assert "fused" not in stored["param_groups"][0]
    load_portable_state(second, stored)
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])
