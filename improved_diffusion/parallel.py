"""How training is spread over processes: copies of the model, or a share of it for each.

PyTorch Distributed: arXiv 2006.15704 (DDP). FSDP: arXiv 2304.11277.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import dist_util
from .errors import UserError
from .flags import option, require, require_at_least

KINDS = ("ddp", "fsdp")
BUCKET_MB = 128  # gradients that DDP sends together


@dataclass(frozen=True)
class ParallelOptions:
    """How training is spread over processes."""

    parallel: str = option(
        "ddp",
        "ddp: each process holds the whole model; fsdp: a share of weights, gradients, averages "
        "and optimiser",
    )
    shard_processes: int = option(
        0,
        "with --parallel fsdp: so many neighbouring processes share one copy, such as those of a "
        "machine; 0: all",
    )
    global_batch: int = option(
        0, "images per step of all processes together; 0: --batch_size times the processes"
    )

    def __post_init__(self) -> None:
        require(self.parallel in KINDS, "parallel", self.parallel, " or ".join(KINDS))
        require_at_least(0, self, ["shard_processes", "global_batch"])
        if self.shard_processes and self.parallel != "fsdp":
            raise UserError(
                f"--shard_processes {self.shard_processes} needs --parallel fsdp: with ddp each "
                "process holds the whole model"
            )

    @property
    def sharded(self) -> bool:
        """Whether a process holds a share of the model only."""
        return self.parallel == "fsdp"

    def check(self, world_size: int, use_fp16: bool = False) -> None:
        """Check that so many processes can share a model.

        :raises ValueError: naming the flag, if they cannot.
        """
        if not self.sharded:
            return
        if world_size == 1:
            raise UserError(
                "--parallel fsdp shares the model among processes, and this is the only one: start "
                "with torchrun --nproc_per_node N, or leave it out"
            )
        if use_fp16:
            raise UserError(
                "--use_fp16 True keeps one flat copy of all weights, which --parallel fsdp would "
                "have to share: use --precision fp16 or bf16"
            )
        share = self.shard_processes or world_size
        if share == 1 or world_size % share:
            fitting = [n for n in range(2, world_size + 1) if world_size % n == 0]
            raise UserError(
                f"--shard_processes {share}: must be a divisor of the {world_size} processes above "
                f"1: {', '.join(map(str, fitting))}"
            )

    def batch_size(self, batch_size: int, world_size: int) -> int:
        """The images of a step of one process.

        :param batch_size: of one process, if no global one is given.
        :raises ValueError: naming the nearest that would do, if the processes cannot share
            ``global_batch`` equally.
        """
        if not self.global_batch:
            return batch_size
        each, over = divmod(self.global_batch, world_size)
        if over:
            nearest = [n * world_size for n in (each, each + 1) if n]
            raise UserError(
                f"--global_batch {self.global_batch}: {world_size} processes cannot share it "
                f"equally; the nearest are {' and '.join(map(str, nearest))}"
            )
        return each


def replicate(model: nn.Module, device: torch.device, accumulate: bool = False) -> nn.Module:
    """The model with a copy on every process and gradients averaged over them, by DDP.

    :param accumulate: whether :func:`no_sync` will be used, which DDP refuses with a static graph.
    """
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        bucket_cap_mb=BUCKET_MB,
        gradient_as_bucket_view=True,  # no second copy of the gradients
        static_graph=not accumulate,  # every step uses every parameter
    )


def shard(model: nn.Module, options: ParallelOptions, dtype: torch.dtype | None) -> None:
    """Leave each process a share of every parameter, on its device, in place, by FSDP2.

    A block's parameters are gathered when it computes, and let go after it. The parameters become
    DTensors. Weights and sums of gradients stay float32.

    :param dtype: what parameters are gathered in and the model computes in, by autocast, whoever
        calls it; None for float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does, below; timesteps stay exact
    )
    # resharded after every forward pass, also the root: weights may change between two of them
    how: dict[str, Any] = {
        "mesh": _mesh(options),
        "mp_policy": policy,
        "reshard_after_forward": True,
    }
    for block in gathered_blocks(model):
        fully_shard(block, **how)
    fully_shard(model, **how)
    if dtype is not None:
        _compute_in(dtype, model)


def _compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Let every forward pass run under autocast and return float32."""
    entered: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(torch.autocast(dist_util.dev().type, dtype=dtype))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return output if output is None else output.float()  # None: the pass has failed

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def _mesh(options: ParallelOptions) -> Any:
    """The processes in a row; or in rows that hold one copy of the model each."""
    from torch.distributed.device_mesh import init_device_mesh

    world_size = dist_util.get_world_size()
    share = options.shard_processes or world_size
    if share == world_size:
        return init_device_mesh(dist_util.dev().type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        dist_util.dev().type,
        (world_size // share, share),
        mesh_dim_names=("replicate", "shard"),
    )


def gathered_blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the elements of the model's lists of modules, and its chains."""
    blocks = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += list(child)
        elif isinstance(child, nn.Sequential):
            blocks.append(child)
    return blocks


def host_group() -> dist.ProcessGroup:
    """All processes again, to talk in the background from one host to another."""
    return dist.new_group(backend="gloo")


def no_sync(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Leave averaging over the processes to a later backward pass.

    A sharded model averages after each: between them no process could hold the whole gradient.
    """
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


# -- tensors of which each process holds a share ----------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a share of a tensor only: a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensors: Iterable[Any]) -> list[Tensor]:
    """What this process holds of each tensor, without autograd; changing it changes the tensor."""
    return [t.detach().to_local() if is_sharded(t) else t.detach() for t in tensors]


def whole(tensor: Any) -> Tensor:
    """A tensor with all its shares, on every process; every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(tensor: Any, value: Tensor) -> Tensor:
    """A value that all processes hold whole, shared among them as ``tensor`` is."""
    if not is_sharded(tensor) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(tensor.device)
    # no process sends: all hold the value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
