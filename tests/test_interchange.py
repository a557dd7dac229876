"""Networks of ours as diffusers' and back: the same bits, the same outputs, or an option's name."""

import dataclasses
import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch

from improved_diffusion import diffusers_files, diffusers_weights, interchange
from improved_diffusion.checkpoint import describe_weights, model_name
from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.diffusers_format import (
    layout_of,
    scheduler_config,
    scheduler_flags,
    unet_config,
    unet_flags,
)
from improved_diffusion.diffusers_weights import from_diffusers, layers, to_diffusers
from improved_diffusion.dist_util import load_state_dict
from improved_diffusion.flags import defaults
from improved_diffusion.interchange import Checkpoint, convert, read_checkpoint
from improved_diffusion.safetensors_format import read_flags, write_safetensors
from improved_diffusion.script_util import ModelAndDiffusionOptions, SuperResOptions

diffusers = pytest.importorskip("diffusers")

CLOSE = 1e-4  # relative to the largest output
SMALL = {
    "image_size": 8,
    "channels": 3,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "attention_resolutions": "4",
    "num_heads": 1,
}
ARCHITECTURES = {
    "plain": {},
    "no attention": {"attention_resolutions": ""},
    "attention at all levels": {"attention_resolutions": "8,4,2"},
    "heads": {"num_heads": 2, "attention_resolutions": "4,2"},
    "heads on the way up": {"channel_mult": "1,1", "num_heads": 2, "num_heads_upsample": 2},
    "width of heads": {"num_head_channels": 16, "attention_resolutions": "8,2"},
    "new order": {"num_head_channels": 16, "use_new_attention_order": True},
    "two blocks": {"num_res_blocks": 2, "use_scale_shift_norm": False},
    "1, 1, 2": {"channel_mult": "1,1,2", "attention_resolutions": "8,4"},
    "narrower below": {"channel_mult": "1,3,2", "num_channels": 64, "attention_resolutions": ""},
    "a third more": {"channel_mult": "1,1.3333333333333333", "num_channels": 96},
    "one level": {"channel_mult": "1", "attention_resolutions": ""},
    "updown": {"resblock_updown": True},
    "updown, all attend": {"resblock_updown": True, "attention_resolutions": "8,4,2"},
    "classes": {"class_cond": True, "num_classes": 5},
    "null class": {"class_cond": True, "num_classes": 5, "class_dropout": 0.1},
    "learned variance": {"learn_sigma": True, "channels": 1},
    "not square": {"image_size": (8, 16), "dropout": 0.25, "attention_resolutions": "8"},
}


def options(**flags):
    return ModelAndDiffusionOptions(**{**SMALL, **flags})


