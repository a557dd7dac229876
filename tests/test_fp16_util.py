import pytest
import torch
from torch import nn

from improved_diffusion.fp16_util import (
    convert_module_to_f16,
    convert_module_to_f32,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)

SHAPES = [(2, 3), (4,), (1, 2, 2)]
TOTAL = 14


def mixed_params(seed=0):
    """Parameters of several shapes; the first one is float16."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    params[0].data = params[0].data.half()
    return params


def flattened(tensors):
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_are_converted_in_place_and_back(conv, bias):
    layer = conv(2, 3, 3, bias=bias)
    parameters = list(layer.parameters())
    values = [p.detach().clone() for p in parameters]
    convert_module_to_f16(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    convert_module_to_f32(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
    for p, value in zip(layer.parameters(), values, strict=True):
        assert torch.equal(p.detach(), value.half().float())


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(2, 3), nn.GroupNorm(2, 4), nn.Embedding(3, 2)],
    ids=lambda m: type(m).__name__,
)
def test_other_modules_are_left_alone(layer):
    convert_module_to_f16(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    layer.half()
    convert_module_to_f32(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float16}


def test_conversion_is_of_one_module_not_of_its_children():
    """``Module.apply`` reaches the children; a network decides which parts it applies to."""
    module = nn.Sequential(nn.Conv2d(1, 1, 1))
    convert_module_to_f16(module)
    assert module[0].weight.dtype == torch.float32
    module.apply(convert_module_to_f16)
    assert module[0].weight.dtype == torch.float16


def test_master_is_one_flat_float32_leaf():
    params = mixed_params()
    (master,) = make_master_params(params)
    assert isinstance(master, nn.Parameter)
    assert master.dtype == torch.float32
    assert master.shape == (TOTAL,)
    assert master.is_leaf
    assert master.requires_grad
    assert torch.equal(master.detach(), flattened(params))


@pytest.mark.parametrize("count", [1, 2])
def test_master_is_a_copy(count):
    """Also of a single float32 parameter."""
    params = mixed_params()[1 : 1 + count]
    before = flattened(params)
    (master,) = make_master_params(iter(params))
    master.detach().add_(1)
    assert torch.equal(flattened(params), before)


def test_master_takes_steps_that_half_precision_would_lose():
    param = nn.Parameter(torch.ones(3, dtype=torch.float16))
    masters = make_master_params([param])
    for _ in range(10):
        masters[0].detach().add_(1e-4)
        master_params_to_model_params([param], masters)
    assert torch.equal(param.detach(), torch.full((3,), 1.001).half())
    assert param[0] > 1


def test_unflattened_master_has_the_shapes_and_values_of_the_model():
    params = mixed_params()
    tensors = unflatten_master_params(params, make_master_params(params))
    assert [tuple(t.shape) for t in tensors] == SHAPES
    assert {t.dtype for t in tensors} == {torch.float32}
    for tensor, param in zip(tensors, params, strict=True):
        assert torch.equal(tensor, param.detach().float())
        assert not tensor.requires_grad


def test_master_goes_back_into_the_model_in_place_and_in_its_types():
    params, other = mixed_params(), mixed_params(seed=1)
    places = [p.data_ptr() for p in params]
    master_params_to_model_params(iter(params), make_master_params(other))
    assert [p.dtype for p in params] == [torch.float16, torch.float32, torch.float32]
    assert [p.data_ptr() for p in params] == places
    assert torch.equal(flattened(params), flattened(other))
    assert all(p.is_leaf and p.requires_grad for p in params)


def test_round_trip_gives_back_the_model():
    params = mixed_params()
    before = flattened(params)
    masters = make_master_params(params)
    for param in params:
        param.detach().zero_()
    master_params_to_model_params(params, masters)
    assert torch.equal(flattened(params), before)


def test_gradients_go_into_the_flat_float32_gradient():
    params = mixed_params()
    masters = make_master_params(params)
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, i + 0.5)
    model_grads_to_master_grads(iter(params), masters)
    assert masters[0].grad.dtype == torch.float32
    assert masters[0].grad.tolist() == [0.5] * 6 + [1.5] * 4 + [2.5] * 4


def test_gradients_of_a_model_that_is_all_half_become_float32():
    """1024 times 100 overflows float16: unscaling and adding up belong on the master."""
    param = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    masters = make_master_params([param])
    param.grad = torch.full_like(param, 100)
    model_grads_to_master_grads([param], masters)
    assert masters[0].grad.dtype == torch.float32
    masters[0].grad.mul_(1024)
    assert masters[0].grad.tolist() == [102400.0] * 3


def test_parameters_without_a_gradient_count_as_zero():
    params = mixed_params()
    masters = make_master_params(params)
    params[1].grad = torch.ones(4)
    model_grads_to_master_grads(params, masters)
    assert masters[0].grad.tolist() == [0.0] * 6 + [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize("count", [1, 2])
def test_gradient_of_the_master_is_a_copy(count):
    """Zeroing the gradients of the model must not zero those of the optimizer."""
    params = mixed_params()[1 : 1 + count]
    masters = make_master_params(params)
    for param in params:
        param.grad = torch.ones_like(param)
    model_grads_to_master_grads(params, masters)
    zero_grad(params)
    assert masters[0].grad.all()


def test_zero_grad_is_in_place_and_leaves_missing_gradients_missing():
    params = mixed_params()
    grad = 2 * params[1]
    params[1].grad = grad
    assert grad.grad_fn is not None
    zero_grad(iter(params))
    assert params[1].grad is grad
    assert grad.tolist() == [0.0] * 4
    assert grad.grad_fn is None
    assert params[0].grad is None


def test_step_on_the_master_moves_the_model_as_a_float32_step_would():
    params = [nn.Parameter(p.detach().clone()) for p in mixed_params()[1:]]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    masters = make_master_params(params)
    on_master, direct = (torch.optim.AdamW(p, lr=0.1) for p in (masters, twins))
    for _ in range(3):
        for group in (params, twins):
            zero_grad(group)
            sum((p**3).sum() for p in group).backward()
        model_grads_to_master_grads(params, masters)
        on_master.step()
        direct.step()
        master_params_to_model_params(params, masters)
    torch.testing.assert_close(flattened(params), flattened(twins))
