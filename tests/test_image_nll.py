"""Bits/dim by the script: by either way, cut off and continued, on several processes."""

import json
import re
import shutil

import numpy as np
import pytest
from launchers import ends, start, start_by_hand
from script_runner import (
    NUM_DIGITS,
    command_line,
    error_of,
    names,
    script_environment,
    script_path,
    succeed,
    tree,
)

QUICK = {"num_samples": 4, "vlb_timesteps": 3, "ode_tolerance": 0.05, "num_workers": 0}


@pytest.fixture
def flags(trained, digits_dir):
    return {"model_path": trained.path, "data_dir": digits_dir, **QUICK}


@pytest.fixture
def evaluate(run_script, tmp_path, flags):
    """nll.json of a run, and the process."""

    def run(log_dir="out", runner=run_script, **more):
        own = {name: value for name, value in {**flags, **more}.items() if value is not None}
        done = succeed(runner("image_nll", own, log_dir=log_dir, cwd=tmp_path))
        return json.loads((tmp_path / log_dir / "nll.json").read_text()), done

    return run


@pytest.fixture
def refuse(run_script, tmp_path, flags):
    """The line of a mistake, which leaves everything as it is."""

    def run(log_dir="out", **more):
        own = {name: value for name, value in {**flags, **more}.items() if value is not None}
        before = tree(tmp_path)
        line = error_of(run_script("image_nll", own, log_dir=log_dir, cwd=tmp_path))
        assert tree(tmp_path) == before
        return line

    return run


# -- results -------------------------------------------------------------------------------------


def test_each_method_gives_its_numbers(evaluate, tmp_path, trained):
    both, done = evaluate("both", method="both", batch_size=3)
    vlb, of_vlb = evaluate("vlb", method="vlb", ode_tolerance=None)
    ode, of_ode = evaluate("ode", method="ode", vlb_timesteps=None)
    assert both["vlb"] == pytest.approx(vlb["vlb"], rel=1e-5)
    assert both["ode"] == ode["ode"]  # to the bit, whatever the batch
    assert set(vlb) == {"vlb", "model_path", "data_dir", "seed", "value_range"}
    assert set(ode) == {"ode", "model_path", "data_dir", "seed", "value_range"}
    assert both["vlb"]["count"] == both["ode"]["count"] == 4
    assert both["vlb"]["timesteps"] == 30
    assert both["vlb"]["timesteps_per_image"] == 3
    assert both["ode"]["tolerance"] == 0.05
    assert both["ode"]["evaluations"] > 20
    assert both["model_path"]["path"] == str(trained.path)
    for texts, process in (("vlb bpd= ode bpd=", done), ("bpd=", of_vlb), ("ode bpd=", of_ode)):
        line = process.stdout.splitlines()[-1]
        found = re.sub(r"=[-\d.e+]+ \+- [-\d.e+]+,?", "=", line)
        assert found == f"done 4 of {NUM_DIGITS} images: {texts}"
        assert "4/4" in process.stderr
        assert "bits/dim" in process.stderr
    number = re.search(r"vlb bpd=(\S+) \+- (\S+), ode bpd=(\S+) ", done.stdout)
    assert float(number[1]) == pytest.approx(both["vlb"]["bpd"], rel=1e-5)
    assert float(number[3]) == pytest.approx(both["ode"]["bpd"], rel=1e-5)
    assert names(tmp_path / "both") == ["image_nll.json", "log.txt", "nll.json", "nll_images.npz"]
    with np.load(tmp_path / "both" / "nll_images.npz", allow_pickle=False) as images:
        assert images["index"].tolist() == [0, 1, 2, 3]
        for name in ("vlb", "ode"):
            assert images[f"bpd_{name}"].mean() == pytest.approx(both[name]["bpd"], rel=1e-9)
            error = images[f"bpd_{name}"].std(ddof=1) / 2
            assert both[name]["standard_error"] == pytest.approx(error, rel=1e-9)


def test_every_option_has_its_effect(evaluate):
    ode = {"method": "ode", "vlb_timesteps": None, "num_samples": 1, "ode_tolerance": 0.3}
    first, _ = evaluate("first", **ode)
    others = {
        "hutchinson_probes": 3,
        "dequantisations": 2,
        "ode_tolerance": 0.1,
        "seed": 1,
        "ode_batch": 2,
        "num_samples": 2,
    }
    found = {}
    for name, value in others.items():
        found[name], _ = evaluate(name, **{**ode, name: value})
        if name != "ode_batch":
            assert found[name]["ode"]["bpd"] != first["ode"]["bpd"], name
    assert found["hutchinson_probes"]["ode"]["hutchinson_probes"] == 3
    assert found["dequantisations"]["ode"]["evaluations"] > 1.5 * first["ode"]["evaluations"]
    assert found["ode_tolerance"]["ode"]["evaluations"] > first["ode"]["evaluations"]
    assert found["ode_batch"]["ode"]["ode_batch"] == 2
    assert found["num_samples"]["ode"]["count"] == 2
    assert found["num_samples"]["ode"]["standard_error"] > 0
    assert first["ode"]["standard_error"] is None


