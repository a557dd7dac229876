"""scripts/image_train.py with a fault, which $FAULT names: WHAT PLACE WHERE [RANK].

WHAT is a signal that the process sends itself. PLACE and WHERE are ``after 0.25`` (seconds of
training), ``step 5`` (before its update), ``half state000003.pt`` (half of the file is written),
``before state000003.pt`` or ``after state000003.pt`` (its renaming). RANK is 0 if not given.

With $RECORD, a checksum of every image that is trained on goes to the file RECORD.RANK.
"""

import contextlib
import os
import runpy
import signal
import sys
import time
import zlib
from pathlib import Path

from improved_diffusion import dist_util, files
from improved_diffusion.train_util import TrainLoop

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "image_train.py")


class Fault:
    def __init__(self, text):
        what, self.place, self.where, *rank = text.split()
        self.signal = signal.Signals[what]
        self.rank = int(rank[0]) if rank else 0
        self.happened = False

    def happens(self, place, where):
        """Go on or end here, at a place that has a name."""
        if (place, str(where)) == (self.place, self.where) and not self.happened:
            self.now()

    def now(self):
        if dist_util.get_rank() == self.rank:
            self.happened = True
            os.kill(os.getpid(), self.signal)

    def start_clock(self):
        """Let another process send the signal, whatever this one is doing by then."""
        if self.place == "after" and self.where[0].isdigit() and not self.happened:
            self.happened = True
            target = os.getpid()
            if dist_util.get_rank() == self.rank and os.fork() == 0:
                time.sleep(float(self.where))
                os.kill(target, self.signal)
                os._exit(0)


class HalfWritten:
    """A file that tells the fault when ``size`` bytes have reached the disk."""

    def __init__(self, file, name, fault):
        self.file, self.name, self.fault = file, name, fault

    def write(self, data):
        data = memoryview(data).cast("B")
        half = max(1, len(data) // 2)
        self.file.write(data[:half])
        self.file.flush()
        self.fault.happens("half", self.name)
        return half + self.file.write(data[half:])

    def flush(self):
        self.file.flush()


def plant(fault):
    run_loop, run_step = TrainLoop.run_loop, TrainLoop.run_step
    open_whole, replace = files.open_whole, os.replace

    def faulty_run_loop(self):
        fault.start_clock()
        run_loop(self)

    def faulty_run_step(self, batch, cond):
        fault.happens("step", self.global_step)
        run_step(self, batch, cond)

    @contextlib.contextmanager
    def faulty_open_whole(path):
        with open_whole(path) as file:
            yield HalfWritten(file, os.path.basename(path), fault)

    def faulty_replace(source, target):
        fault.happens("before", os.path.basename(target))
        replace(source, target)
        fault.happens("after", os.path.basename(target))

    TrainLoop.run_loop, TrainLoop.run_step = faulty_run_loop, faulty_run_step
    files.open_whole, os.replace = faulty_open_whole, faulty_replace


def record(path):
    run_step = TrainLoop.run_step

    def recording_run_step(self, batch, cond):
        images = ((image, int(y)) for image, y in zip(batch, cond["y"], strict=True))
        sums = [f"{zlib.crc32(image.numpy().tobytes())}:{y}" for image, y in images]
        with open(f"{path}.{dist_util.get_rank()}", "a") as file:
            print(self.global_step, *sums, file=file)
        run_step(self, batch, cond)

    TrainLoop.run_step = recording_run_step


if __name__ == "__main__":
    if os.environ.get("RECORD"):
        record(os.environ["RECORD"])
    if os.environ.get("FAULT"):
        plant(Fault(os.environ["FAULT"]))
    sys.argv[0] = SCRIPT
    sys.path[0] = os.path.dirname(SCRIPT)
    runpy.run_path(SCRIPT, run_name="__main__")
