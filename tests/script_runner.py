"""Run the scripts as processes of their own, as users do, on small real images."""

import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launchers import environment

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TIMEOUT = 120  # seconds; a script that hangs fails its test
NUM_DIGITS = 60
OURS = ("OPENAI_", "DIFFUSION_")  # beginnings of the variables that the package reads

_NETWORK = {
    "channels": 1,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": 4,
    "diffusion_steps": 30,
    "noise_schedule": "cosine",
}
TINY = {"image_size": 8, **_NETWORK}
TINY_SUPER_RES = {"large_size": 8, "small_size": 4, **_NETWORK}


def command_line(*parts):
    """Words of a command line; a dict stands for flags and their values."""
    words = []
    for part in parts:
        flags = part.items() if isinstance(part, dict) else ()
        words += [str(word) for name, value in flags for word in (f"--{name}", value)]
        words += [] if isinstance(part, dict) else [str(part)]
    return words


def script_path(name):
    """scripts/NAME.py, or tests/workers/NAME.py for a worker that runs a script."""
    path = ROOT / "scripts" / f"{name}.py"
    return str(path if path.exists() else TESTS / "workers" / f"{name}.py")


def script_environment(env=None):
    """No launcher, no settings of the package, no GPU: what a script does depends on its flags."""
    clean = {k: v for k, v in environment().items() if not k.startswith(OURS)}
    return {**clean, "CUDA_VISIBLE_DEVICES": "", **(env or {})}


def start_script(name, *parts, cwd, env=None, **flags):
    """Run scripts/NAME.py by a Python of its own.

    :param parts: words, or dicts of flags; ``flags`` come after them.
    :return: a CompletedProcess with ``returncode``, ``stdout`` and ``stderr``.
    """
    return subprocess.run(
        [sys.executable, script_path(name), *command_line(*parts, flags)],
        cwd=cwd,
        env=script_environment(env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


class ForkingServer:
    """Runs scripts as :func:`start_script` does, in forks of a process that imported torch."""

    def __init__(self, folder):
        self.outputs = [str(folder / "stdout"), str(folder / "stderr")]
        self.server = subprocess.Popen(
            [sys.executable, str(TESTS / "workers" / "forking_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=script_environment(),
            text=True,
        )

    def run(self, name, *parts, cwd, env=None, **flags):
        stdout, stderr = self.outputs
        request = {
            "script": script_path(name),
            "args": command_line(*parts, flags),
            "cwd": str(cwd),
            "env": script_environment(env),
            "stdout": stdout,
            "stderr": stderr,
            "timeout": TIMEOUT,
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        texts = [Path(path).read_text() for path in self.outputs]
        return subprocess.CompletedProcess([name, *request["args"]], code, *texts)

    def close(self):
        self.server.stdin.close()
        self.server.wait(timeout=10)


def succeed(done):
    """The process, which must have ended well."""
    assert done.returncode == 0, done.stderr
    return done


def error_of(done):
    """The one line of a user's mistake: exit code 2, nothing else on stderr, nothing on stdout."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr[len("error: ") : -1]


def run_folder(done):
    """The run folder, which the first line that a script prints names."""
    first = done.stdout.splitlines()[0]
    assert first.startswith("Logging to ")
    return Path(first[len("Logging to ") :])


def names(folder):
    return sorted(os.listdir(folder))


def tree(folder):
    """Everything below a folder: relative path -> content of the file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in Path(folder).rglob("*")
    }


def samples(folder):
    """arr_0 and arr_1 (or None) of the one npz file of samples in a folder."""
    (path,) = Path(folder).glob("samples_*.npz")
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays.files) <= {"arr_0", "arr_1"}
        return arrays["arr_0"], arrays.get("arr_1")


@functools.cache
def load_module(folder, name):
    """The module of a script, ROOT/folder/name.py, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)


def write_digits(folder, count=NUM_DIGITS):
    """The first of scikit-learn's digits as LABEL_INDEX.png, 8 x 8 grey, each digit many times."""
    digits = load_module("datasets", "digits")
    images = digits.named_images(*digits.load_digits(), size=8)
    for name, image in itertools.islice(images, count):
        image.save(folder / name)
    return folder
