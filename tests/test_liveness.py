"""Real processes that die, stop or stall; sockets and threads of the watch inside this one."""

import contextlib
import os
import re
import signal
import socket
import time

import pytest
from launchers import TESTS, ends, environment, start_by_hand

from improved_diffusion import heartbeat, liveness, stalls
from improved_diffusion.heartbeat import Hub, Member
from improved_diffusion.stalls import Status, describe, processes
from improved_diffusion.wire import Wire

WORKER = TESTS / "workers" / "lively_worker.py"
HOST = re.escape(socket.gethostname())


def wait_until(condition, seconds=60):
    """Wait for what must come to pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.02)


def begin(kind, folder, *args, processes=3, **more):
    """Start workers by hand and wait until all are in place."""
    started = start_by_hand(
        WORKER, kind, folder, *args, ranks=range(processes), processes=processes, **more
    )
    ready = [folder / f"ready.{rank}" for rank in range(processes)]
    try:
        wait_until(lambda: all(path.exists() for path in ready))
    except AssertionError:
        raise AssertionError([end.stderr for end in ends(started)]) from None
    return started


def lose(started, rank, how):
    """Send a process a signal; what the others came to."""
    started[rank].send_signal(how)
    others = [process for process in started if process is not started[rank]]
    try:
        return ends(others, timeout=60)
    finally:
        started[rank].kill()
        started[rank].wait()


def assert_named(done, lost, how):
    """One line of an error, which names the lost process, and exit code 2."""
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    name = rf"error: process {lost.rank} of \d+ \(host {HOST}, pid {lost.pid}\) "
    assert re.fullmatch(name + how + ": this process ends too", line), line
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


class Lost:
    def __init__(self, rank, process):
        self.rank, self.pid = rank, process.pid


# -- processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "how", "kind"),
    [
        (1, signal.SIGKILL, "in_a_collective"),
        (0, signal.SIGSTOP, "apart"),
        pytest.param(0, signal.SIGKILL, "apart", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, "in_a_collective", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, "apart", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, "in_a_collective", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGSTOP, "apart", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_takes_the_others_down_and_is_named(tmp_path, rank, how, kind):
    started = begin(kind, tmp_path)
    dones = lose(started, rank, how)
    doing = {"apart": f"working on share {rank}"}.get(kind, "taking step 501")
    doing = "saving step 500" if kind == "in_a_collective" and rank else doing
    sign = "ended without a word" if how is signal.SIGKILL else "has given no sign of life for 2 s"
    for done in dones:
        assert_named(done, Lost(rank, started[rank]), f"{sign}, last seen {doing}")


@pytest.mark.slow
def test_forked_processes_do_not_hold_the_connection(tmp_path):
    started = begin("with_forked_children", tmp_path, processes=2)
    children = [tmp_path / f"child.{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in children))
    try:
        for done in lose(started, 1, signal.SIGKILL):
            assert_named(done, Lost(1, started[1]), "ended without a word")
    finally:
        for path in children:
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_file_that_is_being_written_is_finished(tmp_path):
    started = begin("writing", tmp_path, processes=2)
    for done in lose(started, 1, signal.SIGKILL):
        assert_named(done, Lost(1, started[1]), "ended without a word")
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.slow
def test_suspending_and_resuming_all_harms_nothing(tmp_path):
    started = begin("apart", tmp_path)
    for process in started:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # twice what counts as lost
    for process in reversed(started):
        process.send_signal(signal.SIGCONT)
    time.sleep(4)
    assert [process.poll() for process in started] == [None] * 3
    for done in lose(started, 2, signal.SIGKILL):  # and they still watch
        assert_named(done, Lost(2, started[2]), "ended without a word, last seen working on.*")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_holds_the_interpreter_is_not_lost(tmp_path, rank):
    for done in ends(start_by_hand(WORKER, "holding_the_lock", tmp_path, rank)):
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["up", pytest.param("down", marks=pytest.mark.slow)])
def test_ending_well_is_not_being_lost(tmp_path, order):
    started = start_by_hand(
        WORKER, "ending_one_by_one", tmp_path, order, ranks=range(3), processes=3
    )
    for done in ends(started):
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_fails_says_why_to_all(tmp_path, rank):
    started = start_by_hand(WORKER, "failing", tmp_path, rank, ranks=range(3), processes=3)
    dones = ends(started)
    own = dones.pop(rank)
    assert (own.returncode, own.stderr) == (2, "error: --flag 3: one rank dislikes it\n")
    for done in dones:
        how = "ended with: error: --flag 3: one rank dislikes it"
        assert_named(done, Lost(rank, started[rank]), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["run_main", "bare"])
def test_a_script_that_exits_on_one_process_takes_the_others_down(tmp_path, how):
    kind = "exiting" if how == "run_main" else "in_a_collective"
    started = start_by_hand(WORKER, kind, tmp_path, how)
    if how == "bare":  # an exception that nothing catches
        wait_until(lambda: (tmp_path / "ready.1").exists())
        started[1].send_signal(signal.SIGINT)
    first, second = ends(started)
    assert second.returncode == (7 if how == "run_main" else -signal.SIGINT)
    assert first.returncode in (1, 2)  # without run_main a collective's own error may come first
    assert how == "bare" or "ended with: exit code 7" in first.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_fails_before_the_meeting_is_not_waited_for(tmp_path, rank):
    started = start_by_hand(WORKER, "too_early", tmp_path, rank)
    dones = ends(started)
    own, other = dones[rank], dones[1 - rank]
    assert (own.returncode, own.stderr) == (2, "error: --flag 3: dislikes it at once\n")
    how = "ended with: error: --flag 3: dislikes it at once"
    assert_named(other, Lost(rank, started[rank]), how)


@pytest.mark.slow
def test_a_start_that_stalls_says_who_does_what(tmp_path):
    started = start_by_hand(WORKER, "stalling", tmp_path, ranks=range(3), processes=3)
    first, *others = ends(started)
    lines = first.stderr.splitlines()
    doing = "process 0 is listing the images of /data; processes 1, 2 wait for process 0"
    assert len(lines) == 2  # none after the start
    assert all(re.fullmatch(rf"start-up has taken \d s: {doing}", line) for line in lines), lines
    assert [(done.returncode, done.stderr) for done in others] == [(0, "")] * 2


@pytest.mark.slow
def test_missing_processes_are_named_again_and_again_and_then_given_up(tmp_path):
    env = environment(GIVE_UP="3")
    started = start_by_hand(WORKER, "apart", tmp_path, ranks=[0, 2], processes=4, env=env)
    first, other = ends(started)
    waits = r"process 0 of 4 \(host .*\) has waited {} s for processes 1, 3, not joined yet"
    *told, last = first.stderr.splitlines()
    for line, seconds in zip(told, (1, 2), strict=True):
        assert re.fullmatch(r"process 0 of 4 .* has waited \d s for processes? [1-3, -]+.*", line)
        assert f"waited {seconds} s" in line
    assert re.fullmatch("error: " + waits.format(3) + ": it gives up", last), last
    assert first.returncode == other.returncode == 2
    assert "ended with: error: process 0 of 4" in other.stderr


@pytest.mark.slow
def test_a_first_process_that_does_not_come_is_waited_for_with_its_address(tmp_path):
    (started,) = start_by_hand(
        WORKER, "apart", tmp_path, ranks=[1], port=1, env=environment(GIVE_UP="2")
    )
    (done,) = ends([started])
    name = f"process 1 of 2 (host {socket.gethostname()}) has waited"
    assert done.stderr.splitlines() == [
        f"{name} 1 s for process 0 at 127.0.0.1:1",
        f"error: {name} 2 s for process 0 at 127.0.0.1:1: it gives up",
    ]
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how"), [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGKILL)]
)
def test_in_earnest_all_end_within_a_minute(tmp_path, rank, how):
    started = begin("in_a_collective", tmp_path, env=environment(IN_EARNEST="1"))
    dones = lose(started, rank, how)  # waits no longer than 60 s
    for done in dones:
        sign = "has given no sign of life for 40 s" if how is signal.SIGSTOP else "ended .* word"
        assert_named(done, Lost(rank, started[rank]), f"{sign}, last seen .*")


@pytest.mark.slow
def test_in_earnest_a_start_says_after_two_minutes_what_it_waits_for(tmp_path):
    (started,) = start_by_hand(
        WORKER, "apart", tmp_path, ranks=[0], env=environment(IN_EARNEST="1")
    )
    began = time.monotonic()
    line = started.stderr.readline()
    assert 120 <= time.monotonic() - began < 150
    assert line.endswith("has waited 120 s for process 1, not joined yet\n")
    started.kill()
    ends([started])


# -- the watch, in this process ---------------------------------------------------------------


class Ended(list):
    """Where watches that would end their process write why."""


@pytest.fixture
def watches(monkeypatch):
    """A hub and a function that makes members; the list of why they would have ended."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.1)
    ended = Ended()

    def arguments(rank):
        end = lambda line: ended.append((rank, line))  # noqa: E731
        return rank, 3, lambda: Status(f"share {rank}"), lambda: False, end

    hub = Hub(*arguments(0))
    hub.start()
    made = []

    def member(rank, token=hub.token):
        sock = socket.create_connection(("127.0.0.1", hub.port))
        made.append(Member(Wire(sock), token, "127.0.0.1", *arguments(rank)))
        made[-1].start()
        return made[-1]

    yield hub, member, ended
    for watch in (hub, *made):
        watch.leave()


