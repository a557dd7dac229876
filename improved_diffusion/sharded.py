"""Checkpoints that every process writes its share of, and the way back to ordinary files.

The shares lie in the folder ``shardedNNNNNN``, by :mod:`torch.distributed.checkpoint`. They hold
the tensors of the files that one process would have written, each under ``FILE/KEY/...``;
``structure.pt`` beside them holds what else is in those files. The checkpoint exists when its
manifest does, like any other.
"""

from __future__ import annotations

import errno
import os
import pathlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, dist_util, stored_flags
from .errors import UserError
from .files import file_entry, write_tensors

STRUCTURE = "structure.pt"
METADATA = ".metadata"
SEPARATOR = "/"

# From the place of a tensor in its file, and its shape, to a tensor to read into, or None
Layout = Callable[[tuple[str, ...], torch.Size], Tensor | None]


def write_checkpoint(
    folder: str, step: int, files: Mapping[str, Any], group: dist.ProcessGroup
) -> None:
    """Write a checkpoint together; every process calls this, with its shares.

    :param folder: which all processes can write to.
    :param files: name -> what an ordinary checkpoint would hold in that file; the first process
        writes the state file as it is.
    :param group: for the CPU; not used for anything else at the same time.
    :raises OSError: on every process, naming the folder and the process that could not write.
    """
    import torch.distributed.checkpoint as dcp

    rank, state = dist.get_rank(group), checkpoint.state_name(step)
    name = checkpoint.sharded_name(step)
    path = os.path.join(folder, name)
    tensors, structure = _split({name: files[name] for name in files if name != state})

    def prepare() -> dict[str, Any]:
        if rank != 0:
            return {}
        checkpoint.discard(folder, step)
        shutil.rmtree(path, ignore_errors=True)  # shares of other processes than now
        os.makedirs(path)
        written = {state: files[state], f"{name}/{STRUCTURE}": structure}
        return {
            key: write_tensors(os.path.join(folder, key), value) for key, value in written.items()
        }

    def measure() -> dict[str, Any]:
        mine = [file for file in os.listdir(path) if file.startswith(f"__{rank}_")]
        mine += [METADATA] if rank == 0 else []
        return {f"{name}/{file}": file_entry(os.path.join(path, file)) for file in mine}

    entries = _on_all(prepare, path, group)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), process_group=group)
    except dcp.CheckpointException as error:
        raise _failure(path, {rank: cause for rank, (cause, _) in error.failures.items()}) from None
    entries |= _on_all(measure, path, group)
    if rank == 0:
        checkpoint.write_manifest(folder, step, entries)


def _on_all(
    function: Callable[[], dict[str, Any]], path: str, group: dist.ProcessGroup
) -> dict[str, Any]:
    """The results of all processes together.

    :raises OSError: on every process, if the function does on any.
    """
    result: dict[str, Any] | OSError
    try:
        result = function()
    except OSError as error:
        result = error
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, result, group=group)
    failed = {rank: part for rank, part in enumerate(everyone) if isinstance(part, OSError)}
    if failed:
        raise _failure(path, failed)
    return {name: entry for part in everyone for name, entry in part.items()}


def _failure(path: str, causes: Mapping[int, BaseException]) -> OSError:
    """What the first process that failed met with, as an error that names the folder."""
    rank = min(causes)
    cause = causes[rank]
    number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
    reason = os.strerror(number) if isinstance(cause, OSError) else str(cause).splitlines()[0]
    return OSError(number, f"{reason}, says process {rank} of the run", path)