def wake(network):
    """Random weights in place of zeros, which would hide what is wrong behind them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return network.eval()


def checkpoint_of(chosen, network=None):
    """A checkpoint as it is read from a file."""
    network = wake(chosen.model()) if network is None else network
    return Checkpoint(type(chosen), dataclasses.asdict(chosen), network)


def inputs(network, size):
    """x, t and class labels."""
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(3, network.in_channels, height, width)
    t = torch.tensor([0, 431, 999])
    rows = getattr(network, "label_emb", None)
    y = None if rows is None else torch.tensor([0, 2, rows.num_embeddings - 1])
    return x, t, y


@torch.no_grad()
def assert_same_outputs(ours, theirs, size):
    x, t, y = inputs(ours, size)
    output = ours(x, t, y)
    assert output.abs().max() > 0.1
    difference = (output - theirs(x, t, class_labels=y).sample).abs().max()
    assert difference < CLOSE * output.abs().max()


# -- networks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name):
    """The outputs there are ours; the weights come back to the bit; so does what they mean."""
    chosen = options(**ARCHITECTURES[name])
    network = wake(chosen.model())
    layout, config = layout_of(network), unet_config(network, chosen.image_size)
    there = diffusers.UNet2DModel(**config).eval()
    there.load_state_dict(to_diffusers(network.state_dict(), layout))
    assert_same_outputs(network, there, chosen.image_size)

    back = from_diffusers(there.state_dict(), layout)
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in network.state_dict().items())

    flags = {**unet_flags(there.config), "class_dropout": chosen.class_dropout}
    if chosen.class_dropout:
        flags["num_classes"] -= 1
    order = {"use_new_attention_order": chosen.use_new_attention_order}
    again = ModelAndDiffusionOptions(**flags, **order).model()
    again.load_state_dict(back)
    assert layout_of(again) == layout
    assert unet_config(again, chosen.image_size) == config
    x, t, y = inputs(network, chosen.image_size)
    with torch.no_grad():
        assert torch.equal(again.eval()(x, t, y), network(x, t, y))


def test_every_layer_is_in_the_table_once():
    network = options(attention_resolutions="8,4,2", class_cond=True).model()
    table = list(layers(layout_of(network)))
    ours, theirs = [], []
    for layer in table:
        ours.append(layer.ours)
        theirs += layer.theirs
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)
    assert {key.rpartition(".")[0] for key in network.state_dict()} <= set(ours)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({}, {"num_head_channels": 8, "attention_resolutions": "4"}),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}, {}),
        ({"attention_head_dim": None}, {"num_heads": 1, "num_head_channels": -1}),
        ({"num_class_embeds": 7}, {"class_cond": True, "num_classes": 7}),
        ({"out_channels": 6, "dropout": 0.5}, {"learn_sigma": True, "dropout": 0.5}),
        ({"downsample_type": "resnet", "upsample_type": "resnet"}, {"resblock_updown": True}),
        ({"sample_size": [8, 16], "act_fn": "swish"}, {"image_size": (8, 16)}),
    ],
)
def test_network_of_theirs_becomes_ours(config, flags):
    """With the defaults of ``UNet2DModel`` where nothing else is said."""
    levels = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8}
    types = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    if "downsample_type" in config:
        types["down_block_types"] = ("AttnDownBlock2D", "AttnDownBlock2D")
        types["up_block_types"] = ("AttnUpBlock2D", "AttnUpBlock2D")
    there = wake(diffusers.UNet2DModel(**{**levels, **types, **config}))
    found = unet_flags(there.config)
    assert found.items() >= flags.items()
    network = ModelAndDiffusionOptions(**found).model().eval()
    network.load_state_dict(from_diffusers(there.state_dict(), layout_of(network)))
    assert_same_outputs(network, there, found["image_size"])


# -- what has no counterpart


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"channel_mult": "2,2"}, ["--channel_mult 2,2"]),
        ({"num_heads": 4}, ["--num_heads 4", "8 or 16", "--num_head_channels"]),
        (
            {"channel_mult": "1,1,1", "num_heads": 2, "num_heads_upsample": 4},
            ["--num_heads_upsample 4", "--num_heads 2"],
        ),
        ({"predict": "flow"}, ["--predict flow", "eps, xstart, v"]),
        ({"diffusion_steps": 50}, ["--rescale_timesteps True", "--diffusion_steps 50"]),
    ],
)
def test_option_of_ours_without_a_counterpart(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(interchange, "_whole", None)  # it comes before anything is written
    chosen = options(**{"attention_resolutions": "8,4,2", **flags})
    with pytest.raises(ValueError, match="has no counterpart in diffusers") as error:
        convert(checkpoint_of(chosen), "diffusers", str(tmp_path / "out"))
    assert all(word in str(error.value) for word in words), error.value
    assert not list(tmp_path.iterdir())


def test_super_resolution_has_no_counterpart(tmp_path):
    flags = {name: value for name, value in SMALL.items() if name != "image_size"}
    source = checkpoint_of(SuperResOptions(**flags, large_size=8, small_size=4))
    with pytest.raises(ValueError, match="a super-resolution network has no counterpart"):
        convert(source, "diffusers", str(tmp_path / "out"))
    assert convert(source, "safetensors", str(tmp_path / "sr.safetensors")).difference == 0


# of the file config.json beside the weights of google/ddpm-cifar10-32
DDPM_CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def their_config(**changes):
    """All arguments of a small ``UNet2DModel``."""
    network = options(attention_resolutions="4").model()
    with torch.device("meta"):
        return {**diffusers.UNet2DModel(**unet_config(network, 8)).config, **changes}


def test_ported_ddpm_has_no_counterpart():
    with torch.device("meta"):
        config = diffusers.UNet2DModel(**DDPM_CIFAR10).config
    with pytest.raises(ValueError, match="have no counterpart here") as error:
        unet_flags(config)
    for option in ("freq_shift 1", "flip_sin_to_cos False", "downsample_padding 0", "norm_eps"):
        assert option in str(error.value)
    fitting = {"freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5}
    assert unet_flags({**config, **fitting})["attention_resolutions"] == "16"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 (here 1e-05) has"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        ({"time_embedding_dim": 64}, "time_embedding_dim 64 (here None or 128)"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift spatial"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups None (here 32)"),
        ({"add_attention": False}, "add_attention False"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"attention_head_dim": 24}, "attention_head_dim 24"),
        ({"out_channels": 4}, "out_channels 4 with in_channels 3"),
        ({"sample_size": None}, "sample_size is None: give --image_size"),
        ({"down_block_types": ("SkipDownBlock2D",) * 3}, "down_block_types SkipDownBlock2D"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types UpBlock2D, UpBlock2D, UpBlock2D"),
        ({"downsample_type": "resnet"}, "downsample_type and upsample_type resnet"),
    ],
)
def test_option_of_theirs_without_a_counterpart(changes, words):
    with pytest.raises(ValueError, match="diffusers'") as error:
        unet_flags(their_config(**changes))
    assert words in str(error.value)


# -- the process


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"noise_schedule": "cosine", "predict": "v", "sigma_small": True},
        {"noise_schedule": "sigmoid", "diffusion_steps": 40, "rescale_timesteps": False},
        {"noise_schedule": "cosine_shifted", "predict": "xstart", "learn_sigma": True},
        {"predict": "v", "zero_terminal_snr": True},
        {"betas": "0.1,0.2,0.5", "diffusion_steps": 3, "rescale_timesteps": False},
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_process_there_and_back(flags):
    chosen = options(**flags)
    config = scheduler_config(dataclasses.asdict(chosen), chosen.diffusion().betas)
    there = diffusers.DDPMScheduler(**json.loads(json.dumps(config)))
    alpha_bar = chosen.diffusion().alphas_cumprod
    assert np.allclose(there.alphas_cumprod, alpha_bar, rtol=1e-4, atol=1e-6)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(there.config)
    solver.set_timesteps(2)
    assert solver.sigmas.isfinite().all()  # of a process that ends without signal too
    network = {"learn_sigma": chosen.learn_sigma, "image_size": 8}
    back = scheduler_flags(there.config, np.array(there.config.trained_betas), network)
    assert np.allclose(options(**back).diffusion().betas, chosen.diffusion().betas, atol=0)
    expected = {**dataclasses.asdict(chosen), "predict": chosen.predict or "eps"}
    assert {**back, "betas": chosen.betas}.items() <= expected.items()
    assert bool(back["betas"]) == bool(chosen.betas)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"noise_schedule": "linear", "zero_terminal_snr": False, "sigma_small": True}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"noise_schedule": "cosine"}),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"noise_schedule": "scaled_linear", "betas": ""},
        ),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"predict": "v", "zero_terminal_snr": True, "noise_schedule": "linear"},
        ),
        ({"beta_end": 0.03, "variance_type": "fixed_large"}, {"sigma_small": False}),
        ({"num_train_timesteps": 50}, {"diffusion_steps": 50, "rescale_timesteps": False}),
    ],
)
def test_schedule_of_theirs_is_known_by_name_or_kept_as_numbers(theirs, ours):
    there = diffusers.DDPMScheduler(**theirs)
    config = dict(there.config)
    found = scheduler_flags(
        config,
        diffusers_files._scheduler(diffusers, config).betas,
        {"learn_sigma": False, "image_size": 8},
    )
    assert found.items() >= ours.items()
    alpha_bar = options(**found).diffusion().alphas_cumprod
    assert np.allclose(there.alphas_cumprod, alpha_bar, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type flow_prediction"),
        ({"variance_type": "fixed_large_log"}, "variance_type fixed_large_log"),
        ({"variance_type": "learned_range"}, "variance_type learned_range"),
    ],
)
def test_process_of_theirs_without_a_counterpart(config, words):
    network = {"learn_sigma": False, "image_size": 8}
    with pytest.raises(ValueError, match=words):
        scheduler_flags({"beta_schedule": "linear", **config}, np.full(3, 0.1), network)


# -- folders and files


ALL_FLAGS = {
    **defaults(ClassifierOptions),
    **defaults(SuperResOptions),
    **defaults(ModelAndDiffusionOptions),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A checkpoint of ours, and the folder of diffusers that it became."""
    chosen = options(
        class_cond=True,
        num_classes=3,
        class_dropout=0.2,
        num_heads=2,
        attention_resolutions="2",
        use_new_attention_order=True,
        diffusion_steps=40,
        rescale_timesteps=False,
        noise_schedule="cosine",
        predict="v",
        learn_sigma=True,
    )
    source = checkpoint_of(chosen)
    source.flags["class_names"] = ["cat", "dog", "owl"]
    source.flags["labels_from"] = "folders"
    folder = tmp_path_factory.mktemp("pipeline") / "out"
    comparison = convert(source, "diffusers", str(folder))
    assert 0 < comparison.relative < 1e-5
    return source, folder


