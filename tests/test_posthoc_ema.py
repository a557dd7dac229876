"""Post-hoc EMA: profiles in closed form, and averages that were tracked against reconstructed."""

import itertools
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from script_runner import error_of, start_script, succeed, tree

from improved_diffusion import checkpoint, posthoc_ema, stored_flags
from improved_diffusion.errors import UserError
from improved_diffusion.posthoc_ema import (
    MAX_SIGMA_REL,
    Snapshot,
    gamma_of,
    load_snapshot,
    parse_sigma_rels,
    power_rate,
    profile_product,
    read_snapshots,
    reconstruct,
    relative_error,
    sigma_rel_of,
    solve_weights,
    weighted_sum,
)

WIDTHS = [0.05, 0.1]  # that the tests' training keeps
STEPS = 400  # updates of the tests' training
EVERY = 25  # updates between its snapshots


def profile(t, updates, gamma):
    """p(t) of an average over ``updates``; 0 after its end."""
    return np.where(t <= updates, (gamma + 1) / updates * (t / updates) ** gamma, 0.0)


# -- one average ------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("gamma", [1e-6, 0.1, 1.0, 6.94, 16.97, 1e3, 1e9, 1e100])
def test_exponent_and_width_are_inverse(gamma):
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9)


def test_widths_have_their_meaning():
    """The standard deviation of the profile, divided by the number of updates."""
    for sigma_rel in (0.02, 0.1, 0.28):
        gamma = gamma_of(sigma_rel)
        moments = [
            quad(lambda t, k, gamma: t**k * profile(t, 1, gamma), 0, 1, args=(k, gamma))[0]
            for k in range(3)
        ]
        assert moments[0] == pytest.approx(1)
        assert math.sqrt(moments[2] - moments[1] ** 2) == pytest.approx(sigma_rel)
    assert sigma_rel_of(0) == pytest.approx(MAX_SIGMA_REL)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, MAX_SIGMA_REL, 0.3, math.inf, math.nan])
def test_width_out_of_range(sigma_rel):
    with pytest.raises(UserError, match=rf"sigma_rel {sigma_rel} .*0\.2887"):
        gamma_of(sigma_rel)


def average_of_powers(k, updates, gamma):
    """The average, as training keeps it, of weights that are t^k after update t."""
    average = 1e9  # weights before the first update
    for t in range(1, updates + 1):
        beta = power_rate(t, gamma)
        average = beta * average + (1 - beta) * t**k
    return average


@pytest.mark.parametrize("gamma", [0, 0.5, 6.94, 16.97, 100])
@pytest.mark.parametrize("k", [0, 1, 2.5])
def test_rate_weighs_each_update_by_its_share_of_the_profile(gamma, k):
    updates = 300
    edges = (np.arange(updates + 1) / updates) ** (gamma + 1)  # the integral of p
    expected = np.diff(edges) @ np.arange(1, updates + 1) ** k
    assert average_of_powers(k, updates, gamma) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0, 6.94, 16.97])
@pytest.mark.parametrize("k", [1, 2])
def test_average_of_powers_in_closed_form(gamma, k):
    """The continuous average of t^k is (gamma + 1) / (gamma + 1 + k) T^k; steps differ by 1/T."""
    errors = []
    for updates in (1000, 2000):
        expected = (gamma + 1) / (gamma + 1 + k) * updates**k
        errors.append(average_of_powers(k, updates, gamma) / expected - 1)
    assert 0 < errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)


def test_first_update_forgets_the_initial_weights():
    assert power_rate(1, 6.94) == 0
    assert power_rate(2, 1) == 0.25
    assert power_rate(10**9, 1e3) == pytest.approx(1 - 1e-9 * 1001, abs=1e-11)


@pytest.mark.parametrize(
    ("text", "widths"), [("", []), ("0.05", [0.05]), ("0.05,0.1", [0.05, 0.1]), ("1e-2,", [0.01])]
)
def test_list_of_widths(text, widths):
    assert parse_sigma_rels(text) == widths


