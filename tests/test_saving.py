"""Which checkpoints stay, and writing them while training goes on."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from improved_diffusion import checkpoint, saving
from improved_diffusion.dist_util import load_state_dict
from improved_diffusion.errors import UserError
from improved_diffusion.saving import Saver, SavingOptions

STEPS = [0, 5, 10, 15, 20, 23]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, STEPS),
        ({"keep_checkpoints": 1}, [23]),
        ({"keep_checkpoints": 3}, [15, 20, 23]),
        ({"keep_checkpoints": 9}, STEPS),
        ({"keep_checkpoints": 1, "keep_every": 10}, [0, 10, 20, 23]),
        ({"keep_checkpoints": 2, "keep_every": 100}, [0, 20, 23]),
    ],
)
def test_newest_and_every_so_many_steps_are_kept(options, kept):
    assert SavingOptions(**options).kept(STEPS) == set(kept)
    assert SavingOptions(**options).kept([]) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save_minutes": -1.0}, "--save_minutes -1"),
        ({"keep_checkpoints": -1}, "--keep_checkpoints -1"),
        ({"keep_checkpoints": 2, "keep_every": -1}, "--keep_every -1"),
        ({"keep_every": 5}, "--keep_every 5 needs --keep_checkpoints"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        SavingOptions(**options)


def files_of(step, value=1.0):
    names = [checkpoint.state_name(step), checkpoint.model_name(step)]
    return {name: {"w": torch.full((3,), value)} for name in names}


def newest(folder):
    return checkpoint.find_newest_model(str(folder))


def weights(folder, step):
    return load_state_dict(str(folder / checkpoint.model_name(step)), map_location="cpu")["w"]


class Gate:
    """Holds up writing until it is opened; tells how much goes on at a time."""

    def __init__(self, monkeypatch, error=None):
        self.open, self.entered = threading.Event(), threading.Event()
        self.threads, self.now, self.most = [], 0, 0
        write = checkpoint.write_checkpoint

        def held(*args):
            self.threads.append(threading.current_thread())
            self.now += 1
            self.most = max(self.most, self.now)
            self.entered.set()
            assert self.open.wait(20)
            try:
                if error:
                    raise error
                write(*args)
            finally:
                self.now -= 1

        monkeypatch.setattr(checkpoint, "write_checkpoint", held)


def test_outside_of_a_block_a_save_is_complete_when_it_returns(tmp_path):
    saver = Saver(SavingOptions())
    assert not saver.in_background
    saver.save(str(tmp_path), 4, files_of(4))
    assert newest(tmp_path) == str(tmp_path / "model000004.pt")


def test_inside_a_block_training_goes_on_while_a_thread_writes(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with Saver(SavingOptions()) as saver:
        assert saver.in_background
        saver.save(str(tmp_path), 4, files_of(4))
        assert gate.entered.wait(20)
        assert newest(tmp_path) is None  # we are back and it is not written
        assert gate.threads[0] is not threading.current_thread()
        saver.check()  # neither waits nor complains
        gate.open.set()
    assert newest(tmp_path) == str(tmp_path / "model000004.pt")
    assert not saver.in_background
    assert not gate.threads[0].is_alive()


def test_tensors_are_copied_before_training_changes_them(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    param = torch.nn.Parameter(torch.ones(3))
    moment, count = torch.ones(3), torch.tensor(1.0)
    state = {"state": {0: {"exp_avg": moment, "step": count}}, "pending": [(count, {"m": moment})]}
    files = {"state000004.pt": state, "model000004.pt": {"w": param, "again": param.detach()}}
    with Saver(SavingOptions()) as saver:
        saver.save(str(tmp_path), 4, files)
        with torch.no_grad():
            for tensor in (param, moment, count):
                tensor.zero_()
        state["state"][0]["new"] = state["pending"].append(3)
        gate.open.set()
    stored = load_state_dict(str(tmp_path / "state000004.pt"), map_location="cpu")
    assert stored["state"][0]["exp_avg"].tolist() == [1, 1, 1]
    assert stored["state"][0].keys() == {"exp_avg", "step"}
    ((count, more),) = stored["pending"]
    assert (count.item(), more["m"].tolist()) == (1, [1, 1, 1])
    model = load_state_dict(str(tmp_path / "model000004.pt"), map_location="cpu")
    assert (model["w"].tolist(), model["again"].tolist()) == ([1, 1, 1], [1, 1, 1])
    assert not model["w"].requires_grad


def test_one_save_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    returned = []
    with Saver(SavingOptions()) as saver:
        saver.save(str(tmp_path), 1, files_of(1))
        assert gate.entered.wait(20)

        def later():
            saver.save(str(tmp_path), 2, files_of(2))
            returned.append(newest(tmp_path))

        second = threading.Thread(target=later)
        second.start()
        second.join(0.1)
        assert second.is_alive()  # waits for the first
        gate.open.set()
        second.join(20)
    assert returned[0] is not None  # the first was complete
    assert gate.most == 1
    assert newest(tmp_path) == str(tmp_path / "model000002.pt")


@pytest.mark.parametrize("how", ["check", "wait", "save", "end"])
def test_error_of_the_thread_is_raised_at_the_next_occasion(tmp_path, monkeypatch, how):
    gate = Gate(monkeypatch, OSError(28, "No space left on device", "model000004.pt"))
    gate.open.set()

    def train():
        with Saver(SavingOptions()) as saver:
            saver.save(str(tmp_path), 4, files_of(4))
            writing = saver._writing
            while not writing.done():
                time.sleep(0.01)
            if how == "save":
                saver.save(str(tmp_path), 5, files_of(5))
            elif how != "end":
                getattr(saver, how)()
            assert how == "end"

    with pytest.raises(OSError, match=r"No space left on device: 'model000004\.pt'"):
        train()
    assert newest(tmp_path) is None


def test_error_is_raised_once(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, OSError("full"))
    gate.open.set()
    with Saver(SavingOptions()) as saver:
        saver.save(str(tmp_path), 4, files_of(4))
        with pytest.raises(OSError, match="full"):
            saver.wait()
        saver.wait()
        saver.check()


def test_error_of_training_comes_before_that_of_the_thread_and_lets_it_finish(
    tmp_path, monkeypatch
):
    gate = Gate(monkeypatch)
    threading.Timer(0.1, gate.open.set).start()

    def train():
        with Saver(SavingOptions()) as saver:
            saver.save(str(tmp_path), 4, files_of(4))
            raise KeyError("of training")

    with pytest.raises(KeyError, match="of training"):
        train()
    assert newest(tmp_path) == str(tmp_path / "model000004.pt")


def test_old_checkpoints_are_removed_after_the_new_one_counts(tmp_path, monkeypatch):
    seen = []
    prune = checkpoint.prune
    monkeypatch.setattr(
        checkpoint, "prune", lambda *args: (seen.append(newest(tmp_path)), prune(*args))
    )
    saver = Saver(SavingOptions(keep_checkpoints=2, keep_every=10))
    for step in range(0, 25, 4):
        saver.save(str(tmp_path), step, files_of(step))
        assert seen[-1] == str(tmp_path / checkpoint.model_name(step))
    left = sorted(path.name for path in tmp_path.glob("*.json"))
    assert left == [checkpoint.manifest_name(step) for step in (0, 20, 24)]
    assert len(list(tmp_path.iterdir())) == 9


def test_without_the_flag_no_checkpoint_is_removed(tmp_path):
    saver = Saver(SavingOptions())
    for step in range(5):
        saver.save(str(tmp_path), step, files_of(step))
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_saves_are_due_by_the_clock(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    saver, never = Saver(SavingOptions(save_minutes=1.5)), Saver(SavingOptions())
    for passed, due in [(0, False), (89, False), (90, True), (500, True)]:
        now[0] = 1000 + passed
        assert saver.due is due
        assert not never.due
    saver.save(str(tmp_path), 0, files_of(0))
    for passed, due in [(500, False), (589, False), (590, True)]:
        now[0] = 1000 + passed
        assert saver.due is due


def test_weights_of_each_step_are_those_of_the_step(tmp_path):
    with Saver(SavingOptions()) as saver:
        for step in range(4):
            saver.save(str(tmp_path), step, files_of(step, value=float(step)))
    for step in range(4):
        assert weights(tmp_path, step).tolist() == [step] * 3


@pytest.fixture
def copies():
    return saving._HostCopies()


def test_memory_of_copies_is_used_again(copies):
    """Values, types and forms are those of the newest, whatever came before."""
    param, moment = torch.nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    turned, half = torch.randn(4, 3).t(), torch.randn(3, 4).half()
    sparse = torch.eye(3).to_sparse()
    one = copies.of({"a": param, "list": [(moment, turned), half], "n": 3, "sparse": sparse})
    places = {tensor.data_ptr() for tensor in (one["a"], *one["list"][0], one["list"][1])}
    for _ in range(2):
        with torch.no_grad():
            for tensor in (param, moment, turned, half):
                tensor.add_(1)
        # another order, and one that does not fit
        values = {"half": half, "b": (turned, moment, param.detach(), torch.ones(7)), "s": sparse}
        two = copies.of(values)
        _, moved, *_ = two["b"]
        assert places >= {two["half"].data_ptr(), two["b"][0].data_ptr(), moved.data_ptr()}
        assert two["half"].dtype is torch.float16
        assert two["b"][0].stride() == turned.stride()
        for copy, source in zip([two["half"], *two["b"]], [half, *values["b"]], strict=True):
            assert torch.equal(copy, source)
            assert copy.data_ptr() != source.data_ptr()
        assert torch.equal(two["s"].to_dense(), torch.eye(3))
    assert len(copies._kept) == 6  # what was not needed is let go


def test_shares_are_copied_into_the_same_memory(copies):
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        local = torch.randn(3, 4)
        share = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
        first = copies.of([share])[0]
        place = first.to_local().data_ptr()
        local.add_(1)
        (second,) = copies.of([share])
        assert second.to_local().data_ptr() == place != local.data_ptr()
        assert torch.equal(second.to_local(), local)
        assert second.placements == share.placements
        assert not second.requires_grad
        whole = DTensor.from_local(local, mesh, [Replicate()])
        assert copies.of([whole])[0].placements == whole.placements
    finally:
        dist.destroy_process_group()


def test_copies_outlive_neither_the_block_nor_the_next_save(tmp_path, monkeypatch):
    """A save waits for the one before, whose memory it takes."""
    gate = Gate(monkeypatch)
    with Saver(SavingOptions()) as saver:
        saver.save(str(tmp_path), 1, files_of(1, value=1.0))
        assert gate.entered.wait(20)
        threading.Timer(0.1, gate.open.set).start()
        saver.save(str(tmp_path), 2, files_of(2, value=2.0))
        assert saver._copies._kept
    assert not saver._copies._kept
    assert weights(tmp_path, 1).tolist() == [1, 1, 1]
    assert weights(tmp_path, 2).tolist() == [2, 2, 2]