def _split(files: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by their place; and the files with empty tensors in their place."""
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            tensors[SEPARATOR.join(place)] = value
            return torch.empty(0)
        if isinstance(value, dict):
            return {key: visit(entry, (*place, str(key))) for key, entry in value.items()}
        return value

    return tensors, {name: visit(value, (name,)) for name, value in files.items()}


# -- reading ----------------------------------------------------------------------------------


class ShardedCheckpoint:
    """The files of a sharded checkpoint, as one process would have written them.

    :param path: the folder ``shardedNNNNNN``.
    :raises ValueError: if it is none, or damaged.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.structure = dist_util.load_state_dict(os.path.join(path, STRUCTURE))
        self._metadata = _read_metadata(path).state_dict_metadata

    @property
    def names(self) -> list[str]:
        """The files that it stands for."""
        return list(self.structure)

    def read(self, name: str, layout: Layout = lambda place, shape: None) -> Any:
        """What a file would hold; every process must call this for the same files in turn.

        :param layout: tells which tensors to read a share of only.
        """
        import torch.distributed.checkpoint as dcp

        tensors = {key: self._empty(key, layout) for key in self._keys(name)}
        if tensors:
            alone = dist_util.get_world_size() == 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it must
                dcp.load(tensors, storage_reader=_reader(self.path), no_dist=alone)
        return _join(self.structure[name], tensors, (name,))

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a flat file, without reading them."""
        return {
            key.removeprefix(name + SEPARATOR): tuple(self._metadata[key].size)
            for key in self._keys(name)
        }

    def _keys(self, name: str) -> list[str]:
        return [key for key in self._metadata if key.startswith(name + SEPARATOR)]

    def _empty(self, key: str, layout: Layout) -> Tensor:
        stored = self._metadata[key]
        found = layout(tuple(key.split(SEPARATOR)[1:]), stored.size)
        if found is not None:
            return torch.empty_like(found, dtype=stored.properties.dtype)
        return torch.empty(stored.size, dtype=stored.properties.dtype)


def _join(structure: Any, tensors: Mapping[str, Tensor], place: tuple[str, ...]) -> Any:
    if isinstance(structure, Tensor):
        return tensors[SEPARATOR.join(place)]
    if isinstance(structure, dict):
        return {key: _join(entry, tensors, (*place, str(key))) for key, entry in structure.items()}
    return structure


def _reader(path: str) -> Any:
    """A reader that makes nothing but descriptions of tensors of the stored metadata."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return _read_metadata(path)

    return Reader(path)


def _read_metadata(path: str) -> Any:
    """What torch stores about the tensors; by pickle, of which no other classes are let through.

    :raises ValueError: if the file is missing, damaged, or holds anything else.
    """
    from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

    file = os.path.join(path, METADATA)
    try:
        with open(file, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        stored = metadata.state_dict_metadata.values()
    except FileNotFoundError:
        raise UserError(f"checkpoint '{path}' is incomplete: {METADATA} is missing") from None
    except Exception as error:  # whatever foreign or cut-off bytes make the unpickler raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint '{file}' is damaged or no checkpoint: {reason}") from None
    if not all(isinstance(entry, TensorStorageMetadata) for entry in stored):
        raise UserError(f"checkpoint '{file}' holds something other than tensors")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in self.MODULES and not name.startswith("_") and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        if (module, name) in {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        }:
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # where it was written, which no one asks
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code")


# -- merging ----------------------------------------------------------------------------------


def merge(path: str, out_dir: str, report: Callable[[str], None] = lambda text: None) -> list[str]:
    """Write the ordinary files of a sharded checkpoint, in one process.

    One file's tensors are in memory at a time. In the checkpoint's own folder the shares go on
    counting beside the files.

    :param path: the folder ``shardedNNNNNN``.
    :param out_dir: where the files go; it exists.
    :param report: called with the path of each file when it is complete.
    :return: the paths of the files.
    :raises ValueError: if the checkpoint is damaged.
    """
    folder, step = os.path.dirname(os.path.abspath(path)), checkpoint.step_of(path)
    assert step is not None  # by its name
    here = os.path.abspath(out_dir) == folder
    stored = ShardedCheckpoint(path)
    entries = checkpoint.read_manifest(folder, step) if here else {}
    if not here:
        checkpoint.discard(out_dir, step)
        _copy_beside(folder, out_dir, step, entries)
    written = []
    for name in stored.names:
        target = os.path.join(out_dir, name)
        entries[name] = write_tensors(target, stored.read(name))
        written.append(target)
        report(target)
    checkpoint.write_manifest(out_dir, step, entries)
    return written


def _copy_beside(folder: str, out_dir: str, step: int, entries: dict[str, Any]) -> None:
    """The flags and the state file, which are ordinary files already."""
    flags = stored_flags.load_config(folder)
    if flags:
        stored_flags.save_config(out_dir, flags)
    name = checkpoint.state_name(step)
    state = dist_util.load_state_dict(os.path.join(folder, name), map_location="cpu")
    entries[name] = write_tensors(os.path.join(out_dir, name), state)
