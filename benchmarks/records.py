"""What the benchmarks leave: results as JSON with where they were measured, and pictures."""

import json
import os
import platform

import torch

import improved_diffusion
from improved_diffusion.errors import UserError


def write_result(path: str, result: dict) -> None:
    """Write a result with the versions and the machine that it was measured on, and say so."""
    circumstances = {
        "versions": {
            "improved_diffusion": improved_diffusion.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "system": platform.system()},
    }
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        json.dump({**result, **circumstances}, file, indent=1)
    print(f"wrote {path}")


def pyplot():
    """matplotlib's pyplot, drawing into files.

    :raises ValueError: naming the extra, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is missing: pip install 'improved-diffusion[plots]', or --picture ''"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
