"""Numbers and messages of a run: where they go, in which form, and what survives a restart."""

import logging
import os
import re
import sys

import numpy as np
import pytest
import torch
from test_log_formats import csv_rows, json_rows, tensorboard_points

from improved_diffusion import logger
from improved_diffusion.errors import UserError
from improved_diffusion.logger import KVWriter, Logger, SeqWriter

RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"]
LOG_SETTINGS = ["OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"]


@pytest.fixture(autouse=True)
def _no_logger(monkeypatch):
    """No launcher, no settings, and no current logger before and after each test."""
    for name in RANKS + LOG_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    logger.reset()
    yield
    logger.reset()


class Memory(KVWriter, SeqWriter):
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.messages, self.images, self.closed = [], [], [], False

    def writekvs(self, kvs):
        self.rows.append(dict(kvs))

    def writeimage(self, key, image, step):
        self.images.append((key, image, step))

    def writeseq(self, seq):
        self.messages.append(" ".join(map(str, seq)))

    def close(self):
        self.closed = True


class NumbersOnly(KVWriter):
    """Keeps rows, and has no idea of messages."""

    def __init__(self):
        self.rows = []

    def writekvs(self, kvs):
        self.rows.append(dict(kvs))


class FakeComm:
    """One process's side of an mpi4py communicator whose other processes said ``others``."""

    def __init__(self, rank=0, others=()):
        self.rank, self.others, self.sent = rank, list(others), []

    def Get_rank(self):
        return self.rank

    def gather(self, value, root=0):
        self.sent.append(value)
        return [value, *self.others] if self.rank == root else None


# -- numbers --------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """The output of the current logger."""
    output = Memory()
    logger._make_current(Logger(None, [output]))
    return output


def test_dump_writes_what_was_logged_once(memory):
    logger.logkv("a", 1)
    logger.logkv("a", 2)
    logger.logkvs({"b": 0.5, "c": "text"})
    assert logger.dumpkvs() == {"a": 2, "b": 0.5, "c": "text"}
    assert logger.dumpkvs() == {}
    assert memory.rows[0] == {"a": 2, "b": 0.5, "c": "text"}


def test_dumped_numbers_stay_as_they_were(memory):
    logger.logkv("a", 1)
    dumped = logger.dumpkvs()
    logger.logkv("a", 2)
    assert dumped == {"a": 1}


def test_getkvs_shows_what_a_dump_would_write(memory):
    logger.logkv("a", 1)
    logger.logkv_mean("b", 2)
    assert dict(logger.getkvs()) == {"a": 1, "b": 2}
    logger.dumpkvs()
    assert dict(logger.getkvs()) == {}


def test_mean_is_over_the_calls_since_the_last_dump(memory):
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkv_mean("other", 5)
    assert logger.dumpkvs() == pytest.approx({"loss": 3.0, "other": 5.0})
    logger.logkv_mean("loss", 10.0)
    assert logger.dumpkvs() == {"loss": 10.0}


@pytest.mark.parametrize(
    "number", [torch.tensor, lambda x: torch.tensor([x]), np.float32, np.array]
)
def test_numbers_of_torch_and_numpy_are_dumped_as_floats(memory, number):
    logger.logkv("a", number(0.5))
    for value in (1.0, 2.0):
        logger.logkv_mean("b", number(value))
    dumped = logger.dumpkvs()
    assert dumped == {"a": 0.5, "b": 1.5}
    assert [type(value) for value in dumped.values()] == [float, float]
    assert [type(value) for value in memory.rows[0].values()] == [float, float]


def test_logged_tensor_is_read_at_the_dump_only(memory):
    """Reading it earlier would wait for the device at every step."""
    value = torch.tensor(1.0)
    logger.logkv("a", value)
    assert logger.getkvs()["a"] is value
    logger.logkv_mean("b", value)
    assert isinstance(logger.getkvs()["b"], torch.Tensor)