@pytest.mark.parametrize("text", ["x", "0", "0.05,0.3", "nan", "-0.1", "0.1,0.10"])
def test_bad_list_of_widths_names_the_flag(text):
    with pytest.raises(UserError, match=f"--posthoc_ema '?{text}"):
        parse_sigma_rels(text)
    with pytest.raises(UserError, match="--sigma_rel "):
        parse_sigma_rels(text, "sigma_rel")


# -- one from many ----------------------------------------------------------------------------


@pytest.mark.parametrize("a", [(100, 6.94), (250, 16.97), (250, 0)])
@pytest.mark.parametrize("b", [(100, 6.94), (180, 0.3), (1000, 40)])
def test_products_are_integrals(a, b):
    end = min(a[0], b[0])
    expected, _ = quad(lambda t: profile(t, *a) * profile(t, *b), 0, end, epsabs=0, epsrel=1e-11)
    assert profile_product(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert profile_product(*b, *a) == pytest.approx(expected, rel=1e-9)


def test_products_broadcast():
    t, gamma = np.array([10, 20, 30]), np.array([1.0, 2.0, 3.0])
    table = profile_product(t[:, None], gamma[:, None], t, gamma)
    assert table.shape == (3, 3)
    assert table.dtype == np.float64
    assert table[0, 2] == profile_product(10, 1.0, 30, 3.0)


def test_products_do_not_overflow():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        same = profile_product(10**9, 1e3, 10**9, 1e3)
        early = profile_product(1, 1e3, 10**9, 1e3)
        near = profile_product(10**9 - 1, 1e3, 10**9, 1e3)
    assert same == pytest.approx(1001**2 / 2001 / 1e9, rel=1e-12)
    assert early == 0
    assert near == pytest.approx(same * (1 - 1e-6), rel=1e-8)


def stored(count, every, widths):
    """Updates and exponents of ``count`` snapshots of each width."""
    updates = [every * (i + 1) for i in range(count) for _ in widths]
    return updates, [gamma_of(width) for _ in range(count) for width in widths]


def integrated_error(weights, updates, gammas, target_updates, target_gamma):
    """:func:`relative_error` by numerical integration, between the ends of the profiles."""

    def difference(t):
        parts = (w * profile(t, *a) for w, *a in zip(weights, updates, gammas, strict=True))
        return sum(parts) - profile(t, target_updates, target_gamma)

    def square(f):
        ends = sorted({0, *updates, target_updates})
        pieces = itertools.pairwise(ends)
        return sum(quad(lambda t: f(t) ** 2, a + 1e-9, b, limit=200)[0] for a, b in pieces)

    return math.sqrt(
        square(difference) / square(lambda t: profile(t, target_updates, target_gamma))
    )


@pytest.mark.parametrize(("target", "width"), [(100, 0.15), (100, 0.07), (90, 0.1), (110, 0.2)])
def test_relative_error_is_the_integrated_one(target, width):
    updates, gammas = stored(5, 20, WIDTHS)
    weights = solve_weights(updates, gammas, target, gamma_of(width))
    own = relative_error(weights, updates, gammas, target, gamma_of(width))
    assert own > 1e-3
    assert own == pytest.approx(
        integrated_error(weights, updates, gammas, target, gamma_of(width)), rel=1e-5
    )


def test_no_other_weights_of_sum_1_are_nearer():
    updates, gammas = stored(6, 10, WIDTHS)
    target = (60, gamma_of(0.2))
    best = solve_weights(updates, gammas, *target)
    least = relative_error(best, updates, gammas, *target)
    assert best.dtype == np.float64
    assert best.sum() == pytest.approx(1, abs=1e-12)
    for direction in np.random.randn(50, len(best)):
        direction -= direction.mean()
        for step in (-1e-2, 1e-2):
            nudged = best + step * direction / np.linalg.norm(direction)
            assert relative_error(nudged, updates, gammas, *target) > least


def test_sum_of_1_costs_little_and_keeps_constant_weights():
    """Plain least squares, as in the paper, fits slightly nearer but would scale the network."""
    updates, gammas = stored(4, 1000, WIDTHS)
    target = (4000, gamma_of(0.2))
    t, gamma = np.array(updates), np.array(gammas)
    table = profile_product(t[:, None], gamma[:, None], t, gamma)
    plain = np.linalg.solve(table, profile_product(t, gamma, *target))
    ours = solve_weights(updates, gammas, *target)
    errors = [relative_error(x, updates, gammas, *target) for x in (plain, ours)]
    assert errors[0] < errors[1] < 1.1 * errors[0]
    assert plain.sum() < 0.95


@pytest.mark.parametrize("count", [1, 2, 7])
def test_stored_average_is_its_own_reconstruction(count):
    updates, gammas = stored(count, 10, WIDTHS)
    for i in range(len(updates)):
        weights = solve_weights(updates, gammas, updates[i], gammas[i])
        assert weights.tolist() == np.eye(len(updates))[i].tolist()
        assert relative_error(weights, updates, gammas, updates[i], gammas[i]) < 1e-7


def test_more_snapshots_fit_better():
    target = gamma_of(0.15)
    errors = []
    for count in (4, 8, 16, 64):
        updates, gammas = stored(count, 6400 // count, WIDTHS)
        weights = solve_weights(updates, gammas, 6400, target)
        errors.append(relative_error(weights, updates, gammas, 6400, target))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-3


@pytest.mark.parametrize(
    ("updates", "widths", "most"),
    [
        (range(1, 301), [0.05, 0.1], 1e-4),  # after every update
        (range(1, 301), [0.01, 0.05, 0.1, 0.2], 1e-4),
        (range(1, 301), [0.05, 0.0500001], 0.02),
        (range(10**9 - 100, 10**9), [0.05, 0.1], 0.5),  # all but alike
        (range(10**9 - 100, 10**9), [0.05, 0.0500001], 2),  # and far from the target
        ([100] * 20, [0.05, 0.1], 0.5),  # copies
    ],
)
def test_weights_stay_small_where_snapshots_are_near_alike(updates, widths, most):
    """They multiply the rounding errors of float32, 6e-8; unchecked they come to 1e5 and more."""
    t = [t for t in updates for _ in widths]
    gammas = [gamma_of(width) for _ in updates for width in widths]
    for target in (0.07, 0.15):
        weights = solve_weights(t, gammas, t[-1], gamma_of(target))
        assert np.abs(weights).sum() < 100
        assert weights.sum() == pytest.approx(1, abs=1e-9)
        assert relative_error(weights, t, gammas, t[-1], gamma_of(target)) < most


# -- stored averages --------------------------------------------------------------------------


def random_walk(steps, seed=0):
    """Weights after each update: a network at 10 that drifts and shakes."""
    rng = np.random.default_rng(seed)
    return 10 + np.cumsum(0.02 + 0.1 * rng.standard_normal((steps, 64)), axis=0)


def track(walk, gamma):
    """The average after each update, as training keeps it."""
    averages, average = [], np.zeros_like(walk[0])
    for updates, weights in enumerate(walk, 1):
        beta = power_rate(updates, gamma)
        average = beta * average + (1 - beta) * weights
        averages.append(average)
    return averages


def save(folder, sigma_rel, updates, weights):
    """Write a snapshot as training does; its path."""
    path = str(folder / checkpoint.posthoc_name(sigma_rel, updates))
    torch.save({"updates": updates, "sigma_rel": sigma_rel, "weights": weights}, path)
    return path


def as_weights(vector, seen=0):
    """Parameters and a counter."""
    vector, seen = torch.tensor(vector, dtype=torch.float32), torch.tensor(seen)
    return {"a.weight": vector[:60].view(3, 20), "a.bias": vector[60:], "seen": seen}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with snapshots of a random walk; do not write to it."""
    folder = tmp_path_factory.mktemp("run")
    for sigma_rel in WIDTHS:
        averages = track(random_walk(STEPS), gamma_of(sigma_rel))
        for updates in range(EVERY, STEPS + 1, EVERY):
            save(folder, sigma_rel, updates, as_weights(averages[updates - 1], updates))
    (folder / stored_flags.CONFIG).write_text("{}\n")
    return folder


@pytest.fixture
def own_run(run, tmp_path):
    """A copy of the run folder to write to, alone in its folder."""
    return shutil.copytree(run, tmp_path / "run")


def distance(state, updates, sigma_rel):
    """From the average that was tracked, in units of what averaging changes at all."""
    walk = random_walk(STEPS)
    tracked = track(walk, gamma_of(sigma_rel))[updates - 1]
    made = torch.cat([state["a.weight"].flatten(), state["a.bias"]]).double().numpy()
    return np.linalg.norm(made - tracked) / np.linalg.norm(walk[updates - 1] - tracked)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12, 0.15, 0.2])
@pytest.mark.parametrize("updates", [STEPS, 200])
def test_reconstruction_is_the_average_that_was_tracked(run, updates, sigma_rel):
    snapshots = read_snapshots(checkpoint.find_posthoc(str(run)))
    snapshots = [snapshot for snapshot in snapshots if snapshot.updates <= updates]
    nearest = min(distance(load_snapshot(s.path)["weights"], updates, sigma_rel) for s in snapshots)
    made = distance(reconstruct(snapshots, updates, gamma_of(sigma_rel)), updates, sigma_rel)
    assert made < 0.02
    assert made < nearest / 5


def test_reconstruction_keeps_shapes_and_dtypes(run):
    snapshots = read_snapshots(checkpoint.find_posthoc(str(run)))
    state = reconstruct(snapshots, STEPS, gamma_of(0.15))
    expected = load_snapshot(snapshots[-1].path)["weights"]
    assert list(state) == list(expected)
    assert [(v.shape, v.dtype) for v in state.values()] == [
        (v.shape, v.dtype) for v in expected.values()
    ]
    assert state["seen"] == STEPS


def test_stored_snapshot_is_recovered_exactly(run):
    snapshots = read_snapshots(checkpoint.find_posthoc(str(run)))
    for snapshot in snapshots[:: len(snapshots) // 4]:
        state = reconstruct(snapshots, snapshot.updates, snapshot.gamma)
        expected = load_snapshot(snapshot.path)["weights"]
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_sum_is_exact_where_terms_cancel(tmp_path):
    """float32 products of 3^13 have lost what a difference of 2^-20 comes to."""
    values = [1.0, 1 + 2.0**-20, 1 + 2.0**-21]
    paths = [save(tmp_path, 0.1, i + 1, {"w": torch.tensor([v])}) for i, v in enumerate(values)]
    snapshots = [Snapshot(path, i + 1, 0.1) for i, path in enumerate(paths)]
    x = [-(3**13) + 4, 3**13, -3]
    state = weighted_sum(snapshots, x)
    exact = sum(weight * value for weight, value in zip(x, values, strict=True))
    assert state["w"].item() == pytest.approx(exact, rel=1e-7)


def test_one_file_at_a_time_is_in_memory(run, monkeypatch):
    alive = []

    def watched(path):
        assert sum(reference() is not None for reference in alive) <= 1  # that of the last file
        content = load_snapshot(path)
        alive.append(weakref.ref(content["weights"]["a.weight"]))
        return content

    snapshots = read_snapshots(checkpoint.find_posthoc(str(run)))
    monkeypatch.setattr(posthoc_ema, "load_snapshot", watched)
    reconstruct(snapshots, STEPS, gamma_of(0.15))
    assert len(alive) == len(snapshots)
    reconstruct(snapshots, STEPS, snapshots[-1].gamma)
    assert len(alive) == len(snapshots) + 1  # none that weighs nothing


def test_snapshots_are_sorted_by_their_content(tmp_path):
    weights = {"w": torch.zeros(2)}
    paths = [save(tmp_path, 0.1, t, weights) for t in (999_999, 1_000_000, 5, 0)]
    paths.append(save(tmp_path, 0.05, 5, weights))
    found = [(s.updates, s.sigma_rel) for s in read_snapshots(paths)]
    assert found == [(5, 0.05), (5, 0.1), (999_999, 0.1), (1_000_000, 0.1)]


GOOD = {"updates": 1, "sigma_rel": 0.1, "weights": {"w": torch.zeros(2)}}


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.zeros(2)},
        {},
        [1],
        {key: GOOD[key] for key in ("updates", "weights")},
        {**GOOD, "updates": 1.5},
        {**GOOD, "updates": -1},
        {**GOOD, "sigma_rel": 0.3},
        {**GOOD, "weights": {"w": 1}},
        {**GOOD, "weights": None},
    ],
)
def test_file_that_is_no_snapshot(tmp_path, content):
    path = str(tmp_path / "posthoc_0.1_000001.pt")
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"{path}.* no snapshot of --posthoc_ema"):
        load_snapshot(path)


# -- the script -------------------------------------------------------------------------------


def load(path):
    return torch.load(path, weights_only=True)


def test_script_makes_an_average_beside_the_snapshots(own_run, tmp_path):
    done = succeed(start_script("ema_reconstruct", run="run", sigma_rel=0.15, cwd=tmp_path))
    state = load(own_run / f"ema_posthoc0.15_{STEPS:06d}.pt")
    assert distance(state, STEPS, 0.15) < 0.02
    first, last = f"posthoc_0.05_{EVERY:06d}.pt", f"posthoc_0.1_{STEPS:06d}.pt"
    said = done.stdout.splitlines()
    count = len(WIDTHS) * STEPS // EVERY
    assert said[0] == (
        f"sigma_rel 0.15, {STEPS} updates: {count} snapshots of widths 0.05, 0.1, "
        f"from {first} to {last}"
    )
    assert said[1].startswith("relative error of the fitted profile: 0.")
    assert said[2:] == [f"wrote run/ema_posthoc0.15_{STEPS:06d}.pt"]
    assert done.stderr == ""


def test_script_makes_several_at_a_step(own_run, run, run_script, tmp_path):
    flags = {"run": own_run, "sigma_rel": "0.1,0.2", "step": 200}
    done = succeed(run_script("ema_reconstruct", flags, cwd=tmp_path))
    new = tree(own_run).keys() - tree(run).keys()
    assert new == {"ema_posthoc0.1_000200.pt", "ema_posthoc0.2_000200.pt"}
    assert "sigma_rel 0.1, 200 updates: stored as posthoc_0.1_000200.pt\n" in done.stdout
    assert "to posthoc_0.1_000200.pt\n" in done.stdout  # nothing later
    assert distance(load(own_run / "ema_posthoc0.2_000200.pt"), 200, 0.2) < 0.03
    same = load(own_run / "posthoc_0.1_000200.pt")["weights"]
    made = load(own_run / "ema_posthoc0.1_000200.pt")
    assert all(torch.equal(made[key], same[key]) for key in same)


def test_script_writes_where_it_is_told(own_run, run, run_script, tmp_path):
    flags = {"run": "run", "out": "chosen.pt", "step": 210}
    done = succeed(run_script("ema_reconstruct", flags, cwd=tmp_path))
    assert done.stdout.endswith("wrote chosen.pt\n")
    assert load(tmp_path / "chosen.pt").keys() == {"a.weight", "a.bias", "seen"}
    assert tree(own_run) == tree(run)


def test_image_sample_takes_what_the_script_made(trained, run_script, tmp_path):
    """A network's weights, from which steps of 0, 1, 2, ... lead away."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained.folder / stored_flags.CONFIG, folder)
    weights = load(trained.path)
    for sigma_rel in WIDTHS:
        for updates in (2, 4, 8):
            ahead = average_of_powers(1, updates, gamma_of(sigma_rel))
            stored = {key: value + 1e-3 * ahead for key, value in weights.items()}
            save(folder, sigma_rel, updates, stored)
    succeed(run_script("ema_reconstruct", run="run", sigma_rel=0.15, cwd=tmp_path))
    made = load(folder / "ema_posthoc0.15_000008.pt")
    ahead = 1e-3 * average_of_powers(1, 8, gamma_of(0.15))
    for key, value in weights.items():
        torch.testing.assert_close(made[key], value + ahead, rtol=0, atol=1e-4)
    flags = {"model_path": folder / "ema_posthoc0.15_000008.pt", "log_dir": "samples"}
    succeed(run_script("image_sample", flags, num_samples=2, batch_size=2, cwd=tmp_path))
    assert list((tmp_path / "samples").glob("samples_2x8x8x1.npz"))


@pytest.mark.parametrize(
    ("step", "sigma_rel", "low", "high"),
    [(STEPS, 0.2, 0.02, 0.03), (200, 0.2, 0.07, 0.08), (210, 0.06, 0.5, 1.5)],
)
def test_script_warns_of_a_poor_fit(own_run, run_script, tmp_path, step, sigma_rel, low, high):
    """At 5%: 200 updates have few snapshots; no stored profile ends at 210."""
    flags = {"run": own_run, "step": step, "sigma_rel": sigma_rel}
    done = succeed(run_script("ema_reconstruct", flags, cwd=tmp_path))
    percent = re.search(r"relative error of the fitted profile: (.*)%", done.stdout).group(1)
    assert low < float(percent) / 100 < high
    assert ("WARNING: a poor fit" in done.stdout) == (high > 0.05)


@pytest.fixture
def refused(own_run, run_script, tmp_path):
    """Run the script, which must end in one line and leave nothing; the line."""

    def call(*parts, **flags):
        before = tree(tmp_path)
        line = error_of(
            run_script("ema_reconstruct", {"run": "run"}, *parts, cwd=tmp_path, **flags)
        )
        assert tree(tmp_path) == before
        return line

    return call


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"run": ""}, ["--run is missing"]),
        ({"run": "nowhere"}, ["--run nowhere does not exist"]),
        ({"run": f"run/{stored_flags.CONFIG}"}, ["--run run/config.json", "no folder"]),
        ({"sigma_rel": 0.3}, ["--sigma_rel 0.3", "below 0.2887"]),
        ({"sigma_rel": 0}, ["--sigma_rel 0", "above 0"]),
        ({"sigma_rel": "0.1,-1"}, ["--sigma_rel 0.1,-1"]),
        ({"sigma_rel": "wide"}, ["--sigma_rel 'wide'"]),
        ({"sigma_rel": ""}, ["--sigma_rel ''", "at least one"]),
        ({"step": 0}, ["--step 0"]),
        ({"step": -2}, ["--step -2"]),
        ({"step": STEPS + 1}, [f"--step {STEPS + 1} is beyond", str(STEPS)]),
        ({"step": EVERY - 1}, [f"--step {EVERY - 1} is before", str(EVERY)]),
        ({"sigma_rel": "0.1,0.2", "out": "a.pt"}, ["--out a.pt", "--sigma_rel 0.1,0.2", "2"]),
        ({"out": "no/such/a.pt"}, ["--out no/such/a.pt", "no/such does not exist"]),
        ({"out": "run"}, ["--out run is a folder"]),
        ({"sigma": 0.1}, ["--sigma", "did you mean --sigma_rel?"]),
    ],
)
def test_script_refuses_bad_flags(refused, flags, words):
    line = refused(flags)
    for word in words:
        assert word in line


