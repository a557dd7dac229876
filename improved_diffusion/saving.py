"""When checkpoints are written, by whom, and which are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, dist_util, liveness, sharded
from .errors import UserError
from .flags import option, require_at_least
from .parallel import is_sharded, local


@dataclass(frozen=True)
class SavingOptions:
    """Which checkpoints to write and keep, beside those at ``--save_interval``."""

    save_minutes: float = option(0.0, "also save when so many minutes have passed; 0: never")
    keep_checkpoints: int = option(0, "keep the newest N checkpoints and remove others; 0: all")
    keep_every: int = option(
        0, "with --keep_checkpoints: also keep those of every so many steps, for good"
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, ["save_minutes", "keep_checkpoints", "keep_every"])
        if self.keep_every and not self.keep_checkpoints:
            raise UserError(
                f"--keep_every {self.keep_every} needs --keep_checkpoints: without it all stay"
            )

    def kept(self, steps: list[int]) -> set[int]:
        """Which of the sorted steps of all checkpoints stay."""
        if not self.keep_checkpoints:
            return set(steps)
        for_good = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        return for_good | set(steps[-self.keep_checkpoints :])


class Saver:
    """Writes checkpoints, one at a time.

    Inside a ``with`` block a thread writes them, and training goes on as soon as the tensors are
    copied, into memory of the host that is kept for the next time; outside, :meth:`save` returns
    when the checkpoint counts.

    :param options: when to save, and what to keep.
    :param group: of processes that write their shares together, for this alone; None if the first
        process writes whole tensors.
    """

    def __init__(self, options: SavingOptions, group: dist.ProcessGroup | None = None) -> None:
        self.options = options
        self.group = group
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._copies = _HostCopies()
        self._last = time.monotonic()

    @property
    def in_background(self) -> bool:
        """Whether :meth:`save` returns before the checkpoint counts."""
        return self._thread is not None

    @property
    def due(self) -> bool:
        """Whether ``save_minutes`` have passed since the last save."""
        minutes = self.options.save_minutes
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes

    def save(self, folder: str, step: int, files: Mapping[str, Any]) -> None:
        """Write a checkpoint; see :func:`.checkpoint.write_checkpoint`.

        With a group every process must call this; see :func:`.sharded.write_checkpoint`.

        :raises OSError: naming the file that this checkpoint, or the one before, could not write.
        """
        self.wait()
        self._last = time.monotonic()
        if self._thread is None:
            self._write(folder, step, files)
        else:
            copies = self._copies.of(dict(files))  # the thread is done with those before
            self._writing = self._thread.submit(self._write, folder, step, copies)

    @liveness.finishing()
    def _write(self, folder: str, step: int, files: Mapping[str, Any]) -> None:
        if self.group is None:
            checkpoint.write_checkpoint(folder, step, files)
        else:
            sharded.write_checkpoint(folder, step, files, self.group)
        if self.options.keep_checkpoints and dist_util.get_rank() == 0:
            checkpoint.prune(folder, self.options.kept)

    def check(self) -> None:
        """Raise what went wrong in the thread, if it is done."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        :raises OSError: naming the file that could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._thread.shutdown()  # finishes the checkpoint that is being written
        self._thread = None
        self._copies = _HostCopies()
        if kind is None:
            self.wait()


_Kind = tuple[Any, ...]


class _HostCopies:
    """Copies of tensors, in memory of the host that the next copies use again.

    In fresh memory the system clears every page at its first touch, which takes several times as
    long as the copying.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[_Kind, Tensor]] = []

    def of(self, value: Any) -> Any:
        """The same dicts, lists and numbers, with copies of the tensors; it ends those before."""
        spare: dict[_Kind, list[Tensor]] = {}
        for kind, tensor in self._kept:
            spare.setdefault(kind, []).append(tensor)
        self._kept = []
        used_again: list[Tensor] = []
        sources: list[Tensor] = []

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                value = value.detach()
                kind = _kind_of(value)
                if spare.get(kind):
                    copy = spare[kind].pop()
                    used_again.append(copy)
                    sources.append(value)
                else:
                    copy = value.to("cpu", copy=True)
                self._kept.append((kind, copy))
                return copy
            if isinstance(value, dict):
                return {key: visit(entry) for key, entry in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(visit(entry) for entry in value)
            return value

        copies = visit(value)
        if sources:
            torch._foreach_copy_(local(used_again), local(sources))
        return copies


def _kind_of(tensor: Any) -> _Kind:
    """What tensors have in common that may follow each other in the same memory."""
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    placed = (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else ()
    return (type(tensor), tensor.dtype, tensor.shape, strides, *placed)