def test_members_join_and_say_goodbye(watches):
    hub, member, ended = watches
    first, second = member(1), member(2)
    assert hub.all_here.wait(10)
    hub.go()
    assert first.all_here.wait(10)
    first.leave()
    first.peers[0].wire.sock.shutdown(socket.SHUT_RDWR)
    time.sleep(1)
    hub.leave()
    second.leave("too late to matter")
    time.sleep(0.5)
    assert ended == []


def test_the_first_loss_is_the_one_that_is_named(watches):
    hub, member, ended = watches
    first, second = member(1), member(2)
    assert hub.all_here.wait(10)
    first.leave("error: first")
    second.leave("error: second, because of the first")
    assert "process 1 of 3" in second.blame(10)
    wait_until(lambda: ended)
    ((rank, line),) = ended  # those who leave end by themselves
    assert rank == 0
    assert re.fullmatch(r"process 1 of 3 \(.*\) ended with: error: first: this .* too", line)


def test_strangers_are_turned_away(watches):
    hub, member, ended = watches
    assert member(1, token="of another run").gone.wait(10)
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n", b"x" * 2**17):
        with socket.create_connection(("127.0.0.1", hub.port)) as sock:
            sock.sendall(nonsense)
            sock.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    assert hub.missing() == [1, 2]
    assert member(1).welcome.wait(10)
    assert member(1).gone.wait(10)  # there is one already
    assert ended == []


