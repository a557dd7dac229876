"""In which ways the benchmarks measure a network, on a CPU and on a GPU."""

import pytest
import torch
from script_runner import load_module
from test_unet import inputs, small_unet

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def variants():
    return load_module("benchmarks", "variants")


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_a_gpu_has_tf32_and_compiled_ones(variants):
    assert variants.variants(CPU) == ["ours fp32", "ours bf16"]
    assert variants.variants(CPU, compiled=True)[2:] == [
        "ours fp32, compiled",
        "ours bf16, compiled",
    ]
    of_gpu = variants.variants(GPU, whose="diffusers")
    assert of_gpu[:3] == ["diffusers fp32", "diffusers tf32", "diffusers bf16"]
    assert of_gpu[3:] == [f"{name}, compiled" for name in of_gpu[:3]]


@pytest.mark.parametrize("name", ["plain fp32", "ours fp32, checkpointing", "diffusers"])
def test_candidates_of_float32(variants, name):
    assert variants.precision_of(name) == "fp32"
    assert not variants.is_compiled(name)
    assert variants.switched(switches, name)() == (False, False)


def test_tf32_is_on_for_its_candidates_alone(variants):
    before = switches()
    for precision in ("fp32", "tf32", "bf16"):
        for name in (f"ours {precision}", f"ours {precision}, compiled"):
            assert variants.precision_of(name) == precision
            assert variants.switched(switches, name)() == (precision == "tf32",) * 2
            assert switches() == before
            with variants.autocast(name, CPU):
                assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


def test_network_is_compiled_if_its_name_says_so(variants, as_on_a_gpu):
    network, (x, t) = small_unet(), inputs()
    assert variants.compiled_if_named(network, "ours bf16") is network
    expected = network(x, t)
    assert network._compiled_call_impl is None
    compiled = variants.compiled_if_named(network, "ours fp32, compiled")
    assert network._compiled_call_impl is not None
    torch.testing.assert_close(compiled(x, t), expected)


def test_peaks_are_those_of_each_precision(variants, monkeypatch):
    def product(dtype, device):
        made = (dtype, *switches())
        return lambda: (made, switches())

    monkeypatch.setattr(variants, "matmul", product)
    assert list(variants.peaks(CPU)) == ["product of matrices, fp32", "product of matrices, bf16"]
    found = variants.peaks(GPU)
    on, off = (True, True), (False, False)
    assert found[variants.peak_of("ours fp32")]() == ((torch.float32, *off), off)
    assert found[variants.peak_of("ours tf32, compiled")]() == ((torch.float32, *on), on)
    assert found[variants.peak_of("diffusers bf16")]() == ((torch.bfloat16, *off), off)