def test_all_timesteps_are_the_default(evaluate, tmp_path):
    numbers, _ = evaluate(vlb_timesteps=None, ode_tolerance=None, timestep_respacing=5)
    assert numbers["vlb"]["timesteps_per_image"] == numbers["vlb"]["timesteps"] == 5
    terms = np.load(tmp_path / "out" / "vb_terms.npz")["arr_0"]
    assert terms.shape == (5,)
    assert terms.sum() == pytest.approx(numbers["vlb"]["bpd"], abs=0.02)  # but the prior


# -- cut off and continued -----------------------------------------------------------------------


@pytest.fixture
def killed(run_script, tmp_path):
    """Run the script until it kills itself."""

    def run(flags, log_dir, kill_at, kill_where):
        env = {"KILL_AT": str(kill_at), "KILL_WHERE": kill_where}
        done = run_script("killed_nll", flags, log_dir=log_dir, cwd=tmp_path, env=env)
        assert done.returncode == -9, done.stderr

    return run


@pytest.mark.parametrize(
    ("where", "kept"), [pytest.param("before", 2, marks=pytest.mark.slow), ("amid", 2)]
)
def test_killed_evaluation_ends_as_if_it_had_not_been(
    evaluate, killed, tmp_path, flags, where, kept
):
    own = {**flags, "method": "both", "num_samples": 5, "batch_size": 1}
    killed(own, "cut", kill_at=kept + 1, kill_where=where)
    assert "nll.json" not in names(tmp_path / "cut")
    with np.load(tmp_path / "cut" / "nll_images.npz", allow_pickle=False) as images:
        assert images["index"].tolist() == list(range(kept))
    more = {"method": "both", "num_samples": 5}
    numbers, done = evaluate("cut", **more)
    assert f"{kept}/5" in done.stderr  # where the bar begins
    assert f"going on: {kept} of 5 images" in (tmp_path / "cut" / "log.txt").read_text()
    whole, _ = evaluate("whole", **more)
    assert numbers == whole
    states = [dict(np.load(tmp_path / name / "nll_images.npz")) for name in ("cut", "whole")]
    for name, values in states[1].items():
        np.testing.assert_array_equal(states[0][name], values)
    assert not list(tmp_path.rglob("*.tmp"))


def test_terms_by_timestep_survive_too(evaluate, killed, tmp_path, flags):
    more = {"vlb_timesteps": None, "ode_tolerance": None, "timestep_respacing": 4}
    own = {**flags, **more, "batch_size": 2, "num_samples": 6}
    own = {name: value for name, value in own.items() if value is not None}
    killed(own, "cut", kill_at=2, kill_where="before")
    numbers, _ = evaluate("cut", **more, batch_size=3, num_samples=6)
    whole, _ = evaluate("whole", **more, batch_size=2, num_samples=6)
    assert numbers["vlb"] == pytest.approx(whole["vlb"], rel=1e-5)
    for name in ("vb", "mse", "xstart_mse"):
        terms = [np.load(tmp_path / run / f"{name}_terms.npz")["arr_0"] for run in ("cut", "whole")]
        np.testing.assert_allclose(*terms, rtol=1e-4)


def test_more_images_are_added_and_fewer_are_no_less(evaluate, tmp_path):
    more = {"ode_tolerance": None}
    first, _ = evaluate("out", **more, num_samples=3)
    again, done = evaluate("out", **more, num_samples=3)
    assert again == first
    grown, done = evaluate("out", **more, num_samples=7, batch_size=3)
    assert "3/7" in done.stderr
    whole, _ = evaluate("whole", **more, num_samples=7, batch_size=7)
    assert grown["vlb"] == pytest.approx(whole["vlb"], rel=1e-5)
    fewer, done = evaluate("out", **more, num_samples=2)
    assert fewer == grown
    assert "--num_samples 2 is less than nll_images.npz held already" in done.stdout
    assert f"done 7 of {NUM_DIGITS} images" in done.stdout


def test_other_flags_do_not_go_on(evaluate, refuse, tmp_path, trained, digits_dir):
    evaluate("out", method="both", num_samples=2)
    own = {"method": "both", "num_samples": 4}
    for flag, value, before in (
        ("seed", 1, 0),
        ("vlb_timesteps", 4, 3),
        ("ode_tolerance", 0.1, 0.05),
        ("hutchinson_probes", 2, 1),
        ("dequantisations", 2, 1),
        ("ode_batch", 2, 1),
        ("clip_denoised", False, True),
        ("timestep_respacing", 5, "''"),
    ):
        line = refuse("out", **{**own, flag: value})
        assert f"holds results of --{flag} {before}, not --{flag} {value}" in line
        assert "--log_dir" in line
    line = refuse("out", ode_tolerance=None)
    assert "--method both --ode_tolerance 0.05, not --method vlb" in line
    other = trained.folder / "model000008.pt"
    line = refuse("out", **own, model_path=other)
    assert f"--model_path {other} (sha256" in line
    shutil.copytree(digits_dir, tmp_path / "more")
    assert "--data_dir more (sha256" in refuse("out", **own, data_dir="more")
    evaluate("out", **own, batch_size=2, num_workers=1)


