"""The benchmark of saving measures real saves, in the background and in the foreground."""

import json
import threading

import pytest
from script_runner import load_module

from improved_diffusion.script_util import ModelAndDiffusionOptions


@pytest.fixture
def bench(monkeypatch):
    """The benchmark, with a configuration "tiny"."""
    bench = load_module("benchmarks", "bench_save")
    configurations = load_module("benchmarks", "configurations")
    options = ModelAndDiffusionOptions(
        image_size=8, num_channels=32, num_res_blocks=1, attention_resolutions="4", learn_sigma=True
    )
    tiny = configurations.Configuration(options, batch=2, batch_on_gpu=2)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "tiny", tiny)
    return bench


def test_saves_are_real_and_take_place_as_they_say(bench, monkeypatch, tmp_path, capsys):
    places = []
    write = bench.Saver._write

    def watched(*args):
        places.append(threading.current_thread() is threading.main_thread())
        write(*args)

    monkeypatch.setattr(bench.Saver, "_write", watched)
    out = tmp_path / "save.json"
    bench.main(["--configs", "tiny", "--rounds", "2", "--out", str(out)])
    assert places == [False, *[False, True] * 2]  # the first; then in turns
    result = json.loads(out.read_text())
    found = result["configs"]["tiny"]
    # four numbers of four bytes for each parameter, and little else
    assert found["checkpoint_bytes"] == pytest.approx(16 * parameters("tiny"), rel=0.2)
    assert found["background"].keys() == found["foreground"].keys() | {
        "writing_seconds",
        "slowing_seconds",
    }
    table = capsys.readouterr().out
    assert table.count("tiny") == 3
    assert result["circumstances"]["threads"]


def parameters(name):
    configurations = load_module("benchmarks", "configurations")
    model = configurations.CONFIGURATIONS[name].options.model()
    return sum(param.numel() for param in model.parameters())


def test_share_is_that_of_a_steps_time_for_a_gigabyte(bench):
    """A step of 2 s, a checkpoint of 0.5 GB that holds it up for 0.1 s: 10% per GB."""
    step = bench.Step
    one = bench.Round(
        before=step(2.0),
        background=step(2.2, still=0.1),
        meanwhile=[step(2.5), step(2.25)],
        writing=3.0,
        before_foreground=step(2.0),
        foreground=step(5.0, still=3.0),
    )
    found = bench.summary([one], gigabytes=0.5)
    assert found["step_seconds"] == 2
    background = found["background"]
    assert background["share_per_gb"] == pytest.approx(0.1)
    assert background["excess_seconds"] == pytest.approx(0.2)
    assert background["slowing_seconds"] == pytest.approx(0.75)
    assert found["foreground"]["share_per_gb"] == pytest.approx(3)