def same_weights(first, second):
    pairs = zip(
        first.network.state_dict().items(), second.network.state_dict().items(), strict=True
    )
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_flags_come_back_with_the_weights(pipeline):
    source, folder = pipeline
    back = read_checkpoint(str(folder), ALL_FLAGS, set())
    assert back.flags == source.flags
    assert same_weights(source, back)


def test_network_without_our_flags_comes_back(pipeline, tmp_path):
    """A folder that others made: the last label is none of the null class unless one says so."""
    source, folder = pipeline
    copy = tmp_path / "copy"
    diffusers.DDPMPipeline.from_pretrained(folder).save_pretrained(copy)
    assert not (copy / "improved_diffusion.json").exists()
    back = read_checkpoint(str(copy), ALL_FLAGS, set())
    assert (back.flags["num_classes"], back.flags["class_dropout"]) == (4, 0)
    assert (back.flags["noise_schedule"], back.flags["predict"]) == ("cosine", "v")
    given = {"class_dropout": 0.1, "use_new_attention_order": True}
    back = read_checkpoint(str(copy), {**ALL_FLAGS, **given}, set(given))
    assert (back.flags["num_classes"], back.flags["class_dropout"]) == (3, 0.1)
    assert same_weights(source, back)


def test_network_alone_takes_its_process_from_the_flags(pipeline, tmp_path, caplog):
    _, folder = pipeline
    given = {"diffusion_steps": 40, "noise_schedule": "cosine", "predict": "v"}
    shutil.copytree(folder / "unet", tmp_path / "unet")  # without our flags in the folder above
    back = read_checkpoint(str(tmp_path / "unet"), {**ALL_FLAGS, **given}, set(given))
    assert "no scheduler beside the network" in caplog.text
    assert "--predict v --noise_schedule cosine --diffusion_steps 40" in caplog.text
    assert back.flags.items() >= {**given, "rescale_timesteps": False}.items()


