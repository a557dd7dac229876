"""A worker of the peers' environment: times another library's code for the process above.

It knows torch and the library, not ours. What it is asked, and what it answers, are lines of JSON
on stdin and stdout; see peers.py, which starts it:

    {"prepare": "forward", "settings": {...}}  ->  {"number": 0, "facts": {...}}
    {"run": 0}                                 ->  {"seconds": 0.0123}

and {"error": "one line"} to either. It ends when stdin does.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
import time
from types import ModuleType
from typing import Any, TextIO

import torch
from peer_tasks import TASKS, Task, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=LIBRARIES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process above tells when to end
    answers = _private_stdout()
    torch.set_num_threads(args.threads)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("its torch sees no GPU")
        worker = Worker(LIBRARIES[args.kind](), torch.device(args.device))
    except Exception as error:
        _tell(answers, {"error": _line(error)})
        return
    _tell(answers, {"versions": worker.versions()})
    questions = _questions()
    while True:
        _tell(answers, worker.answer(questions.get()))


class Worker:
    """Answers questions; keeps what it has prepared."""

    def __init__(self, library: ModuleType, device: torch.device) -> None:
        self.library = library
        self.device = device
        self.tasks: list[Task] = []

    def versions(self) -> dict[str, Any]:
        return {
            "library": self.library.VERSION,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            if "run" in question:
                return {"seconds": self.seconds(self.tasks[question["run"]])}
            return self.prepare(question["prepare"], question["settings"])
        except Exception as error:
            return {"error": _line(error)}

    def prepare(self, what: str, settings: dict[str, Any]) -> dict[str, Any]:
        if what not in TASKS:
            raise ValueError(f"cannot prepare '{what}', but {', '.join(TASKS)}")
        task = prepare(self.library, what, settings, self.device)
        self.tasks.append(task)
        return {"number": len(self.tasks) - 1, "facts": task.facts}

    def seconds(self, task: Task) -> float:
        """The time of one step, until the device is done with it."""
        self._synchronise()
        started = time.perf_counter()
        task.run()
        self._synchronise()
        return (time.perf_counter() - started) / task.steps

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _diffusers() -> ModuleType:
    import peer_diffusers

    return peer_diffusers


def _denoising_diffusion() -> ModuleType:
    import peer_denoising_diffusion

    return peer_denoising_diffusion


LIBRARIES = {"diffusers": _diffusers, "denoising_diffusion": _denoising_diffusion}


def _private_stdout() -> TextIO:
    """Where answers go; what else is printed, by a library say, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _questions() -> queue.Queue:
    """What is asked. The process ends with the one above, even in the middle of a run."""
    questions: queue.Queue = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            questions.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return questions


def _tell(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


if __name__ == "__main__":
    main()
