"""Peers of the benchmarks: workers of other libraries, here of diffusers, in this environment."""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch
from script_runner import load_module

from improved_diffusion.script_util import ModelAndDiffusionOptions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs the extra 'diffusers'"
)
CPU = torch.device("cpu")
# two attending levels, whose heads have 16 and 32 channels
OPTIONS = ModelAndDiffusionOptions(
    image_size=8,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8,4",
    num_heads=2,
    learn_sigma=True,
)


@pytest.fixture(scope="module")
def peers():
    return load_module("benchmarks", "peers")


@pytest.fixture(scope="module")
def configuration():
    made = load_module("benchmarks", "configurations").Configuration
    return made(OPTIONS, batch=2, batch_on_gpu=2)


@pytest.fixture(scope="module")
def network(configuration):
    return configuration.network(CPU)


@pytest.fixture(scope="module")
def settings(peers, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    return peers.diffusers_settings(OPTIONS, (2, 3, 8, 8), network, str(folder))


@pytest.fixture(scope="module")
def peer(peers):
    with peers.Peer("diffusers", CPU, python=sys.executable) as worker:
        yield worker


def test_peer_computes_what_ours_does(peer, settings, network, tmp_path):
    """With the same weights, though a head is not as wide in one level as in the other."""
    path = str(tmp_path / "output.pt")
    peer.prepare("forward", settings, output=path)
    found = torch.load(path)
    with torch.no_grad():
        ours = network(found["x"], found["t"])
    assert (ours - found["output"]).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("what", ["forward", "training"])
def test_peer_counts_the_operations_of_ours(peer, settings, network, what):
    """As many as the plain rendering has, of which every operation is counted."""
    count = load_module("benchmarks", "peer_tasks").count_operations
    plain = load_module("benchmarks", "plain_unet").plain(network)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    runs = {
        "forward": lambda: plain(x, t).detach(),
        "training": lambda: plain(x, t).square().mean().backward(),
    }
    facts = peer.prepare(what, settings).facts
    assert facts["operations"] == count(runs[what])
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["attention"] == "AttnProcessor2_0"


@pytest.mark.parametrize("what", ["forward", "training", "training_step"])
def test_run_returns_seconds_by_the_workers_clock(peer, settings, what):
    prepared = peer.prepare(what, settings, precision="bf16")
    started = time.perf_counter()
    assert 0 < prepared() < time.perf_counter() - started
    assert prepared.facts["precision"] == "bf16"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_samplers_take_their_steps(peer, settings, sampler):
    one = peer.prepare("sampling_step", settings, sampler=sampler, steps=5)
    assert one.facts["steps"] == 5
    assert one() > 0
    whole = peer.prepare("sample", settings, sampler=sampler, steps=3)
    assert whole() > 0
    forward = peer.prepare("forward", settings)
    assert whole.facts["operations"] == 3 * forward.facts["operations"]


def test_threads_are_those_of_this_process(peer):
    assert peer.versions["threads"] == torch.get_num_threads()
    assert peer.versions["torch"] == torch.__version__


def test_error_of_a_worker_is_one_line_and_not_its_end(peer, settings):
    with pytest.raises(ValueError, match=r"peer diffusers: .*cannot prepare 'dreams'") as error:
        peer.prepare("dreams", settings)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="peer diffusers: KeyError"):
        peer.prepare("sample", settings, sampler="euler", steps=2)
    peer.prepare("forward", settings)


def test_sampling_that_a_peer_lacks_is_left_out(peers):
    assert set(peers.SAMPLERS) == set(peers.KINDS)
    assert "dpmpp_2m" not in peers.SAMPLERS["denoising_diffusion"]


def test_heads_on_the_way_up_have_no_counterpart(peers, configuration, tmp_path):
    other = dataclasses.replace(
        configuration, options=dataclasses.replace(OPTIONS, num_heads_upsample=4)
    )
    with pytest.raises(ValueError, match="num_heads_upsample"):
        peers.diffusers_settings(other.options, (2, 3, 8, 8), other.network(CPU), str(tmp_path))


# -- the process ----------------------------------------------------------------------------------


def test_unknown_kind_names_those_there_are(peers):
    with pytest.raises(ValueError, match="no peer 'jax': choose among diffusers, denoising_diff"):
        peers.Peer("jax", CPU)


def test_without_the_environment_benchmarks_have_no_peers(peers, configuration, monkeypatch):
    monkeypatch.setattr(peers, "PYTHON", Path("nowhere/python"))
    assert "make peers" in peers.missing()
    with peers.unet_candidates(configuration, CPU) as candidates:
        assert candidates == {}
    with pytest.raises(ValueError, match="make peers"):
        peers.Peer("diffusers", CPU)


@pytest.fixture
def bare_python(tmp_path):
    """An environment without any library."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_environment_without_the_library_is_told_in_one_line(peers, bare_python):
    with (
        pytest.raises(ValueError, match=r"with code 1: ModuleNotFoundError: .*torch") as error,
        peers.Peer("diffusers", CPU, bare_python),
    ):
        pass
    assert "\n" not in str(error.value)


def test_worker_that_dies_is_told_in_one_line(peers, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("""
print('{"versions": {}}', flush=True)
input()
print("some warning", file=__import__("sys").stderr)
raise SystemExit("out of luck")
""")
    monkeypatch.setattr(peers, "WORKER", worker)
    with (
        peers.Peer("diffusers", CPU, sys.executable) as peer,
        pytest.raises(ValueError, match=r"^peer diffusers: .* ended with code 1: out of luck$"),
    ):
        peer.prepare("forward", {})


def test_worker_ends_with_the_process_above_even_in_a_run(peer, settings):
    """The last test here: it ends the worker of them all, for another takes seconds to start."""
    long = peer.prepare("sample", settings, sampler="ddim", steps=30)
    worker = peer._process
    worker.stdin.write(f'{{"run": {long.number}}}\n' * 1000)
    worker.stdin.close()  # as the system does when a process ends, in whichever way
    assert worker.wait(timeout=60) == 0