@pytest.mark.parametrize("place", ["inside", "above"])
def test_our_flags_tell_the_process_of_a_network_alone(pipeline, tmp_path, caplog, place):
    source, folder = pipeline
    shutil.copytree(folder / "unet", tmp_path / "unet")
    home = tmp_path / "unet" if place == "inside" else tmp_path
    shutil.copy(folder / "improved_diffusion.json", home)
    back = read_checkpoint(f"{tmp_path}/unet/", ALL_FLAGS, set())
    assert back.flags == source.flags
    assert not caplog.text


def test_our_flags_above_a_network_count_if_the_scheduler_there_agrees(pipeline, tmp_path, caplog):
    _, folder = pipeline
    flags = json.loads((folder / "improved_diffusion.json").read_text())
    shutil.copytree(folder / "unet", tmp_path / "unet")
    shutil.copytree(folder / "scheduler", tmp_path / "scheduler")
    other = {**flags, "noise_schedule": "linear"}
    (tmp_path / "improved_diffusion.json").write_text(json.dumps(other))
    back = read_checkpoint(str(tmp_path / "unet"), ALL_FLAGS, set())
    assert "tells of another network" in caplog.text
    assert back.flags["noise_schedule"] == "cosine"


@pytest.mark.parametrize("part", ["scheduler", "unet"])
def test_pipeline_without_a_part_that_it_names_is_damaged(pipeline, tmp_path, part):
    _, folder = pipeline
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"copy' is damaged: {part}/.*json is missing"):
        read_checkpoint(str(copy), ALL_FLAGS, set())


