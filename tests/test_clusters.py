"""The batch script for Slurm, with stand-ins for Slurm's commands; the flags that texts mention."""

import os
import re
import runpy
import subprocess
import sys

import pytest
from launchers import SCRIPTS, TESTS, environment, mpiexec
from script_runner import ROOT, TINY, command_line, script_environment, succeed

BATCH_SCRIPT = ROOT / "slurm" / "train.sbatch"
FLAGS = ["--data_dir", "my images", "--log_dir", "runs/big"]
TEXTS = ["README.md", "docs/clusters.md", "docs/training.md", "slurm/train.sbatch"]
# of torchrun, srun, sbatch and the like, which begin with two dashes as well
OF_LAUNCHERS = {
    *("nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max_restarts"),
    *("local_addr", "rdzv_conf"),
    *("shutdown-timeout", "signals-to-handle", "hostfile"),
    *("kill-on-bad-exit", "wait", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "nodes"),
    *("time", "requeue", "open-mode", "output", "signal", "job-name"),
    "help",
}


def run_batch_script(folder, flags, srun_code, requeue_code=0, env=()):
    """Run it as Slurm does; srun and scontrol write down how they are called.

    :return: the CompletedProcess, and the calls as lists of words.
    """
    calls, commands = folder / "calls", folder / "bin"
    commands.mkdir()
    for name, code in (("srun", srun_code), ("scontrol", requeue_code)):
        command = commands / name
        command.write_text(
            f'#!/bin/sh\nprintf "%s\\t" {name} "$@" >> "{calls}"\necho >> "{calls}"\nexit {code}\n'
        )
        command.chmod(0o755)
    clean = {k: v for k, v in environment(SLURM_JOB_ID="123").items() if k != "OPENAI_LOGDIR"}
    done = subprocess.run(
        ["bash", str(BATCH_SCRIPT), *flags],
        env={**clean, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", **dict(env)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done, [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize("code", [0, 75, 1, 2, 3, 137])
def test_only_code_75_goes_back_into_the_queue(tmp_path, code):
    done, calls = run_batch_script(tmp_path, FLAGS, code)
    assert done.returncode == code
    training, *others = calls
    start = training.index("python")
    assert training[start:] == ["python", "scripts/image_train.py", *FLAGS]
    assert "--kill-on-bad-exit=0" in training[:start]
    assert others == ([["scontrol", "requeue", "123"]] if code == 75 else [])
    assert bool(done.stderr) == (code not in (0, 75))
    assert "not requeued" in done.stderr or code in (0, 75)


def test_a_refused_requeue_is_an_error(tmp_path):
    done, calls = run_batch_script(tmp_path, FLAGS, 75, requeue_code=1)
    assert done.returncode == 1
    assert calls[-1][0] == "scontrol"


def test_a_run_folder_is_asked_for(tmp_path):
    done, calls = run_batch_script(tmp_path, ["--data_dir", "images"], 0)
    assert done.returncode == 2
    assert "--log_dir" in done.stderr
    assert not calls


@pytest.mark.parametrize(
    ("flags", "env"), [(["--log_dir=x"], {}), (["--lr", "1"], {"OPENAI_LOGDIR": "x"})]
)
def test_other_ways_to_name_the_run_folder(tmp_path, flags, env):
    done, calls = run_batch_script(tmp_path, flags, 0, env=env)
    assert done.returncode == 0
    assert calls[0][-len(flags) :] == flags


def test_the_tasks_get_the_signal_that_training_knows():
    from improved_diffusion.stopping import STOP_SIGNALS

    text = BATCH_SCRIPT.read_text()
    (name,) = re.findall(r"^#SBATCH --signal=(\w+)@\d+$", text, flags=re.MULTILINE)
    assert f"SIG{name}" in STOP_SIGNALS
    first_command = re.search(r"^(?!#)\S", text, flags=re.MULTILINE).start()
    assert text.rindex("#SBATCH") < first_command  # Slurm ignores those after it


def test_flags_in_texts_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where a script finds another
    known = set()
    for script in (ROOT / "scripts").glob("*.py"):
        parser = runpy.run_path(str(script))["create_argparser"]()
        known |= {action.dest for action in parser._actions}
    for name in TEXTS:
        text = (ROOT / name).read_text()
        mentioned = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", text))
        assert mentioned, name
        assert mentioned - known - OF_LAUNCHERS == set(), name


@pytest.mark.parametrize("name", ["clusters.md", "training.md"])
def test_links_exist(name):
    text = (ROOT / "docs" / name).read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" in target:
            continue
        path = ROOT / "docs" / target if target else ROOT / "docs" / name
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in anchors, anchor


def test_columns_are_explained(tmp_path, digits_dir, run_script):
    """Each column of a run with everything switched on is one of the table's, or like one."""
    watching = {"sample_interval": 1, "val_fraction": 0.2, "val_interval": 1}
    flags = {**TINY, **watching, "learn_sigma": True, "batch_size": 4, "log_interval": 1}
    succeed(
        run_script(
            "image_train", flags, cwd=tmp_path, data_dir=digits_dir, log_dir="run", train_steps=2
        )
    )
    (header, *_) = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ", text.split("**Columns**")[1], flags=re.MULTILINE)
    explained = set(re.findall(r"`(\w+)`", " ".join(rows)))
    explained |= {"mse_q0", "vb_q0"}  # beside the row of loss_q0
    for column in header.split(","):
        alike = re.sub(r"_q[123]$", "_q0", column)
        alike = re.sub(r"^val_ema_.*", "val_ema_loss", alike)
        alike = re.sub(r"^(preview_ema)_\w+_(c0)$", r"\1_mean_\2", alike)
        assert alike in explained, column
    assert "val_ema_bpd" in header
    assert "preview_std_c0" in header


# -- the commands of docs/clusters.md ---------------------------------------------------------


def documented_commands():
    """Every command of the document, a backslash at a line's end joined."""
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(line.split()) for block in blocks for line in block.splitlines()]


@pytest.fixture
def cluster(tmp_path, digits_dir):
    """A folder like the repository's root, images in it, and Slurm's commands in $PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": f'exec {sys.executable} {TESTS / "workers" / "fake_srun.py"} "$@"',
        "scontrol": "true",
        "sbatch": 'while [ "${1#-}" != "$1" ]; do shift 2; done\nexec bash "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    for name in ("scripts", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "images").symlink_to(digits_dir)
    (tmp_path / "hosts").write_text("localhost:2\n")
    return tmp_path


def made_small(command, number):
    """A command for two processes and a tiny model; each of them trains two steps more."""
    sizes = r"(--nproc_per_node|--nnodes|-n) \d+"
    command = re.sub(sizes, lambda m: f"{m[1]} {1 if m[1] == '--nnodes' else 2}", command)
    command = command.replace("HOST:", "localhost:").replace("model200000", "model000002")
    command = re.sub("--train_steps \\d+ ", "", command)
    more = command_line(TINY, {"save_interval": 2, "ema_rate": 0.9, "train_steps": 2 * number})
    return command.replace("...", " ".join(more))


@pytest.mark.slow
def test_commands_of_the_document_work_one_after_the_other(cluster):
    mpiexec()  # skips where there is none
    path = os.pathsep.join([str(cluster / "bin"), SCRIPTS, os.environ["PATH"]])
    env = script_environment({"PATH": path, "SLURM_JOB_ID": "123"})
    commands = documented_commands()
    assert len(commands) == 8
    for number, command in enumerate(commands, 1):
        done = subprocess.run(
            ["bash", "-c", made_small(command, number)],
            cwd=cluster,
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        alone = command.startswith("python")
        assert f"{1 if alone else 2} process" in done.stdout, (command, done.stdout)
        assert (cluster / "runs" / "big" / f"checkpoint{2 * number:06d}.json").exists(), command
