import math

import pytest
import torch
from golden_data import npz
from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.nn import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    mean_flat,
    normalization,
    scale_module,
    timestep_embedding,
    update_ema,
    zero_module,
)

FUNCTIONS = npz("functions")


def recorded(key):
    return torch.from_numpy(FUNCTIONS[key])


# -- timestep embedding ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 9, 33, 64])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_timestep_embedding_gives_the_recorded_numbers(kind, dim):
    embedding = timestep_embedding(recorded(f"timestep_embedding/t_{kind}"), dim)
    assert embedding.dtype == torch.float32
    expected = recorded(f"timestep_embedding/{kind}-{dim}")
    torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-4)


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequencies():
    t = torch.tensor([0, 1, 37])
    rows = [
        [f(step * 100 ** (-i / 3)) for f in (math.cos, math.sin) for i in range(3)]
        for step in t.tolist()
    ]
    embedding = timestep_embedding(t, 6, max_period=100)
    torch.testing.assert_close(embedding, torch.tensor(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 7])
def test_timestep_embedding_of_odd_dimension_ends_in_a_zero_column(dim):
    embedding = timestep_embedding(torch.tensor([3, 5]), dim)
    assert embedding.shape == (2, dim)
    assert not embedding[:, -1].any()
    assert embedding[:, :-1].all()


# -- parameters -----------------------------------------------------------------------------------


def test_update_ema_gives_the_recorded_targets():
    targets = [recorded(f"update_ema/target{i}").clone() for i in range(2)]
    update_ema(targets, [recorded(f"update_ema/source{i}") for i in range(2)], rate=0.97)
    for i, target in enumerate(targets):
        torch.testing.assert_close(target, recorded(f"update_ema/out{i}"), rtol=1e-5, atol=1e-6)


def test_update_ema_moves_parameters_in_place_and_leaves_the_sources():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    kept = [p.detach().clone() for p in source.parameters()]
    expected = [
        0.99 * t.detach() + 0.01 * s.detach()
        for t, s in zip(target.parameters(), source.parameters(), strict=True)
    ]
    places = [p.data_ptr() for p in target.parameters()]
    update_ema(target.parameters(), source.parameters())  # iterators; the rate is 0.99
    assert [p.data_ptr() for p in target.parameters()] == places
    for p, value in zip(target.parameters(), expected, strict=True):
        assert p.is_leaf
        torch.testing.assert_close(p.detach(), value)
    assert all(map(torch.equal, source.parameters(), kept))
    update_ema([], [])


@pytest.mark.parametrize(("rate", "expected"), [(1.0, [1.0, 2.0]), (0.0, [5.0, 7.0])])
def test_update_ema_of_rate_one_keeps_and_of_rate_zero_copies(rate, expected):
    target = torch.tensor([1.0, 2.0])
    update_ema([target], [torch.tensor([5.0, 7.0])], rate=rate)
    assert target.tolist() == expected


@pytest.mark.parametrize(
    ("change", "factor"), [(zero_module, 0.0), (lambda m: scale_module(m, -0.5), -0.5)]
)
def test_modules_are_zeroed_and_scaled_in_place(change, factor):
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 2))
    before = [p.detach().clone() for p in module.parameters()]
    parameters = list(module.parameters())
    assert change(module) is module
    for p, same, old in zip(module.parameters(), parameters, before, strict=True):
        assert p is same
        assert p.requires_grad
        assert p.is_leaf
        torch.testing.assert_close(p.detach(), factor * old)


# -- layers ---------------------------------------------------------------------------------------


