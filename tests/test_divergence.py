"""Losses and gradients that are not finite: skipped, rolled back, and in the end given up."""

import csv
import itertools
import json
import signal

import pytest
import torch
from launchers import environment, start
from script_runner import TESTS, names
from workers.diverging_train import LAYER, make_loop, plant

from improved_diffusion import checkpoint, logger
from improved_diffusion.divergence import LOWERED_RATE, PATIENCE, all_finite
from improved_diffusion.errors import Diverged
from improved_diffusion.stopping import Bounds

WORKER = TESTS / "workers" / "diverging_train.py"
FOR_EVER = 10**6


@pytest.fixture
def run_dir(tmp_path):
    with logger.scoped_configure(str(tmp_path / "run"), format_strs=["log", "csv"]):
        yield tmp_path / "run"


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def log_text(folder):
    return (folder / "log.txt").read_text()


def steps_saved(folder):
    return sorted(checkpoint._steps(names(folder), checkpoint._MANIFEST))


def assert_saved_weights_are_finite(folder):
    for path in folder.glob("*.pt"):
        if not path.name.startswith(("state", "opt")):
            assert all(value.isfinite().all() for value in torch.load(path).values()), path


def bounds(steps):
    return Bounds(train_steps=steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_element_is_found(bad, dtype):
    values = torch.ones(1000, dtype=dtype)
    assert all_finite([torch.ones(3), values])
    values[637] = bad
    assert not all_finite([torch.ones(3), values])


def test_large_elements_are_finite():
    """Also where their norm is not."""
    assert all_finite([torch.full((9,), 3e38), torch.full((9,), 6e4).half(), torch.ones(2).int()])
    assert all_finite([torch.empty(0)])
    assert all_finite([])


# -- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "loss"])
def test_a_single_bad_step_is_skipped_and_counted(run_dir, digits_dir, kind):
    loop = plant(make_loop(digits_dir, bounds=bounds(6)), 2, 3, rank=None, kind=kind)
    before = []
    run_step = loop.run_step

    def watched_run_step(batch, cond):
        run_step(batch, cond)
        before.append([param.detach().clone() for param in loop.model_params])

    loop.run_step = watched_run_step
    loop.run_loop()
    same = [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(before)]
    assert same == [False, True, False, False, False]  # step 2 left the weights alone
    assert [row["skipped_steps"] for row in rows(run_dir)] == ["", "", "1", "1", "1", "1"]
    assert "step 2 is skipped" in log_text(run_dir)
    state = torch.load(run_dir / "state000005.pt")  # written inside the loop
    assert (state["skipped"], state["skipped_in_row"]) == (1, 0)
    assert not list(run_dir.glob("divergence*"))
    assert_saved_weights_are_finite(run_dir)


def test_a_divergence_is_rolled_back_once_with_a_lowered_rate(run_dir, digits_dir):
    """Steps 7 to 26 fail; the newest checkpoint before is that of step 5."""
    loop = make_loop(digits_dir, bounds=bounds(40), lr=1e-3)
    plant(loop, 7, FOR_EVER, rank=None, kind="layer", once=True)
    seen, rates = [], {}
    run_step = loop.run_step

    def watched_run_step(batch, cond):
        seen.append(loop.global_step)
        run_step(batch, cond)
        rates[loop.global_step] = loop.opt.param_groups[0]["lr"]

    loop.run_step = watched_run_step
    loop.run_loop()
    assert seen == [*range(7 + PATIENCE), *range(6, 40)]
    assert rates[3] == 1e-3
    assert rates[39] == pytest.approx(1e-3 * LOWERED_RATE)
    assert loop.skipped == 0  # as at step 5
    steps = [int(row["step"]) for row in rows(run_dir)]
    assert steps == list(range(40))  # each row once
    assert steps_saved(run_dir) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert_saved_weights_are_finite(run_dir)
    assert "going back once" in log_text(run_dir)
    assert torch.load(run_dir / "state000040.pt")["lr_scale"] == LOWERED_RATE
    assert (run_dir / "divergence_000026.json").exists()


def test_a_stopped_run_remembers_that_it_went_back(run_dir, digits_dir):
    """And the checkpoints of the steps that it takes back count no more."""
    loop = make_loop(digits_dir, bounds=bounds(60))
    plant(loop, 7, FOR_EVER, rank=None, kind="layer", once=True)
    run_step = loop.run_step

    def stopped_run_step(batch, cond):
        run_step(batch, cond)
        if loop.lr_scale < 1 and loop.global_step == 8:
            signal.raise_signal(signal.SIGTERM)

    loop.run_step = stopped_run_step
    with pytest.raises(Exception, match="stopped by SIGTERM after step 8"):
        loop.run_loop()
    again = make_loop(digits_dir, bounds=bounds(12))
    assert again.global_step == 9
    assert again.lr_scale == LOWERED_RATE
    plant(again, 0, FOR_EVER, rank=None, kind="loss")
    again.bounds = bounds(0)
    again.total_steps = None
    with pytest.raises(Diverged):
        again.run_loop()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("layer", f"the output of {LAYER} (ResBlock)"),
        ("loss", "the loss, from a finite output of the network"),
    ],
)
def test_a_hopeless_run_stops_with_a_report(run_dir, digits_dir, kind, expected):
    loop = make_loop(digits_dir, bounds=bounds(100))
    plant(loop, 7, FOR_EVER, rank=None, kind=kind)
    seen = {}
    run_step = loop.run_step

    def watched_run_step(batch, cond):
        run_step(batch, cond)
        seen[loop.global_step] = torch.cat(loop.timesteps).tolist()

    loop.run_step = watched_run_step
    with pytest.raises(Diverged, match="diverged"):
        loop.run_loop()
    paths = sorted(run_dir.glob("divergence_*.json"))
    assert [path.name for path in paths] == ["divergence_000026.json"]
    (report,) = json.loads(paths[0].read_text())
    assert report["step"] == 26
    assert report["rank"] == 0
    assert report["first_nonfinite"] == expected
    assert report["timesteps"] == seen[26]
    assert len(report["losses"]) == 2
    assert set(report["losses"]) <= {"nan", "inf"}
    assert report["images"] == loop.data.files(26 * 2, 2)
    assert_saved_weights_are_finite(run_dir)
    assert str(paths[0]) in log_text(run_dir)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(run_dir, digits_dir):
    loop = make_loop(digits_dir, bounds=bounds(100), save_interval=1000)
    plant(loop, 0, FOR_EVER, rank=None, kind="weights")  # step 0 is not saved
    with pytest.raises(Diverged):
        loop.run_loop()
    assert "not saved" in log_text(run_dir)
    assert not list(run_dir.glob("model*"))
    (report,) = json.loads((run_dir / "divergence_000020.json").read_text())
    name = [name for name, _ in loop.model.named_parameters()][3]
    assert report["first_nonfinite"] == f"the weights of {name}"


