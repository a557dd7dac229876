"""Results of images: what is known of them, stored and taken up again."""

import math

import numpy as np
import pytest
import torch

from improved_diffusion import dist_util, nll_results
from improved_diffusion.errors import UserError
from improved_diffusion.nll_results import Measured, Results, measure_all, saving

FLAGS = {"seed": 0, "method": "vlb", "model_path": {"path": "a.pt", "sha256": "12" * 32}}


def make_results(indices=(0, 1, 2, 3)):
    results = Results(["vlb", "ode"])
    generator = np.random.default_rng(0)
    for part in (indices[:1], indices[1:]):
        bpd = generator.normal(size=(2, len(part)))
        results.add(
            part,
            {
                "vlb": Measured(bpd[0], {"vb": generator.normal(size=5)}),
                "ode": Measured(bpd[1], {"evaluations": np.array(7)}),
            },
        )
    return results


def test_estimates_are_means_with_their_standard_errors():
    results = make_results()
    for method in ("vlb", "ode"):
        estimate = results.estimate(method)
        assert estimate.count == 4
        assert estimate.bpd == results.bpd[method].mean()
        assert estimate.standard_error == results.bpd[method].std(ddof=1) / 2
    assert results.means("ode")["evaluations"] == 14 / 4
    assert results.means("vlb")["vb"].shape == (5,)
    assert results.estimate("vlb").bpd != results.estimate("ode").bpd
    one = Results(["vlb"])
    one.add([3], {"vlb": Measured(np.array([2.0]), {})})
    assert one.estimate("vlb").standard_error == math.inf


def test_what_is_missing_is_known():
    assert make_results((5, 0, 3)).missing(7) == [1, 2, 4, 6]
    assert make_results((5, 0, 3)).missing(1) == []


def test_stored_results_come_back_whole(tmp_path):
    results, path = make_results((4, 0, 2)), str(tmp_path / "state.npz")
    results.save(path, FLAGS)
    again = Results(["vlb", "ode"])
    again.load(path, FLAGS)
    order = np.argsort(results.indices)
    assert again.indices.tolist() == [0, 2, 4]
    for method in ("vlb", "ode"):
        assert again.bpd[method].tolist() == results.bpd[method][order].tolist()
        for name, values in results.sums[method].items():
            np.testing.assert_array_equal(again.sums[method][name], values)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["index"].tolist() == [0, 2, 4]
        assert arrays["bpd_vlb"].tolist() == again.bpd["vlb"].tolist()
    again.add([9], {name: Measured(np.zeros(1), {}) for name in ("vlb", "ode")})
    assert again.count == 4


def test_a_folder_without_results_is_a_beginning(tmp_path):
    results = Results(["vlb"])
    results.load(str(tmp_path / "none.npz"), FLAGS)
    assert results.count == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "holds results of --seed 0, not --seed 1: give the same"),
        ({"method": "both"}, "--method vlb, not --method both"),
        ({"model_path": {"path": "a.pt", "sha256": "34" * 32}}, "a.pt .sha256 12121212., not"),
        ({"new": 3}, "no --new, not --new 3"),
    ],
)
def test_results_of_other_flags_are_refused(tmp_path, change, words):
    path = str(tmp_path / "state.npz")
    make_results().save(path, FLAGS)
    with pytest.raises(UserError, match=words):
        Results(["vlb", "ode"]).load(path, {**FLAGS, **change})
    moved = {**FLAGS, "model_path": {**FLAGS["model_path"], "path": "elsewhere.pt"}}
    Results(["vlb", "ode"]).load(path, moved)


@pytest.mark.parametrize("harm", ["cut", "text", "flipped", "empty", "other"])
def test_damaged_results_are_named(tmp_path, harm):
    path = tmp_path / "state.npz"
    make_results().save(str(path), FLAGS)
    content = bytearray(path.read_bytes())
    place = content.index(np.float64(make_results().bpd["vlb"][2]).tobytes())
    content[place] ^= 1
    if harm == "other":
        np.savez(path, np.zeros(3))
    else:
        whole = path.read_bytes()
        harmed = {"cut": whole[:300], "text": b"no", "flipped": content, "empty": b""}
        path.write_bytes(harmed[harm])
    with pytest.raises(UserError, match=r"state.npz' is damaged: delete it"):
        Results(["vlb", "ode"]).load(str(path), FLAGS)


class Means:
    """Of each image its mean, and how many there were."""

    def measure(self, images, model_kwargs, indices):
        bpd = images.double().flatten(1).mean(dim=1).numpy()
        return Measured(bpd, {"count": np.array(len(images))})

    def protocol(self):
        return {}


def batches(*indices):
    for part in indices:
        yield torch.tensor(part, dtype=torch.float32).view(-1, 1, 1, 1), {}, part


def test_all_processes_know_all_results(monkeypatch):
    """A second one has images 10, 11 and then none."""
    theirs = iter([[10, 11], []])

    def gather(mine):
        part = next(theirs)
        images = torch.tensor(part, dtype=torch.float32).view(-1, 1, 1, 1)
        return [mine, (part, {"mean": Means().measure(images, {}, part)} if part else {})]

    monkeypatch.setattr(dist_util, "gather_objects", gather)
    results = Results(["mean"])
    counts = [one.count for one in measure_all({"mean": Means()}, batches([0, 1], [2]), results)]
    assert counts == [4, 5]
    assert results.indices.tolist() == [0, 1, 10, 11, 2]
    assert results.bpd["mean"].tolist() == [0, 1, 10, 11, 2]
    assert results.sums["mean"]["count"] == 5


@pytest.mark.parametrize(("seconds", "saves"), [(0, [1, 2, 3, 3]), (1e9, [3])])
def test_results_are_saved_now_and_then_and_in_the_end(tmp_path, monkeypatch, seconds, saves):
    monkeypatch.setattr(nll_results, "SAVE_SECONDS", seconds)
    seen = []
    monkeypatch.setattr(Results, "save", lambda self, path, flags: seen.append(self.count))
    rounds = measure_all({"mean": Means()}, batches([0], [1], [2]), Results(["mean"]))
    assert len(list(saving(rounds, str(tmp_path / "state.npz"), FLAGS))) == 3
    assert seen == saves


def test_other_processes_save_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(nll_results, "SAVE_SECONDS", 0)
    monkeypatch.setattr(dist_util, "get_rank", lambda: 1)
    rounds = measure_all({"mean": Means()}, batches([0], [1]), Results(["mean"]))
    list(saving(rounds, str(tmp_path / "state.npz"), FLAGS))
    assert not list(tmp_path.iterdir())