def test_silu_is_x_times_its_sigmoid():
    x = torch.linspace(-9, 9, 37, dtype=torch.float64)
    torch.testing.assert_close(SiLU()(x), x / (1 + torch.exp(-x)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_by_dimension_are_those_of_torch(dims):
    conv = conv_nd(dims, 2, 3, 3, stride=2, padding=1, bias=False)
    assert type(conv) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    assert conv.bias is None
    pool = avg_pool_nd(dims, 2)
    assert type(pool) is (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
    x = torch.randn(1, 2, *[4] * dims)
    assert conv(x).shape == (1, 3, *[2] * dims)
    assert pool(x).shape == (1, 2, *[2] * dims)


@pytest.mark.parametrize("make", [conv_nd, avg_pool_nd])
@pytest.mark.parametrize("dims", [0, 4])
def test_other_numbers_of_dimensions_are_an_error(make, dims):
    with pytest.raises(ValueError, match=f"{dims}; choose 1, 2 or 3"):
        make(dims, 2, 2, 2)


def test_linear_is_that_of_torch():
    layer = linear(3, 5, bias=False)
    assert type(layer) is nn.Linear
    assert layer.bias is None
    assert layer(torch.zeros(2, 3)).shape == (2, 5)


def test_mean_flat_averages_all_but_the_batch():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert mean_flat(x).tolist() == [5.5, 17.5]
    assert mean_flat(x.reshape(2, 3, 2, 2)).tolist() == [5.5, 17.5]


# -- normalisation --------------------------------------------------------------------------------


def test_normalization_has_zero_mean_and_unit_variance_in_each_of_32_groups():
    layer = normalization(64)
    assert isinstance(layer, GroupNorm32)
    torch.manual_seed(0)
    x = 3 + 5 * torch.randn(2, 64, 6, 6)
    groups = layer(x).detach().reshape(2, 32, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 32), rtol=0, atol=1e-5)
    torch.testing.assert_close(groups.var(-1, correction=0), torch.ones(2, 32))


def test_normalization_of_half_precision_computes_in_float32():
    """The squares of these values exceed 65504, the end of float16."""
    torch.manual_seed(0)
    layer = normalization(32)
    x = (1000 + 500 * torch.randn(2, 32, 4, 4)).half()
    out = layer(x)
    assert out.dtype == torch.float16
    expected = nn.functional.group_norm(x.double(), 32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert layer(x.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalization_of_half_precision_is_that_of_float32_rounded(dtype):
    """Also its gradients; those of the weights stay float32."""
    torch.manual_seed(0)
    layer = normalization(64)
    x = (1 + 3 * torch.randn(2, 64, 8, 8)).to(dtype)
    gradient = torch.randn(2, 64, 8, 8).to(dtype)
    results = []
    for values in (x, x.float()):
        values = values.clone().requires_grad_()
        out = layer(values)
        results.append((out, *torch.autograd.grad(out, [values, *layer.parameters()], gradient)))
    spacing = torch.finfo(dtype).eps
    for half, exact in zip(*results, strict=True):
        error = (half.float() - exact).abs().max()
        assert error <= (spacing * exact.abs().max() if half.dtype == dtype else 2e-3)


def test_normalization_of_half_precision_keeps_its_type_under_vmap():
    layer, x = normalization(32), torch.randn(3, 2, 32, 4, 4).bfloat16()
    out = torch.func.vmap(layer)(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[1], layer(x[1]))


@pytest.mark.parametrize(("channels", "nearest"), [(48, "32 or 64"), (100, "96 or 128"), (8, "32")])
def test_normalization_of_other_channel_counts_is_an_error_with_the_nearest(channels, nearest):
    with pytest.raises(UserError) as error:
        normalization(channels)
    message = str(error.value)
    assert f"{channels} channels" in message
    assert message.endswith(f"the nearest are {nearest}")
    assert "\n" not in message


# -- checkpoint -----------------------------------------------------------------------------------


class Counted(nn.Module):
    """A layer with dropout that counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        return self.dropout(torch.sin(self.layer(x) * y))


def run_checkpoint(flag):
    module = Counted()
    x, y = torch.randn(2, 4, 6).requires_grad_().unbind()
    x.retain_grad()
    y.retain_grad()
    torch.manual_seed(9)
    out = checkpoint(module, (x, y), module.parameters(), flag)
    torch.rand(3)  # what is drawn between must not shift the replayed dropout
    out.square().sum().backward()
    tensors = [out.detach(), x.grad, y.grad, *[p.grad for p in module.parameters()]]
    return tensors, module.calls


def test_checkpoint_recomputes_and_gives_the_same_gradients():
    """Of both inputs and of the parameters, with the same features dropped."""
    plain, plain_calls = run_checkpoint(False)
    recomputed, calls = run_checkpoint(True)
    assert (plain_calls, calls) == (1, 2)
    for a, b in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert 0 < (plain[0] == 0).sum() < plain[0].numel()  # some features were dropped


def test_checkpoint_reaches_parameters_when_no_input_needs_a_gradient():
    module = Counted()
    checkpoint(module, (torch.randn(4, 6), torch.randn(4, 6)), (), True).sum().backward()
    assert module.layer.weight.grad.any()


def test_checkpoint_without_gradients_is_a_plain_call():
    module = Counted().eval()
    x, y = torch.randn(2, 4, 6).unbind()
    with torch.no_grad():
        out = checkpoint(module, (x, y), module.parameters(), True)
        assert torch.equal(out, module(x, y))
    assert not out.requires_grad
