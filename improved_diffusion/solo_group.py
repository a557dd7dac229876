"""A process group of one that needs no network, not even a port.

Code that calls :mod:`torch.distributed` after ``setup_dist()`` runs unchanged in one process:
every collective hands back what it was given.
"""

# torch's stubs know neither its own Python-side process groups nor the newer names
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work, _create_work_from_future  # type: ignore[attr-defined]

BACKEND = "solo"


def _done(result: Any) -> Work:
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _copy_flat(outputs: list[Tensor], inputs: list[Tensor]) -> Work:
    for output, value in zip(outputs, inputs, strict=True):
        output.copy_(value.view_as(output))
    return _done(outputs)


def _copy_nested(outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work:
    return _copy_flat([output for (output,) in outputs], inputs)


class SoloProcessGroup(dist.ProcessGroup):
    """The collectives of a world of one: identities and copies, all done at once."""

    def getBackendName(self) -> str:
        return BACKEND

    def barrier(self, *_: Any, **__: Any) -> Work:
        return _done([])

    def broadcast(self, tensors: list[Tensor], *_: Any) -> Work:
        return _done(tensors)

    allreduce = allreduce_coalesced = reduce = broadcast

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> Work:
        return _copy_nested(outputs, inputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> Work:
        return _copy_nested(outputs, inputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], *_: Any) -> Work:
        return _copy_flat(outputs, [value for (value,) in inputs])

    reduce_scatter = scatter

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], *_: Any) -> Work:
        return _copy_flat(outputs, inputs)

    allgather_into_tensor_coalesced = reduce_scatter_tensor_coalesced = alltoall
    all_gather_single_coalesced = reduce_scatter_single_coalesced = alltoall

    def _allgather_base(self, output: Tensor, value: Tensor, *_: Any) -> Work:
        return _copy_flat([output], [value])

    # torch 2.13 renamed these; older releases call the first names
    _reduce_scatter_base = alltoall_base = _allgather_base
    all_gather_single = reduce_scatter_single = _allgather_base
    all_to_all_single = _allgather_base


def _create(store: Any, rank: int, world_size: int, timeout: Any) -> SoloProcessGroup:
    return SoloProcessGroup(rank, world_size)  # type: ignore[call-arg]


def init_solo_process_group() -> None:
    """Make this process the only member of the default process group."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