@pytest.mark.parametrize(
    ("name", "variant"),
    [("diffusion_pytorch_model.bin", None), ("diffusion_pytorch_model.fp16.safetensors", "fp16")],
)
def test_other_files_of_weights(pipeline, tmp_path, caplog, monkeypatch, name, variant):
    """Quietly: the library tells of a file that it does without as of an error."""
    source, folder = pipeline
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    kind = {"safe_serialization": name.endswith(".safetensors"), "variant": variant}
    network.save_pretrained(tmp_path / "unet", **kind)
    assert (tmp_path / "unet" / name).exists()
    shutil.copy(folder / "improved_diffusion.json", tmp_path)
    theirs = logging.getLogger("diffusers")
    monkeypatch.setattr(theirs, "handlers", [*theirs.handlers, caplog.handler])
    assert same_weights(source, read_checkpoint(str(tmp_path / "unet"), ALL_FLAGS, set()))
    words = ["its weights are those of the variant fp16: the folder holds no others"]
    assert caplog.messages == (words if variant else [])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "is damaged: it has no weights"),
        (["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.ema.bin"], "ema, fp16"),
    ],
)
def test_folder_without_one_file_of_weights(pipeline, tmp_path, names, words):
    _, folder = pipeline
    shutil.copy(folder / "unet" / "config.json", tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=words):
        read_checkpoint(str(tmp_path), ALL_FLAGS, set())


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"large_size"}, "--large_size is no flag of a diffusion model"),
        ({"classifier_width", "small_size"}, "--classifier_width --small_size are no flags of a"),
    ],
)
@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
def test_flags_of_other_networks_are_refused(pipeline, tmp_path, names, what, form):
    source, folder = pipeline
    if form == "safetensors":
        folder = tmp_path / "a.safetensors"
        write_safetensors(str(folder), source.network.state_dict(), source.flags)
    with pytest.raises(ValueError, match=what):
        read_checkpoint(str(folder), ALL_FLAGS, names)


def test_flags_of_another_network_do_not_count(pipeline, tmp_path, caplog):
    _, folder = pipeline
    copy = tmp_path / "copy"
    diffusers.DDPMPipeline.from_pretrained(folder).save_pretrained(copy)
    flags = json.loads((folder / "improved_diffusion.json").read_text())
    (copy / "improved_diffusion.json").write_text(json.dumps({**flags, "noise_schedule": "linear"}))
    back = read_checkpoint(str(copy), ALL_FLAGS, set())
    assert "tells of another network" in caplog.text
    assert back.flags["noise_schedule"] == "cosine"


def test_flag_that_contradicts_the_pipeline_names_both(pipeline):
    _, folder = pipeline
    flags = {**ALL_FLAGS, "noise_schedule": "sigmoid"}
    with pytest.raises(ValueError, match="--noise_schedule sigmoid contradicts") as error:
        read_checkpoint(str(folder), flags, {"noise_schedule"})
    assert "--noise_schedule cosine" in str(error.value)


