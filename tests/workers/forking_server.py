"""Runs scripts in forks of one process that has imported torch already, which takes seconds.

Each line on stdin asks for a script in JSON; the answer on stdout is its exit code.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import traceback

import blobfile  # noqa: F401  the scripts import it where they use it
import PIL.Image  # noqa: F401
import tqdm.auto  # noqa: F401

import improved_diffusion.runs  # noqa: F401


def serve():
    """Answer requests; in each fork, return the one that is its own."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    return None


def run(script, args, cwd, env, stdout, stderr, timeout):
    signal.alarm(timeout)  # ends a fork that hangs
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in (stdout, stderr)]
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


gc.freeze()  # forks share the memory of what has been imported
if request := serve():
    code = run(**request)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking torch down piece by piece
