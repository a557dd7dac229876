"""Bounds of training, and signals that ask it to stop."""

import os
import signal
import threading

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.stopping import STOP_SIGNALS, Bounds, StopSignals, ignore_stop_signals

SIGNALS = [getattr(signal, name) for name in STOP_SIGNALS]


# -- bounds


@pytest.mark.parametrize(
    ("bounds", "arguments", "total"),
    [
        ({}, {}, None),
        ({}, {"lr_anneal_steps": 7}, 7),
        ({"train_steps": 5}, {}, 5),
        ({"train_steps": 5}, {"lr_anneal_steps": 7}, 5),
        ({"train_steps": 7}, {"lr_anneal_steps": 7}, 7),
        ({"train_images": 80}, {}, 10),
        ({"train_images": 81}, {}, 11),
        ({"train_images": 1}, {}, 1),
        ({"train_images": 80, "train_steps": 10}, {}, 10),
        ({"train_hours": 3.0}, {}, None),
        ({"train_hours": 3.0, "train_steps": 5}, {}, 5),
        # going on: other sittings may have had another global batch
        ({"train_steps": 5}, {"step": 3, "images": 999}, 5),
        ({"train_images": 80}, {"step": 3, "images": 40}, 8),
        ({"train_images": 80}, {"step": 20, "images": 77}, 21),
        ({"train_images": 80}, {"step": 20, "images": 80}, 20),
        ({"train_images": 80}, {"step": 20, "images": 200}, 20),
    ],
)
def test_step_at_which_training_ends(bounds, arguments, total):
    arguments = {"lr_anneal_steps": 0, "global_batch": 8, **arguments}
    assert Bounds(**bounds).total_steps(**arguments) == total


@pytest.mark.parametrize(
    ("bounds", "lr_anneal_steps", "words"),
    [
        ({"train_steps": 5, "train_images": 80}, 0, ["--train_steps 5", "--train_images 80", "10"]),
        ({"train_steps": 8}, 7, ["--train_steps 8", "--lr_anneal_steps 7"]),
        ({"train_images": 57}, 7, ["--train_images 57", "--lr_anneal_steps 7"]),
    ],
)
def test_bounds_that_contradict_are_named(bounds, lr_anneal_steps, words):
    with pytest.raises(UserError) as error:
        Bounds(**bounds).total_steps(lr_anneal_steps, 8)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train_steps", "train_images", "train_hours"])
def test_negative_bounds_are_named(name):
    with pytest.raises(UserError, match=f"--{name} -1"):
        Bounds(**{name: -1})


def test_hours_are_counted_over_all_sittings():
    assert Bounds().seconds_left(10) is None
    assert Bounds(train_hours=0.5).seconds_left(0) == 1800
    assert Bounds(train_hours=0.5).seconds_left(1790) == 10
    assert Bounds(train_hours=0.5).seconds_left(2000) == -200


@pytest.mark.parametrize(
    ("bounds", "total", "text"),
    [
        ({}, 1500, "1,500 steps"),
        ({"train_hours": 2.5}, None, "2.5 hours"),
        ({"train_hours": 2.0}, 10, "10 steps or 2 hours"),
    ],
)
def test_bounds_are_described(bounds, total, text):
    assert Bounds(**bounds).describe(total) == text


def test_training_without_an_end_is_described_with_its_flags():
    text = Bounds().describe(None)
    for flag in ("--train_steps", "--train_images", "--train_hours", "--lr_anneal_steps"):
        assert flag in text


# -- signals


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_signal_is_noted_and_nothing_else_happens(name):
    with StopSignals() as signals:
        assert signals.received == ""
        os.kill(os.getpid(), getattr(signal, name))
        assert signals.received == name


def test_second_interrupt_interrupts_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"


def test_interrupt_after_another_signal_interrupts_at_once():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_schedulers_may_repeat_their_signals(name):
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), getattr(signal, name))
        assert signals.received == name


def test_own_handlers_are_back_after_the_block():
    got = []
    signal.signal(signal.SIGUSR1, lambda *_: got.append("own"))
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert got == ["own"]
    assert signals.received == "SIGUSR1"
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_own_handlers_are_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)

    def train():
        with StopSignals():
            assert signal.getsignal(signal.SIGTERM) != before
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_changes_nothing():
    before, inside, errors = [signal.getsignal(n) for n in SIGNALS], [], []

    def train():
        try:
            with StopSignals() as signals:
                inside.extend(signal.getsignal(number) for number in SIGNALS)
                assert signals.received == ""
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == []
    assert inside == before


def test_processes_that_load_data_ignore_the_signals():
    code = os.fork()
    if code == 0:
        ignore_stop_signals(0)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 7
