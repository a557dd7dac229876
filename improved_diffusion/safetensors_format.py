"""Weights as a safetensors file, which holds their flags too.

The format: 8 bytes of the header's length, a header of JSON, the tensors. The header's entry
``__metadata__`` is free text; ours is the flags, so that one file is a whole checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from .errors import UserError
from .files import write_file

SUFFIX = ".safetensors"
METADATA = "improved_diffusion"  # the entry that holds the flags
LONGEST_HEADER = 100_000_000  # bytes, as of the format


def is_safetensors(path: str) -> bool:
    """Whether a file is of this format, by its name."""
    return path.endswith(SUFFIX)


def write_safetensors(path: str, state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> None:
    """Write a state dict and its flags into a file that is there whole or not at all.

    :raises ValueError: if the package ``safetensors`` is missing.
    """
    metadata = {"format": "pt", METADATA: json.dumps(dict(flags))}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_file(path, _library().save(tensors, metadata=metadata))


def parse_safetensors(data: bytes, path: str) -> dict[str, Tensor]:
    """The tensors of a file's content, on the CPU.

    :raises ValueError: naming ``path``, if it is damaged; if the package ``safetensors`` is
        missing.
    """
    library = _library()
    try:
        return library.load(data)
    except Exception as error:  # whatever foreign or cut-off bytes make the library raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint '{path}' is damaged or no safetensors file: {reason}"
        ) from None


def read_flags(path: str) -> dict[str, Any]:
    """The flags that a file holds; empty if it holds none, as those of other programs.

    :param path: anything that blobfile opens; without such a file there are no flags.
    :raises ValueError: naming ``path``, if its header is damaged.
    """
    import blobfile as bf

    if bf.isdir(path) or not bf.exists(path):
        return {}
    with bf.BlobFile(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        flags = json.loads(json.loads(header).get("__metadata__", {}).get(METADATA, "{}"))
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"checkpoint '{path}' is damaged or no safetensors file") from None
    return flags if isinstance(flags, dict) else {}


def _library() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "safetensors files need one package more: pip install 'improved-diffusion[safetensors]'"
        ) from None
    return safetensors.torch
