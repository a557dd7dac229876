"""Files that are there whole or not at all, with their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import IO, Any

import torch


@contextlib.contextmanager
def open_whole(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing that is there whole or not at all.

    A local file is written beside, flushed to the disk, then renamed; a blob appears when its
    upload is complete.

    :raises OSError: with the path as its ``filename``, also when the disk is full.
    """
    import blobfile as bf

    if "://" in path:
        with bf.BlobFile(path, "wb") as file:
            yield file
        return
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # such as a full disk
            error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is gone if all went well
            os.unlink(beside)


def write_file(path: str, data: bytes) -> None:
    """Write a file that is there whole or not at all; see :func:`open_whole`."""
    with open_whole(path) as file:
        file.write(data)


class _Digest:
    """A file that counts and hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = 0
        self.hash = hashlib.sha256()
        self.error: OSError | None = None  # which torch.save hides behind one of its own

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.hash.hexdigest()}


def write_tensors(path: str, value: Any) -> dict[str, Any]:
    """``torch.save`` into a file that is there whole or not at all; see :func:`open_whole`.

    :return: {"bytes": its size, "sha256": its checksum}, as a manifest holds them.
    """
    with open_whole(path) as file:
        digest = _Digest(file)
        try:
            torch.save(value, digest)  # type: ignore[arg-type]  # a file that is only written to
        except RuntimeError:
            if digest.error is not None:
                raise digest.error from None
            raise
    return digest.entry()


def file_entry(path: str) -> dict[str, Any]:
    """The size and checksum of a file, as a manifest holds them."""
    import blobfile as bf

    with bf.BlobFile(path, "rb") as file:
        hash = hashlib.sha256()
        while block := file.read(2**24):
            hash.update(block)
    return {"bytes": bf.stat(path).size, "sha256": hash.hexdigest()}