def test_tensors_reach_every_file_as_numbers(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["log", "json", "csv", "tensorboard"])
    logger.logkv("loss", torch.tensor(0.5, requires_grad=True))
    logger.logkv_mean("mean", torch.tensor(1.5))
    logger.logkv("step", 3)
    logger.dumpkvs()
    logger.reset()
    assert json_rows(tmp_path / "progress.json") == [{"loss": 0.5, "mean": 1.5, "step": 3}]
    assert csv_rows(tmp_path / "progress.csv") == [{"loss": "0.5", "mean": "1.5", "step": "3"}]
    assert "| loss | 0.5 |" in (tmp_path / "log.txt").read_text()
    assert tensorboard_points(tmp_path / "tb")["mean"] == [(3, 1.5)]


@pytest.mark.parametrize(
    "value", [torch.zeros(4), torch.zeros(2, 1, 2), np.zeros(3), torch.zeros(0)]
)
@pytest.mark.parametrize("logkv", [logger.logkv, logger.logkv_mean])
def test_tensor_of_several_elements_is_an_error_that_names_its_key(memory, logkv, value):
    logger.logkv("step", 1)
    logkv("loss", value)
    shape = tuple(value.shape)
    message = f"logkv('loss', ...): one number is needed, not a tensor of shape {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        logger.dumpkvs()
    assert memory.rows == []


def test_image_reaches_every_output_unless_disabled(memory):
    image = np.zeros([2, 3, 3], dtype=np.uint8)
    logger.get_current().output_formats.append(NumbersOnly())  # has no idea of images
    logger.logimage("samples", image, 5)
    logger.set_level(logger.DISABLED)
    logger.logimage("samples", image, 6)
    assert memory.images == [("samples", image, 5)]


def test_older_names_of_logkv_and_dumpkvs(memory):
    logger.record_tabular("a", 1)
    assert logger.dump_tabular() == {"a": 1}
    assert memory.rows == [{"a": 1}]


# -- messages and levels --------------------------------------------------------------------------


def test_messages_are_written_from_their_level_on(memory):
    for level, passed in [
        (logger.DEBUG, ["d", "i", "l", "w", "e"]),
        (logger.INFO, ["i", "l", "w", "e"]),
        (logger.WARN, ["w", "e"]),
        (logger.ERROR, ["e"]),
        (logger.DISABLED, []),
    ]:
        memory.messages.clear()
        logger.set_level(level)
        logger.debug("d")
        logger.info("i")
        logger.log("l")
        logger.warn("w")
        logger.error("e")
        assert memory.messages == passed


def test_level_is_info_at_first(memory):
    logger.debug("d")
    logger.log("quiet", level=logger.DEBUG)
    logger.log("a", 1, level=logger.INFO)
    assert memory.messages == ["a 1"]


def test_numbers_are_written_unless_disabled(memory):
    logger.set_level(logger.ERROR)
    logger.logkv("a", 1)
    logger.dumpkvs()
    logger.set_level(logger.DISABLED)
    logger.logkv("a", 2)
    assert logger.dumpkvs() == {"a": 2}
    assert memory.rows == [{"a": 1}]


def test_output_without_messages_is_spared_them():
    numbers, memory = NumbersOnly(), Memory()
    own = Logger(None, [numbers, memory])
    own.log("hello")
    own.logkv("a", 1)
    own.dumpkvs()
    own.close()
    assert numbers.rows == memory.rows == [{"a": 1}]
    assert memory.messages == ["hello"]


@pytest.mark.parametrize("name", ["improved_diffusion", "improved_diffusion.x"])
@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_messages_of_the_package_reach_the_log_file(tmp_path, name, level):
    logger.configure(dir=str(tmp_path), format_strs=["log"])
    getattr(logging.getLogger(name), level)("%d images", 3)
    assert "3 images" in (tmp_path / "log.txt").read_text().splitlines()


def test_message_of_the_package_is_written_once(tmp_path):
    for _ in range(2):
        logger.configure(dir=str(tmp_path / "run"), format_strs=["log"])
    logging.getLogger("improved_diffusion.x").warning("careful")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("careful") == 1


def test_messages_of_the_package_obey_the_level(memory):
    logger.set_level(logger.ERROR)
    logging.getLogger("improved_diffusion.x").warning("careful")
    logging.getLogger("improved_diffusion.x").error("wrong")
    assert memory.messages == ["wrong"]