def test_pipeline_draws_our_samples(tmp_path):
    """``DDPMPipeline`` and :meth:`p_sample_loop` from the same noise, with a learned variance."""
    chosen = options(
        learn_sigma=True,
        diffusion_steps=10,
        rescale_timesteps=False,
        predict="xstart",
        noise_schedule="cosine",
    )
    source = checkpoint_of(chosen)
    convert(source, "diffusers", str(tmp_path / "out"))
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=10,
        output_type="pt",
        return_dict=False,
    )[0]
    ours = chosen.diffusion().p_sample_loop(
        source.network, (2, 3, 8, 8), generator=torch.Generator().manual_seed(3)
    )
    ours = (ours / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_index.json": {"vqvae": ["diffusers", "VQModel"]}}, "diffusers' vqvae VQModel"),
        ({"unet/config.json": {"_class_name": "UNet2DConditionModel"}}, "UNet2DConditionModel"),
        ({"unet/config.json": {"layers_per_block": 2}}, "is damaged"),
        ({"unet/config.json": {"norm_eps": 1e-6}}, "norm_eps 1e-06"),
        ({"scheduler/scheduler_config.json": {"beta_schedule": None}}, "has no betas"),
    ],
)
def test_folder_of_theirs_that_cannot_become_ours(pipeline, tmp_path, changes, words):
    _, folder = pipeline
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    for name, entries in changes.items():
        content = {**json.loads((tmp_path / name).read_text()), **entries}
        content = {key: value for key, value in content.items() if value is not None}
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_checkpoint(str(tmp_path), ALL_FLAGS, set())