def test_weights_that_are_not_finite_are_never_saved(run_dir, digits_dir):
    loop = make_loop(digits_dir, bounds=bounds(12))
    plant(loop, 6, FOR_EVER, rank=None, kind="weights")
    loop.run_loop()
    assert steps_saved(run_dir) == [0, 5]
    assert "step 10 is not saved" in log_text(run_dir)
    assert "step 12 is not saved" in log_text(run_dir)
    assert_saved_weights_are_finite(run_dir)


# -- processes --------------------------------------------------------------------------------


def run_worker(tmp_path, digits_dir, processes, **fault):
    launcher = "torchrun" if processes > 1 else "single"
    env = environment(DIVERGING=json.dumps(fault))
    return start(launcher, WORKER, tmp_path, digits_dir, processes=processes, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_exit_code_of_a_hopeless_run(tmp_path, digits_dir, processes):
    done = run_worker(
        tmp_path,
        digits_dir,
        processes,
        train_steps=100,
        steps=[7, FOR_EVER],
        rank=processes - 1,
        kind="layer",
    )
    assert "training diverged: 20 steps in a row up to step 26" in done.stderr, done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(WORKER) not in done.stderr
    if processes == 1:
        assert done.returncode == 3
    else:
        assert done.stderr.count("exitcode  : 3") >= 1, done.stderr
        assert not [n for n in range(1, 256) if n != 3 and f"exitcode  : {n} " in done.stderr]
    reports = json.loads((tmp_path / "run" / "divergence_000026.json").read_text())
    assert [report["rank"] for report in reports] == list(range(processes))
    assert reports[-1]["first_nonfinite"] == f"the output of {LAYER} (ResBlock)"
    if processes == 2:
        assert "second pass" in reports[0]["first_nonfinite"] or (
            "gradient" in reports[0]["first_nonfinite"]
        )
        assert f"first in the output of {LAYER}" in done.stderr
    files = [report["images"] for report in reports]
    assert len({name for part in files for name in part}) == 2 * processes
    ends = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(processes)]
    assert all(map(torch.equal, ends[0], ends[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "loss"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_skip_what_one_of_them_sees(tmp_path, digits_dir, kind, rank):
    done = run_worker(tmp_path, digits_dir, 2, train_steps=8, steps=[3, 4], rank=rank, kind=kind)
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    assert all(map(torch.equal, *ends))
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")][2:5] == ["", "1", "1"]
    state = torch.load(tmp_path / "run" / "state000008.pt")
    opt = torch.load(tmp_path / "run" / "opt000008.pt")
    assert state["skipped"] == 1
    assert {int(entry["step"]) for entry in opt["state"].values()} == {7}
    assert_saved_weights_are_finite(tmp_path / "run")