def test_messages_of_other_packages_do_not_reach_the_log_file(memory):
    logging.getLogger("somebody.else").warning("careful")
    logging.getLogger("improved_diffusion_fork").warning("careful")
    assert memory.messages == []


def test_message_of_the_package_without_a_logger_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("improved_diffusion.x").warning("careful")
    assert logger.Logger.CURRENT is None
    assert os.listdir(tmp_path) == []


# -- the run folder -------------------------------------------------------------------------------


def test_first_message_is_the_absolute_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger.configure(dir=os.path.join("runs", "a"))
    folder = str(tmp_path / "runs" / "a")
    assert logger.get_dir() == folder
    assert capsys.readouterr().out.splitlines() == [f"Logging to {folder}"]
    assert (tmp_path / "runs" / "a" / "log.txt").read_text() == f"Logging to {folder}\n"


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    logger.configure(dir="~/run", format_strs=[])
    assert logger.get_dir() == str(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(("argv0", "script"), [("scripts/image_train.py", "image_train"), ("", "")])
def test_default_folder_is_named_after_script_and_date(tmp_path, monkeypatch, argv0, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [argv0, "--lr", "1"])
    logger.configure(format_strs=["log"])
    name = rf"{script or 'python'}-\d{{4}}(-\d\d){{5}}-\d{{6}}"
    folder = os.path.relpath(logger.get_dir(), tmp_path)
    assert re.fullmatch(rf"runs/{name}", folder.replace(os.sep, "/"))
    assert os.listdir(logger.get_dir()) == ["log.txt"]


def test_folder_of_the_environment_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "from_env"))
    logger.configure(format_strs=[])
    assert logger.get_dir() == str(tmp_path / "from_env")
    logger.configure(dir=str(tmp_path / "given"), format_strs=[])
    assert logger.get_dir() == str(tmp_path / "given")


def test_first_process_writes_stdout_log_csv_and_json(tmp_path, capsys):
    logger.configure(dir=str(tmp_path))
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "progress.csv", "progress.json"]
    assert "| a | 1 |" in capsys.readouterr().out


def test_formats_of_the_environment_are_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,log")
    logger.configure(dir=str(tmp_path))
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "progress.json"]
    assert capsys.readouterr().out == ""


def test_formats_given_win_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json")
    logger.configure(dir=str(tmp_path), format_strs=["log"], log_suffix="-x")
    assert os.listdir(tmp_path) == ["log-x.txt"]


@pytest.mark.parametrize(
    ("env", "files"),
    [
        ({"OPENAI_LOG_FORMAT": "json"}, ["log-rank003.txt"]),
        ({"OPENAI_LOG_FORMAT_MPI": "csv,json"}, ["progress-rank003.csv", "progress-rank003.json"]),
        ({"OPENAI_LOG_FORMAT_MPI": ""}, []),
    ],
)
def test_other_processes_write_files_of_their_own(tmp_path, monkeypatch, capsys, env, files):
    for name, value in {"RANK": "3", **env}.items():
        monkeypatch.setenv(name, value)
    logger.configure(dir=str(tmp_path))
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert sorted(os.listdir(tmp_path)) == files
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("rank", [0, 1, 12])
def test_rank_is_what_the_launcher_says(monkeypatch, name, rank):
    """torchrun; MPICH, Intel MPI and Slurm's PMI; Open MPI; srun."""
    monkeypatch.setenv(name, str(rank))
    assert logger.get_rank_without_mpi_import() == rank