@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
def test_missing_package_is_named(tmp_path, monkeypatch, form):
    for name in ("diffusers", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"pip install 'improved-diffusion\[{form}\]'"):
        convert(checkpoint_of(options()), form, str(tmp_path / "a.safetensors"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_conversion_that_changes_the_outputs(tmp_path, monkeypatch):
    def wrong(state, layout):
        made = to_diffusers(state, layout)
        query = "mid_block.attentions.0.to_q.weight"
        return {**made, query: made[query].flip(0)}

    monkeypatch.setattr(interchange, "to_diffusers", wrong)
    with pytest.raises(ValueError, match=r"outputs differ by .* nothing was written"):
        convert(checkpoint_of(options()), "diffusers", str(tmp_path / "new" / "out"))
    assert not list(tmp_path.iterdir())


def untrained():
    """A network as it begins: its last layer, and that of every block, is 0."""
    torch.manual_seed(0)
    chosen = options()
    return checkpoint_of(chosen, chosen.model().eval())


@pytest.fixture
def wrong_tables(monkeypatch):
    """From a call on, a mapping that is wrong alike on the way there and on the way back."""

    def begin():
        turned = {**diffusers_weights.ATTENTION, "qkv": "to_k to_q to_v"}
        monkeypatch.setattr(diffusers_weights, "ATTENTION", turned)

    return begin


def test_networks_that_give_nothing_are_compared_with_noise(tmp_path, caplog):
    source = untrained()
    there = convert(source, "diffusers", str(tmp_path / "out"))
    assert "outputs are 0 everywhere" in caplog.text
    assert there.of_noise
    assert there.largest > 0.1
    assert there.relative < 1e-5
    back = read_checkpoint(str(tmp_path / "out"), ALL_FLAGS, set())
    assert same_weights(source, back)  # the noise is in none of them
    assert convert(back, "openai", str(tmp_path / "back")).of_noise
    assert same_weights(source, back)


def test_wrong_mapping_of_a_network_that_gives_nothing_is_noticed(tmp_path, wrong_tables):
    """There: what comes back is the same to the bit, and the outputs are 0 anyhow."""
    wrong_tables()
    with pytest.raises(ValueError, match="outputs differ by"):
        convert(untrained(), "diffusers", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_wrong_mapping_of_a_foreign_network_that_gives_nothing_is_noticed(tmp_path, wrong_tables):
    convert(untrained(), "diffusers", str(tmp_path / "out"))
    wrong_tables()
    source = read_checkpoint(str(tmp_path / "out"), ALL_FLAGS, set())
    with pytest.raises(ValueError, match="outputs differ by"):
        convert(source, "openai", str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_weights_that_change_on_the_way_are_noticed(tmp_path, monkeypatch):
    """Though the outputs of the network, which are 0, stay what they are."""

    def wrong(path, state, flags):
        key = "input_blocks.1.0.in_layers.2.weight"
        write_safetensors(path, {**state, key: state[key].flip(0)}, flags)

    monkeypatch.setattr(interchange, "write_safetensors", wrong)
    with pytest.raises(ValueError, match="weights did not come back"):
        convert(untrained(), "safetensors", str(tmp_path / "a.safetensors"))
    assert not list(tmp_path.iterdir())


def test_weights_say_what_they_were_converted_from(tmp_path):
    """By all formats, one after another."""
    name = "ema_0.99_001500.pt"
    source = dataclasses.replace(checkpoint_of(options()), name=name)
    file, folder, last = (str(tmp_path / n) for n in ("a.safetensors", "there", "back"))
    convert(source, "safetensors", file)
    convert(read_checkpoint(file, ALL_FLAGS, set()), "diffusers", folder)
    convert(read_checkpoint(folder, ALL_FLAGS, set()), "openai", last)
    for path in (file, f"{last}/{model_name(0)}"):
        assert describe_weights(path) == f"converted from {name}"
        assert read_checkpoint(path, ALL_FLAGS, set()).name == name
    shutil.copy(f"{last}/{model_name(0)}", f"{last}/ema_0.9_000300.pt")
    assert describe_weights(f"{last}/ema_0.9_000300.pt") == "weights averaged at rate 0.9"
    other = read_checkpoint(f"{last}/ema_0.9_000300.pt", ALL_FLAGS, set())
    assert other.name == "ema_0.9_000300.pt"


def test_name_of_a_file_or_folder_is_where_weights_come_from(pipeline, tmp_path):
    source, folder = pipeline
    assert read_checkpoint(f"{folder}/", ALL_FLAGS, set()).name == "out"
    convert(source, "safetensors", str(tmp_path / "a.safetensors"))
    back = read_checkpoint(str(tmp_path / "a.safetensors"), ALL_FLAGS, set())
    assert back.name == "a.safetensors"
    assert describe_weights(str(tmp_path / "a.safetensors")) == "weights"


def test_safetensors_file_is_a_whole_checkpoint(tmp_path):
    source = checkpoint_of(options(learn_sigma=True))
    source.flags["labels_from"] = "folders"
    path = str(tmp_path / "a.safetensors")
    assert convert(source, "safetensors", path).difference == 0
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    assert read_flags(path) == source.flags
    back = read_checkpoint(path, ALL_FLAGS, set())
    assert back.flags == source.flags
    assert same_weights(source, back)
    assert load_state_dict(path, map_location="cpu").keys() == source.network.state_dict().keys()


def test_safetensors_file_of_others_has_no_flags(tmp_path):
    import safetensors.torch

    path = str(tmp_path / "a.safetensors")
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    assert read_flags(path) == {}
    assert load_state_dict(path)["weight"].tolist() == [1, 1]


@pytest.mark.parametrize("length", [0, 4, 40, -10])
def test_damaged_safetensors_file(tmp_path, length):
    path = str(tmp_path / "a.safetensors")
    write_safetensors(path, {"weight": torch.ones(20)}, {"image_size": 8})
    with open(path, "rb+") as file:
        file.truncate(length if length >= 0 else len(file.read()) + length)
    with pytest.raises(ValueError, match="safetensors' is damaged"):
        load_state_dict(path)
    if length >= 0:
        with pytest.raises(ValueError, match="safetensors' is damaged"):
            read_flags(path)