def test_a_late_member_learns_what_went_wrong_before(watches):
    hub, member, _ = watches
    member(1).leave("error: first")
    assert hub.blame(10)
    assert "ended with: error: first" in member(2).blame(10)


def test_only_one_thread_ends_a_process(watches):
    _, member, ended = watches
    second = member(2)
    assert second.claim()
    assert not second.claim()
    member(1).leave("error: first")
    wait_until(lambda: ended)
    time.sleep(0.5)
    assert [rank for rank, _ in ended] == [0]


# -- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "process 3"),
        ([0, 1], "processes 0, 1"),
        ([0, 1, 2], "processes 0-2"),
        ([1, 3, 4, 5, 9], "processes 1, 3-5, 9"),
    ],
)
def test_ranks_are_named_in_spans(ranks, text):
    assert processes(ranks) == text


def test_processes_that_do_the_same_are_named_together():
    listing = Status("listing the images of x", starting=True)
    waiting = Status("listing the images of x", starting=True, waits=True)
    everyone = {0: listing, 1: waiting, 2: waiting, 3: Status("loading y", True), 4: Status("z")}
    assert describe(everyone) == (
        "process 0 is listing the images of x; processes 1, 2 wait for process 0; "
        "process 3 is loading y; process 4 has started"
    )


def test_marks_are_harmless_alone_and_nest():
    before = liveness.status()
    liveness.doing("listing", starting=True)
    with liveness.during("loading x"):
        assert liveness.status() == Status("loading x", starting=True)
        with liveness.during(waits=True):
            assert liveness.status() == Status("loading x", starting=True, waits=True)
    assert liveness.status() == Status("listing", starting=True)
    with liveness.finishing():
        assert liveness.busy()
    assert not liveness.busy()
    liveness.leave("no one hears it")
    assert liveness.blame() == ""
    assert liveness.claim()
    liveness.doing(before.what, before.starting)


def test_what_is_awaited_is_said_until_it_comes(monkeypatch, capsys):
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.2)
    with stalls.overdue("process 1 of 2", lambda: "process 0", end=None):
        time.sleep(0.5)
    time.sleep(0.5)
    assert capsys.readouterr().err.splitlines() == [
        "process 1 of 2 has waited 0 s for process 0",
        "process 1 of 2 has waited 0 s for process 0",
    ]
