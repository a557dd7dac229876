"""Is a job that was cut off the one that is started now? What decides its results, compared.

Sampling and evaluation keep this beside what they have finished: :mod:`.sample_parts`,
:mod:`.nll_results`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import dist_util
from .flags import size_text

LONGEST = 100  # characters of a flag's value in an error; --betas may hold thousands of numbers

# Flags that leave the images as they are, or that are kept in another form
OTHER_FLAGS = frozenset(
    [
        "num_samples",
        "batch_size",
        "compile",  # changes rounding alone, as batch_size does
        "log_dir",
        "save_png",
        "use_ddim",  # by the sampler
        "class_names",
        "model_path",  # by what it holds
        "base_samples",
        "guide_path",
        "classifier_path",
        "dropout",  # of training alone
        "classifier_dropout",
        "class_dropout",
        "use_kl",
        "rescale_learned_sigmas",
        "loss_weight",
        "use_checkpoint",
    ]
)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A checksum of the types, shapes and values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def deciding_flags(flags: Mapping[str, Any], **contents: Iterable[Tensor]) -> dict[str, Any]:
    """What decides the images: flags, and what the files hold that flags name.

    :param flags: all flags of the script, with those of the checkpoint.
    :param contents: by the name of a flag that names a file: the tensors that were read from it.
    :return: name -> value, as JSON holds it; of a file {"path": ..., "sha256": ...}.
    """
    deciding = {name: value for name, value in flags.items() if name not in OTHER_FLAGS}
    checksums = dist_util.on_first_rank(
        lambda: {name: fingerprint(tensors) for name, tensors in contents.items()}
    )
    for name, checksum in checksums.items():
        deciding[name] = {"path": str(flags[name]), "sha256": checksum}
    return deciding


def as_stored(deciding: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a job as it is read back from a file: tuples are lists."""
    return json.loads(json.dumps(dict(deciding)))


def differences(stored: Mapping[str, Any], deciding: Mapping[str, Any]) -> tuple[str, str]:
    """The flags that differ, as texts of the stored side and of this one; '' if none does.

    :param stored: of the earlier sitting.
    :param deciding: of this one, see :func:`as_stored`.
    """
    names = [name for name in {**deciding, **stored} if _differ(name, deciding, stored)]
    theirs, ours = (
        " ".join(_flag_text(name, side.get(name)) for name in names) for side in (stored, deciding)
    )
    return theirs, ours


def _differ(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether an entry differs; where a file lies does not matter."""
    a, b = ours.get(name), theirs.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.get("sha256") != b.get("sha256")
    return a != b


def _flag_text(name: str, value: Any) -> str:
    """A flag as it is written on the command line; for a file with the start of its checksum."""
    if value is None:
        return f"no --{name}"
    if isinstance(value, dict):
        return f"--{name} {value.get('path')} (sha256 {str(value.get('sha256'))[:8]})"
    if isinstance(value, list) and len(value) == 2:
        return f"--{name} {size_text(value)}"
    text = str(value) or "''"
    return f"--{name} {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