def test_script_needs_snapshots(refused, tmp_path):
    (tmp_path / "bare").mkdir()
    torch.save({"w": torch.zeros(2)}, tmp_path / "bare" / "ema_0.99_000010.pt")
    assert "--posthoc_ema 0.05,0.1" in refused(run="bare")
    save(tmp_path / "bare", 0.1, 0, {"w": torch.zeros(2)})  # before the first update
    assert "--posthoc_ema 0.05,0.1" in refused(run="bare")


@pytest.mark.parametrize("other", [{"a.weight": torch.zeros(3, 20)}, as_weights(np.zeros(61))])
def test_script_refuses_snapshots_of_different_networks(refused, own_run, other):
    save(own_run, 0.2, 1000, other)
    line = refused()
    first = f"run/posthoc_0.05_{EVERY:06d}.pt"
    for word in (f"'{first}'", "'run/posthoc_0.2_001000.pt'", "different networks", "a.bias"):
        assert word in line


def test_script_refuses_damaged_snapshots(refused, own_run):
    path = own_run / f"posthoc_0.1_{STEPS:06d}.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"run/{path.name}' is damaged" in refused()
    torch.save({"w": torch.zeros(2)}, path)
    assert f"run/{path.name}' is no snapshot" in refused()
    save(own_run, 0.1, STEPS, as_weights(np.full(64, np.nan)))
    assert f"run/{path.name}' holds non-finite weights" in refused(sigma_rel="0.05,0.1")