def test_rank_without_a_launcher_is_0():
    assert logger.get_rank_without_mpi_import() == 0


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_launcher_inside_a_slurm_job_tells_the_rank(monkeypatch, name):
    """The batch script is Slurm's process 0, whatever it starts."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv(name, "5")
    assert logger.get_rank_without_mpi_import() == 5


def test_restarted_run_continues_its_files(tmp_path):
    for step in (1, 2):
        logger.configure(dir=str(tmp_path), format_strs=["log", "csv", "json"])
        logger.logkv("step", step)
        logger.dumpkvs()
        logger.reset()
    assert csv_rows(tmp_path / "progress.csv") == [{"step": "1"}, {"step": "2"}]
    assert json_rows(tmp_path / "progress.json") == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "log.txt").read_text().count("Logging to") == 2


def test_unknown_output_in_the_environment_is_a_users_mistake(tmp_path, monkeypatch):
    """So that a script ends with a line instead of a traceback."""
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,jsn")
    with pytest.raises(UserError, match="'jsn'"):
        logger.configure(dir=str(tmp_path))


# -- rewinding ------------------------------------------------------------------------------------


def log_rows(steps):
    """Like a training run whose numbers depend on the step; two of them come late."""
    for step in steps:
        logger.logkv("step", step)
        logger.logkv_mean("loss", 1 / (step + 3))
        if step >= 30:
            logger.logkv("grad", step / 7)
        if step >= 50:
            logger.logkv("eval", step / 9)
        logger.dumpkvs()


@pytest.mark.parametrize("resumed", [0, 10, 20, 30, 40, 50, 60, 70])
@pytest.mark.parametrize("killed", [10, 30, 40, 60, 70])
def test_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, resumed, killed):
    formats = ["csv", "json"]
    with logger.scoped_configure(dir=str(tmp_path / "whole"), format_strs=formats):
        log_rows(range(0, 80, 10))
    with logger.scoped_configure(dir=str(tmp_path / "killed"), format_strs=formats):
        log_rows(range(0, killed, 10))
    first = min(resumed, killed)
    with logger.scoped_configure(dir=str(tmp_path / "killed"), format_strs=formats):
        logger.rewind(first)
        log_rows(range(first, 80, 10))
    for name in ("progress.csv", "progress.json"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
    assert len(os.listdir(tmp_path / "killed")) == 2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (20, "progress.csv: 3 rows from step 20 on dropped, they come again"),
        (31, "progress.csv: 1 row from step 31 on dropped, it comes again"),
        (41, None),
    ],
)
def test_rewinding_tells_how_many_rows_were_dropped(tmp_path, step, message):
    logger.configure(dir=str(tmp_path), format_strs=["log", "csv", "json"])
    log_rows([0, 20, 30, 40])
    before = (tmp_path / "log.txt").read_text()
    dropped = logger.rewind(step)
    assert dropped == {20: 3, 31: 1, 41: 0}[step]
    said = (tmp_path / "log.txt").read_text().removeprefix(before)  # what it held is still there
    assert said == (f"{message}\n" if message else "")
    assert len(csv_rows(tmp_path / "progress.csv")) == 4 - dropped
    assert len(json_rows(tmp_path / "progress.json")) == 4 - dropped


def test_rewinding_forgets_what_was_logged_but_not_dumped(memory):
    logger.logkv("a", 1)
    logger.logkv_mean("b", 2.0)
    assert logger.rewind(0) == 0
    logger.logkv_mean("b", 4.0)
    assert logger.dumpkvs() == {"b": 4.0}


def test_rewinding_a_new_run_does_nothing(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=["csv", "json", "log"])
    assert logger.rewind(0) == 0
    assert os.listdir(tmp_path) == ["log.txt"]


# -- the current logger ---------------------------------------------------------------------------


def test_first_use_opens_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")
    assert logger.get_current() is logger.get_current()
    logger.log("hello")
    assert os.path.basename(logger.get_dir()).startswith("notebook-")
    with open(os.path.join(logger.get_dir(), "log.txt")) as file:
        assert file.read().splitlines() == [f"Logging to {logger.get_dir()}", "hello"]


def test_reset_closes_the_current_logger(memory):
    logger.reset()
    assert memory.closed
    assert Logger.CURRENT is None
    logger.reset()  # with none it does nothing


def test_scope_uses_another_folder_and_returns(tmp_path, memory):
    outer = logger.get_current()
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log", "csv"]):
        assert logger.get_dir() == str(tmp_path)
        logger.log("inside")
        logger.logkv("a", 1)
        logger.dumpkvs()
        logging.getLogger("improved_diffusion.x").warning("inside too")
    assert logger.get_current() is outer
    logger.log("outside")
    logging.getLogger("improved_diffusion.x").warning("outside too")
    assert memory.messages == ["outside", "outside too"]
    assert memory.rows == []
    assert not memory.closed
    inside = (tmp_path / "log.txt").read_text().splitlines()
    assert inside[1] == "inside"
    assert inside[-1] == "inside too"
    assert csv_rows(tmp_path / "progress.csv") == [{"a": "1"}]


def test_scope_without_an_outer_logger_leaves_none(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        inner = logger.get_current()
    assert Logger.CURRENT is None
    assert inner.output_formats[0].handler.stream is None  # closed


def test_scope_returns_after_an_error(tmp_path, memory):
    outer = logger.get_current()
    with pytest.raises(KeyError), logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        raise KeyError
    assert logger.get_current() is outer


def test_scope_that_cannot_be_opened_leaves_the_outer_logger(tmp_path, memory):
    outer = logger.get_current()
    with (
        pytest.raises(ValueError, match="'jsn'"),
        logger.scoped_configure(dir=str(tmp_path), format_strs=["jsn"]),
    ):
        pass
    assert logger.get_current() is outer


def test_scope_takes_means_over_its_communicator(tmp_path):
    comm = FakeComm(others=[{"a": (4.0, 1)}])
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["json"], comm=comm):
        logger.logkv("a", 2.0)
        logger.dumpkvs()
    assert json_rows(tmp_path / "progress.json") == [{"a": 3.0}]


# -- time spent -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(logger.time, "perf_counter", lambda: now[0])
    return now


def test_time_spent_in_a_scope_adds_up(memory, clock):
    for seconds in (1.5, 2.0):
        with logger.profile_kv("data"):
            clock[0] += seconds
        clock[0] += 50
    assert logger.dumpkvs() == {"wait_data": 3.5}
    with logger.profile_kv("data"):
        clock[0] += 4.0
    assert logger.dumpkvs() == {"wait_data": 4.0}


def test_time_is_counted_even_if_the_scope_fails(memory, clock):
    def work():
        with logger.profile_kv("data"):
            clock[0] += 1.5
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert logger.dumpkvs() == {"wait_data": 1.5}


def test_profiled_function_counts_its_time_and_stays_itself(memory, clock):
    @logger.profile("work")
    def work(a, *, b):
        """Works."""
        clock[0] += 2.0
        return a + b

    assert work(1, b=2) == 3
    assert work(3, b=4) == 7
    assert (work.__name__, work.__doc__) == ("work", "Works.")
    assert logger.dumpkvs() == {"wait_work": 4.0}


# -- means over processes -------------------------------------------------------------------------


def test_mean_over_processes_is_weighted():
    comm = FakeComm(others=[{"a": (4.0, 3), "c": (5.0, 2)}, {"a": (1.0, 4)}])
    mean = logger.mpi_weighted_mean(comm, {"a": (2.0, 1), "b": (7.0, 2)})
    assert mean == pytest.approx({"a": (2 + 12 + 4) / 8, "b": 7.0, "c": 5.0})


def test_mean_of_no_weight_is_left_out():
    comm = FakeComm(others=[{"a": (4.0, 0)}])
    assert logger.mpi_weighted_mean(comm, {"a": (2.0, 0), "b": (1.0, 1)}) == {"b": 1.0}


def test_mean_is_known_to_the_first_process_only():
    comm = FakeComm(rank=1)
    assert logger.mpi_weighted_mean(comm, {"a": (2.0, 1)}) == {}
    assert comm.sent == [{"a": (2.0, 1)}]


def test_dump_takes_means_over_the_communicator(memory):
    comm = FakeComm(others=[{"loss": (4.0, 6), "step": (3, 1)}])
    logger.set_comm(comm)
    logger.logkv("step", 3)
    for value in (1.0, 3.0):
        logger.logkv_mean("loss", torch.tensor(value))
    dumped = logger.dumpkvs()
    assert comm.sent == [{"step": (3, 1), "loss": (2.0, 2)}]
    assert dumped == memory.rows[0] == {"step": 3, "loss": pytest.approx((2 * 2 + 4 * 6) / 8)}


def test_dump_without_a_communicator_is_of_this_process(memory):
    logger.set_comm(FakeComm(others=[{"a": (4.0, 1)}]))
    logger.set_comm(None)
    logger.logkv("a", 2.0)
    assert logger.dumpkvs() == {"a": 2.0}