def test_images_that_came_or_went_are_noticed(evaluate, refuse, tmp_path, digits_dir):
    shutil.copytree(digits_dir, tmp_path / "data")
    own = {"data_dir": "data", "ode_tolerance": None}
    evaluate("out", **own, num_samples=2)
    (tmp_path / "data" / "0_0000.png").rename(tmp_path / "data" / "0_9999.png")
    assert "--data_dir data (sha256" in refuse("out", **own)


def test_damaged_results_are_named(evaluate, refuse, tmp_path):
    evaluate("out", ode_tolerance=None, num_samples=2)
    (tmp_path / "out" / "nll_images.npz").write_bytes(b"no")
    line = refuse("out", ode_tolerance=None)
    assert "out/nll_images.npz' is damaged: delete it" in line


# -- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_and_their_loss(evaluate, tmp_path, flags):
    """One of two is killed; both end; one alone goes on; two would find all done."""
    own = {**flags, "method": "both", "num_samples": 7}
    script, words = script_path("killed_nll"), command_line(own, {"log_dir": "cut"})
    env = script_environment({"KILL_AT": "3", "KILL_WHERE": "before"})
    first, second = ends(start_by_hand(script, *words, cwd=tmp_path, env=env), timeout=110)
    assert first.returncode == -9
    assert second.returncode not in (0, -9)
    with np.load(tmp_path / "cut" / "nll_images.npz") as images:
        assert images["index"].tolist() == [0, 1, 2, 3]
    more = {"method": "both", "num_samples": 7}
    numbers, _ = evaluate("cut", **more)
    whole, _ = evaluate("whole", **more)
    assert numbers["ode"] == whole["ode"]
    assert numbers["vlb"] == pytest.approx(whole["vlb"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_processes_find_what_one_finds(evaluate, tmp_path, flags, launcher):
    own = {**flags, "method": "both", "num_samples": 7, "batch_size": 2}
    words = command_line(own, {"log_dir": "two"})
    environment = script_environment()
    done = start(launcher, script_path("image_nll"), *words, cwd=tmp_path, env=environment)
    succeed(done)
    numbers = json.loads((tmp_path / "two" / "nll.json").read_text())
    whole, _ = evaluate("one", method="both", num_samples=7, batch_size=3)
    assert numbers["ode"] == pytest.approx(whole["ode"], rel=1e-9)
    assert numbers["vlb"] == pytest.approx(whole["vlb"], rel=1e-5)


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "elbo"}, ["--method elbo", "vlb, ode or both"]),
        ({"method": "vlb"}, ["--ode_tolerance is of --method ode or both, not of --method vlb"]),
        ({"method": "ode"}, ["--vlb_timesteps is of --method vlb or both, not of --method ode"]),
        (
            {"method": "ode", "vlb_timesteps": None, "clip_denoised": True},
            ["--clip_denoised is of --method vlb or both"],
        ),
        (
            {"method": "ode", "vlb_timesteps": None, "timestep_respacing": "5"},
            ["--timestep_respacing 5", "--method vlb or both"],
        ),
        ({"method": "both", "vlb_timesteps": 1}, ["--vlb_timesteps 1", "2 ... 30"]),
        ({"method": "both", "vlb_timesteps": 31}, ["--vlb_timesteps 31", "2 ... 30"]),
        ({"method": "both", "vlb_timesteps": -1}, ["--vlb_timesteps -1"]),
        ({"method": "both", "ode_tolerance": 0}, ["--ode_tolerance 0"]),
        ({"method": "both", "hutchinson_probes": 0}, ["--hutchinson_probes 0"]),
        ({"method": "both", "dequantisations": 0}, ["--dequantisations 0"]),
        ({"method": "both", "ode_batch": 0}, ["--ode_batch 0"]),
    ],
)
def test_impossible_evaluations(refuse, change, words):
    line = refuse(**change)
    for word in words:
        assert word in line, line


def test_the_checkpoint_is_looked_for_before_the_data(refuse):
    line = refuse(ode_tolerance=None, model_path="gone/x.pt", data_dir="nowhere", image_size=8)
    assert "'gone/x.pt' does not exist" in line
    assert "--data_dir 'nowhere' is no folder" in refuse(ode_tolerance=None, data_dir="nowhere")
