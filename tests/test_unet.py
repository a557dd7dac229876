import copy

import pytest
import torch
import torch.distributed as dist
from golden_data import group, load_json
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from improved_diffusion.errors import UserError
from improved_diffusion.script_util import create_model, sr_create_model
from improved_diffusion.unet import (
    AttentionBlock,
    Downsample,
    QKVAttention,
    ResBlock,
    SuperResModel,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

MANIFESTS = load_json("state_dicts")
SMALL = load_json("unet_small")
FACTORIES = {
    "create_model": create_model,
    "sr_create_model": sr_create_model,
    "UNetModel": UNetModel,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHAPES = {1: (2, 3, 24), 2: (2, 3, 16, 24), 3: (2, 3, 5, 8, 12)}  # by the number of dimensions


def factory_of(manifest):
    return sr_create_model if manifest["class"] == "SuperResModel" else create_model


def set_weights(model):
    """The weights of the recorded networks: nothing is zero, every layer matters."""
    with torch.no_grad():
        for i, (key, parameter) in enumerate(model.state_dict().items()):
            torch.manual_seed(1000 + i)
            w = torch.randn(*parameter.shape)
            if w.ndim > 1:
                w = w / (w.numel() / w.shape[0]) ** 0.5
            else:
                w = 1 + 0.1 * w if key.endswith("weight") else 0.1 * w
            parameter.copy_(w)
    return model


def small_options(**changes):
    options = {
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "num_heads": 2,
    }
    return {**options, **changes}


def small_unet(cls=UNetModel, **changes):
    return set_weights(cls(**small_options(**changes))).eval()


def inputs(dims=2, seed=5):
    torch.manual_seed(seed)
    return torch.randn(SHAPES[dims]), torch.tensor([3.0, 411.5])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def convolutions_of(*modules):
    return [m for module in modules for m in module.modules() if isinstance(m, CONVOLUTIONS)]


# -- published checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(MANIFESTS))
def published(request):
    """A manifest and its network, without memory behind the weights."""
    manifest = MANIFESTS[request.param]
    with torch.device("meta"):
        return manifest, factory_of(manifest)(**manifest["arguments"])


def test_state_dict_of_a_published_configuration_has_its_ordered_keys_and_shapes(published):
    manifest, model = published
    assert type(model).__name__ == manifest["class"]
    state = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert state == manifest["keys"]


def test_a_published_configuration_has_its_number_of_float32_parameters_and_no_buffers(published):
    manifest, model = published
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert [name for name, _ in model.named_parameters()] == [key for key, _ in manifest["keys"]]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(model.buffers())


def test_a_published_configuration_gets_the_options_that_no_shape_shows(published):
    manifest, model = published
    arguments = manifest["arguments"]
    dropouts = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    heads = {m.num_heads for m in model.modules() if isinstance(m, AttentionBlock)}
    assert dropouts == {arguments["dropout"]}
    assert heads == {arguments["num_heads"]}
    assert model.use_checkpoint is arguments["use_checkpoint"]


# -- recorded networks ----------------------------------------------------------------------------


def recorded_network(name):
    arguments = dict(SMALL[name]["arguments"])
    model = FACTORIES[SMALL[name]["factory"]](**arguments)
    numbers = group("unet_small", name)
    tensors = {k: torch.from_numpy(numbers[k]) for k in ("x", "t", "y", "low_res") if k in numbers}
    x, t = tensors.pop("x"), tensors.pop("t")
    return set_weights(model).eval(), x, t, tensors, numbers


def assert_within(actual, expected, tolerance):
    """The largest difference is at most ``tolerance`` of the largest expected entry."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_recorded_network_gives_the_recorded_output_and_gradients(name):
    model, x, t, conditions, numbers = recorded_network(name)
    state = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert state == SMALL[name]["keys"]
    sums = torch.stack([value.double().sum() for value in model.state_dict().values()])
    assert (sums - torch.from_numpy(numbers["weight_sums"])).abs().max() < 1e-4

    x.requires_grad_()
    out = model(x, t, **conditions)
    out.square().mean().backward()
    assert out.dtype == torch.float32
    assert_within(out.detach(), numbers["out"], 1e-4)
    assert_within(x.grad, numbers["d_x"], 1e-4)
    norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
    assert_within(norms, numbers["grad_norms"], 1e-4)


def test_recorded_network_gives_the_recorded_feature_means():
    model, x, t, conditions, numbers = recorded_network("cond64")
    with torch.no_grad():
        features = model.get_feature_vectors(x, t, **conditions)
    assert set(features) == {"down", "middle", "up"}
    for part in ("down", "up"):
        means = torch.stack([h.mean() for h in features[part]])
        recorded = torch.from_numpy(numbers[f"features/{part}_means"])
        torch.testing.assert_close(means, recorded, rtol=1e-4, atol=1e-4)
    middle = features["middle"].mean().reshape(1)
    recorded = torch.from_numpy(numbers["features/middle_means"])
    torch.testing.assert_close(middle, recorded, rtol=1e-4, atol=1e-4)


# -- shapes and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("conv_resample", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_signals_of_one_two_and_three_dimensions_keep_their_shape(dims, conv_resample):
    """And the output depends on every parameter."""
    model = small_unet(dims=dims, conv_resample=conv_resample, out_channels=6)
    x, t = inputs(dims)
    out = model(x, t)
    out.square().mean().backward()
    assert out.shape == (2, 6, *SHAPES[dims][2:])
    assert out.isfinite().all()
    assert out.std() > 0.1
    assert [name for name, grad in gradients(model).items() if grad is None] == []


@pytest.mark.parametrize("conv_resample", [True, False])
@pytest.mark.parametrize(
    ("dims", "halved"), [(1, (12,)), (2, (8, 12)), (3, (5, 4, 6))], ids=["1d", "2d", "3d"]
)
def test_resampling_halves_and_doubles_all_sides_but_the_first_of_three(
    dims, halved, conv_resample
):
    x = torch.randn(SHAPES[dims])
    half = Downsample(3, conv_resample, dims=dims)(x)
    assert half.shape == (2, 3, *halved)
    assert Upsample(3, conv_resample, dims=dims)(half).shape == x.shape
    features = small_unet(dims=dims, conv_resample=conv_resample).get_feature_vectors(*inputs(dims))
    assert features["middle"].shape == (2, 64, *halved)


def test_resampling_without_convolutions_averages_and_repeats():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    down, up = Downsample(1, False), Upsample(1, False)
    assert not [*down.parameters(), *up.parameters()]
    half = down(x)
    torch.testing.assert_close(half, torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    repeated = half.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(half), repeated)


@pytest.mark.parametrize("channel_mult", [(2, 3), (3, 1), (0.5, 1)])
def test_first_level_may_have_another_width_than_model_channels(channel_mult):
    """Level widths are multiples of model_channels, whatever the first multiple is."""
    model = small_unet(model_channels=64, channel_mult=channel_mult)
    x, t = inputs()
    first, second = (int(64 * mult) for mult in channel_mult)
    features = model.get_feature_vectors(x, t)
    assert [h.shape[1] for h in features["down"]] == [first, first, first, second]
    assert features["up"][-1].shape[1] == first
    out = model(x, t)
    assert out.shape == x.shape
    assert out.std() > 0.1


def test_attention_resolutions_are_downsampling_factors():
    model = UNetModel(**small_options(channel_mult=(1, 1, 1), attention_resolutions=(1, 4)))

    def attending(blocks):
        return [any(isinstance(m, AttentionBlock) for m in block) for block in blocks]

    # convolution, factor 1, halving, factor 2, halving, factor 4; and back, two blocks for each
    assert attending(model.input_blocks) == [False, True, False, False, False, True]
    assert attending(model.output_blocks) == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("size", "missing"), [("8", []), ("8,10", ["10"]), ("12,64", ["12", "64"])]
)
def test_attention_at_sizes_that_are_no_level_is_left_out_with_a_warning(size, missing, caplog):
    """Of 32 pixels the levels are 32, 16, 8 and 4; the middle block attends in any case."""
    arguments = {**SMALL["uncond32"]["arguments"], "attention_resolutions": size}
    with torch.device("meta"):
        model = create_model(**arguments)
    assert model.attention_resolutions == ({4} if "8" in size else set())
    assert len(caplog.records) == (1 if missing else 0)
    if missing:
        assert f"no level of size {', '.join(missing)};" in caplog.text
        assert "32, 16, 8, 4" in caplog.text


@pytest.mark.parametrize(("asked", "got"), [(-1, 2), (4, 4)])
def test_upsampling_path_has_its_own_heads_unless_minus_one(asked, got):
    model = UNetModel(**small_options(num_heads_upsample=asked))
    heads = [m.num_heads for m in model.output_blocks.modules() if isinstance(m, AttentionBlock)]
    assert heads == [got, got]
    assert model.input_blocks[3][1].num_heads == 2


def test_fresh_network_gives_zero_and_its_blocks_are_their_skip_connections():
    """The last convolution of each block and of the network starts at zero."""
    model = UNetModel(**small_options())
    x, t = inputs()
    assert not model(x, t).any()
    h, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert torch.equal(ResBlock(32, 128, 0.0)(h, emb), h)
    assert torch.equal(AttentionBlock(32, num_heads=4)(h), h)


@pytest.mark.parametrize(("use_conv", "width"), [(False, 1), (True, 3)])
def test_residual_block_widens_its_skip_connection_with_a_convolution(use_conv, width):
    block = ResBlock(32, 16, 0.0, out_channels=64, use_conv=use_conv)
    assert block.skip_connection.kernel_size == (width, width)
    h = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(h, torch.randn(2, 16)), block.skip_connection(h))


def test_dropout_acts_in_training_and_not_in_evaluation():
    model = small_unet(dropout=0.5)
    x, t = inputs()
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.allclose(model(x, t), model(x, t))


def test_embedding_goes_to_the_blocks_that_take_one():
    block = set_weights(
        TimestepEmbedSequential(nn.Conv2d(3, 32, 1), ResBlock(32, 16, 0.0), nn.Tanh())
    )
    x, emb = torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    expected = block[2](block[1](block[0](x), emb))
    assert torch.equal(block(x, emb), expected)
    assert not torch.allclose(block(x, -emb), expected)


# -- attention ------------------------------------------------------------------------------------


def textbook_attention(qkv):
    """softmax(Q K^T / sqrt(d)) V: arXiv 1706.03762, eq. 1."""
    q, k, v = qkv.double().transpose(1, 2).chunk(3, dim=2)  # [B, L, D] each
    weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[2] ** 0.5, dim=2)  # [B, L, L]
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize(("batch", "channels", "length"), [(3, 8, 17), (1, 1, 5), (2, 48, 1)])
def test_attention_is_the_textbook_formula(batch, channels, length):
    torch.manual_seed(0)
    qkv = torch.randn(batch, 3 * channels, length, dtype=torch.float64, requires_grad=True)
    out = QKVAttention()(qkv)
    torch.testing.assert_close(out, textbook_attention(qkv), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * weights).sum(), qkv)
    (expected,) = torch.autograd.grad((textbook_attention(qkv) * weights).sum(), qkv)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_fused(dtype):
    """Its weights [L, L] are never in memory, in training neither."""
    qkv = torch.randn(4, 3 * 16, 64, dtype=dtype, requires_grad=True)
    with torch.profiler.profile() as profile:
        QKVAttention()(qkv).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_softmax" not in names


def test_attention_by_its_formula_has_second_derivatives():
    qkv = torch.randn(2, 3 * 4, 5, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(QKVAttention()(qkv).sum(), qkv, create_graph=True)
        gradient.square().sum().backward()
        torch.func.jvp(QKVAttention(), (qkv.detach(),), (torch.ones_like(qkv),))
    assert qkv.grad.abs().max() > 0


def test_attention_in_half_precision_survives_products_that_overflow_it():
    """Unscaled, the products here reach 64 * 40 * 40 = 102400; float16 ends at 65504."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 192, 9)
    qkv[:, :128] = 40 * qkv[:, :128].sign()
    qkv[:, 64:128, 0] = qkv[:, :64, 0]
    out = QKVAttention()(qkv.half())
    assert out.dtype == torch.float16
    expected = textbook_attention(qkv.half())
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_heads_attend_apart_each_within_its_own_channels():
    """Head h owns the h-th run of 3 C / heads channels: its queries, then keys, then values."""
    torch.manual_seed(0)
    block = set_weights(AttentionBlock(64, num_heads=4))
    x = torch.randn(2, 64, 3, 5)
    packed = block.qkv(block.norm(x.reshape(2, 64, 15)))  # [2, 192, 15]
    heads = [textbook_attention(packed[:, 48 * h : 48 * (h + 1)]) for h in range(4)]
    attended = block.proj_out(torch.cat(heads, dim=1).float())
    torch.testing.assert_close(block(x), x + attended.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_two_matrix_products():
    """b L^2 d multiplications for the weights, and as many for the weighted values."""
    attention = QKVAttention()
    attention.total_ops = torch.DoubleTensor([7])
    QKVAttention.count_flops(attention, None, (torch.zeros(2, 4, 5),))
    assert attention.total_ops.tolist() == [7 + 2 * 2 * 5**2 * 4]
    QKVAttention.count_flops(attention, None, (torch.zeros(2, 4, 5, 3),))
    assert attention.total_ops.tolist() == [7 + 400 + 2 * 2 * 15**2 * 4]


def test_flops_are_counted_by_a_forward_hook():
    """As ``thop`` does it: the hook gets the output itself, not a tuple of outputs."""
    attention = QKVAttention()
    attention.total_ops = torch.zeros(1, dtype=torch.float64)
    attention.register_forward_hook(QKVAttention.count_flops)
    attention(torch.randn(2, 12, 5))
    assert attention.total_ops.tolist() == [2 * 2 * 5**2 * 4]


# -- activation checkpointing ---------------------------------------------------------------------


def run_and_differentiate(model, seed=3):
    x, t = inputs()
    x.requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x, t)
    out.square().mean().backward()
    return out.detach(), x.grad, gradients(model)


def assert_same_run(left, right):
    for a, b in zip(left[:2], right[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    names = [name.removeprefix("module.") for name in left[2]]
    for name, a, b in zip(names, left[2].values(), right[2].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_activation_checkpointing_changes_neither_output_nor_gradients(dropout, scale_shift):
    """With dropout too: the recomputation must drop the same features."""
    options = {"dropout": dropout, "use_scale_shift_norm": scale_shift}
    plain = run_and_differentiate(small_unet(**options).train())
    checkpointed = run_and_differentiate(small_unet(use_checkpoint=True, **options).train())
    assert_same_run(checkpointed, plain)
    if dropout:
        other = run_and_differentiate(small_unet(**options).train(), seed=4)
        assert not torch.allclose(other[1], plain[1], rtol=1e-2)  # the masks matter


def test_activation_checkpointing_leaves_the_generator_where_it_would_be():
    ends = []
    for use_checkpoint in (False, True):
        run_and_differentiate(small_unet(dropout=0.4, use_checkpoint=use_checkpoint).train())
        ends.append(torch.rand(4))
    assert torch.equal(*ends)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_activation_checkpointing_runs_every_block_again_backward(use_checkpoint):
    model = small_unet(use_checkpoint=use_checkpoint)
    firsts = [m.in_layers[0] for m in model.modules() if isinstance(m, ResBlock)]
    firsts += [m.norm for m in model.modules() if isinstance(m, AttentionBlock)]
    calls = dict.fromkeys(firsts, 0)

    def count(module, _inputs, _output):
        calls[module] += 1

    for module in firsts:
        module.register_forward_hook(count)
    x, t = inputs()
    loss = model(x, t).square().mean()
    assert set(calls.values()) == {1}
    loss.backward()
    assert set(calls.values()) == {2 if use_checkpoint else 1}


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_activation_checkpointing_works_inside_distributed_data_parallel():
    options = {"dropout": 0.4, "use_checkpoint": True}
    plain = run_and_differentiate(small_unet(dropout=0.4).train())
    wrapped = DistributedDataParallel(small_unet(**options).train())
    assert_same_run(run_and_differentiate(wrapped), plain)
    with wrapped.no_sync():  # gradients of microbatches add up
        run_and_differentiate(wrapped)
    x, t = inputs()
    torch.manual_seed(3)
    wrapped(x, t).square().mean().backward()
    for grad, once in zip(gradients(wrapped).values(), plain[2].values(), strict=True):
        torch.testing.assert_close(grad, 2 * once, rtol=1e-4, atol=1e-6)


# -- features -------------------------------------------------------------------------------------

DOWN = [(32, 1), (32, 1), (32, 2), (64, 2)]  # channels and downsampling factor of each block
UP = [(64, 2), (64, 1), (32, 1), (32, 1)]


def assert_feature_shapes(features, height, width):
    def shapes(blocks):
        return [(2, channels, height // by, width // by) for channels, by in blocks]

    assert set(features) == {"down", "middle", "up"}
    assert [tuple(h.shape) for h in features["down"]] == shapes(DOWN)
    assert tuple(features["middle"].shape) == shapes([(64, 2)])[0]
    assert [tuple(h.shape) for h in features["up"]] == shapes(UP)


def test_feature_vectors_are_one_for_each_block():
    model = small_unet()
    x, t = inputs()
    features = model.get_feature_vectors(x, t)
    assert_feature_shapes(features, 16, 24)
    torch.testing.assert_close(model.out(features["up"][-1]), model(x, t))


def test_feature_vectors_depend_on_the_label():
    model = small_unet(num_classes=3)
    x, t = inputs()
    zero, one = (model.get_feature_vectors(x, t, y=torch.full((2,), y)) for y in (0, 1))
    assert torch.equal(zero["down"][0], one["down"][0])  # before any embedding
    assert not torch.allclose(zero["down"][1], one["down"][1])


@pytest.mark.parametrize("small", [(4, 6), (8, 8), (16, 24)])
def test_super_resolution_features_keep_a_size_that_is_not_square(small):
    model = small_unet(SuperResModel, num_classes=3)
    x, t = inputs()
    kwargs = {"low_res": torch.randn(2, 3, *small), "y": torch.tensor([0, 2])}
    features = model.get_feature_vectors(x, t, **kwargs)
    assert_feature_shapes(features, 16, 24)
    out = model(x, t, **kwargs)
    assert out.shape == x.shape
    torch.testing.assert_close(model.out(features["up"][-1]), out)


def test_super_resolution_stacks_the_bilinear_enlargement_onto_the_image():
    model = small_unet(SuperResModel)
    x, t = inputs()
    low_res = torch.randn(2, 3, 4, 6)
    enlarged = nn.functional.interpolate(low_res, (16, 24), mode="bilinear")
    stacked = UNetModel.forward(model, torch.cat([x, enlarged], dim=1), t)
    torch.testing.assert_close(model(x, t, low_res=low_res), stacked)
    assert model.in_channels == 6
    assert not torch.allclose(model(x, t, low_res=-low_res), stacked)


# -- half precision -------------------------------------------------------------------------------


def test_conversion_to_half_touches_only_the_convolutions_of_the_trunk():
    model = small_unet(num_classes=3)
    identities = [id(p) for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trunk = convolutions_of(model.input_blocks, model.middle_block, model.output_blocks)
    assert model.inner_dtype == torch.float32

    model.convert_to_fp16()
    assert model.inner_dtype == torch.float16
    half = {id(p) for m in trunk for p in m.parameters()}
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float16 if id(p) in half else torch.float32), name
    assert half

    model.convert_to_fp32()
    assert model.inner_dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [id(p) for p in model.parameters()] == identities
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_half_precision_output_is_close_to_full_precision_and_has_the_input_type(dims, scale_shift):
    model = small_unet(dims=dims, use_scale_shift_norm=scale_shift)
    x, t = inputs(dims)
    with torch.no_grad():
        full = model(x, t)
        model.convert_to_fp16()
        half = model(x, t)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)  # it did compute in half precision
    assert_within(half, full, 1e-2)


def test_half_precision_network_trains():
    """Gradients have the types of their parameters and are close to those of float32."""
    model = small_unet()
    x, t = inputs()
    model(x, t).square().mean().backward()
    full = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    model.convert_to_fp16()
    (1024 * model(x, t).square().mean()).backward()  # loss scaling
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
        if full[name].norm() > 1e-4:  # some gradients are zero but for rounding
            error = (parameter.grad.float() / 1024 - full[name]).norm() / full[name].norm()
            assert error < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["half", "double"])
@pytest.mark.parametrize("converted", [False, True])
def test_output_has_the_type_of_the_input(dtype, converted):
    model = small_unet()
    x, t = inputs()
    with torch.no_grad():
        full = model(x, t)
        if converted:
            model.convert_to_fp16()
        out = model(x.to(dtype), t)
    assert out.dtype == dtype
    assert_within(out.float(), full, 1e-2)


def test_features_of_a_half_precision_network_have_the_input_type():
    model = small_unet()
    model.convert_to_fp16()
    features = model.get_feature_vectors(*inputs())
    tensors = [*features["down"], features["middle"], *features["up"]]
    assert {h.dtype for h in tensors} == {torch.float32}


@pytest.mark.parametrize("half_first", [False, True])
def test_state_dict_loads_strictly_between_precisions(half_first):
    source, target = small_unet(), UNetModel(**small_options())
    (source if half_first else target).convert_to_fp16()
    types = [p.dtype for p in target.parameters()]
    target.load_state_dict(source.state_dict(), strict=True)
    assert [p.dtype for p in target.parameters()] == types
    x, t = inputs()
    assert_within(target.eval()(x, t).detach(), source(x, t).detach(), 1e-2)


def test_copy_of_a_network_is_converted_alone():
    model = small_unet()
    twin = copy.deepcopy(model)
    twin.convert_to_fp16()
    assert (model.inner_dtype, twin.inner_dtype) == (torch.float32, torch.float16)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert model.inner_dtype == torch.float32


# -- a user's mistakes ----------------------------------------------------------------------------


def message_of(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("heads", "nearest"), [(6, "4 and 8"), (0, "1 and 2"), (3, "2 and 4"), (100, "32 and 64")]
)
def test_heads_that_do_not_divide_are_an_error_with_the_nearest_that_do(heads, nearest):
    with pytest.raises(UserError) as error:
        UNetModel(**small_options(num_heads=heads))
    message = message_of(error)
    assert f"num_heads {heads} " in message
    assert "64 channels" in message
    assert message.endswith(f"nearest that do are {nearest}")


def test_heads_of_the_upsampling_path_that_do_not_divide_are_named_as_such():
    with pytest.raises(UserError) as error:
        UNetModel(**small_options(num_heads_upsample=6))
    message = message_of(error)
    assert "num_heads_upsample 6 " in message
    assert "4 and 8" in message


@pytest.mark.parametrize(
    ("changes", "width", "nearest"),
    [
        ({"model_channels": 48}, 48, "32 or 64"),
        ({"model_channels": 16}, 16, "32"),
        ({"channel_mult": (1, 2.25)}, 72, "64 or 96"),
    ],
)
def test_channels_that_are_no_multiple_of_the_groups_are_an_error(changes, width, nearest):
    with pytest.raises(UserError) as error:
        UNetModel(**small_options(**changes))
    message = message_of(error)
    assert "num_channels" in message
    assert f"{width} channels" in message
    assert message.endswith(f"nearest are {nearest}")


def test_missing_labels_are_an_error():
    x, t = inputs()
    with pytest.raises(ValueError, match=r"is class-conditional.*pass labels y") as error:
        small_unet(num_classes=3)(x, t)
    message_of(error)


def test_labels_in_vain_are_an_error():
    x, t = inputs()
    with pytest.raises(ValueError, match=r"not class-conditional.*no labels") as error:
        small_unet()(x, t, y=torch.tensor([0, 1]))
    message_of(error)


@pytest.mark.parametrize("method", ["__call__", "get_feature_vectors"])
@pytest.mark.parametrize(
    ("dims", "size", "multiple"),
    [(1, (22,), 4), (2, (18, 16), 4), (2, (16, 18), 4), (3, (4, 8, 10), 4)],
)
def test_sides_that_cannot_be_halved_are_an_error_with_the_multiple(dims, size, multiple, method):
    model = small_unet(dims=dims, channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match=f"multiple of {multiple}") as error:
        getattr(model, method)(torch.zeros(1, 3, *size), torch.zeros(1))
    message = message_of(error)
    assert "halved 2 times" in message
    assert str(size[-1]) in message


def test_network_of_one_level_takes_any_size():
    model = small_unet(channel_mult=(1,), attention_resolutions=())
    assert model(torch.zeros(1, 3, 7, 5), torch.zeros(1)).shape == (1, 3, 7, 5)


@pytest.mark.parametrize("method", ["__call__", "get_feature_vectors"])
def test_missing_low_res_is_an_error(method):
    x, t = inputs()
    with pytest.raises(ValueError, match="low_res") as error:
        getattr(small_unet(SuperResModel), method)(x, t)
    message_of(error)
