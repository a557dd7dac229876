"""How many samples of the demo are recognised as the digit asked for, and how near they are to it.

A support-vector classifier is fitted on the real digits; its accuracy on held-out real digits is
printed beside, as the most to hope for. Samples that are all alike would be recognised too: the
Frechet distance between samples and real digits, on pixels, tells whether they vary as those do.

    python benchmarks/demo_quality.py runs/demo/samples
"""

import argparse
import glob
import json
import os

import numpy as np

from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError

SEED = 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder that image_sample.py wrote")
    args = parser.parse_args(argv)
    images, labels = load_samples(args.folder)
    result = measure(images, labels)
    with open(os.path.join(args.folder, "quality.json"), "w") as file:
        json.dump(result, file, indent=1)
    print(
        f"{result['recognised']:.1%} of {len(images)} samples are recognised as the class asked "
        f"for ({result['real']:.1%} of held-out real digits)"
    )
    worst = min(result["by_class"], key=result["by_class"].get)
    print(f"worst class: {worst}, {result['by_class'][worst]:.1%}")
    print(f"Frechet distance to the real digits: {result['frechet']:.2f}")


def load_samples(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels [N] of the newest npz file in a folder."""
    paths = sorted(glob.glob(os.path.join(folder, "samples_*.npz")), key=os.path.getmtime)
    if not paths:
        raise UserError(f"no samples_*.npz in '{folder}'")
    with np.load(paths[-1], allow_pickle=False) as arrays:
        if "arr_1" not in arrays:
            raise UserError(f"'{paths[-1]}' has no labels (arr_1)")
        return arrays["arr_0"], arrays["arr_1"]


def measure(images: np.ndarray, labels: np.ndarray) -> dict:
    """Recognition rates of a support-vector classifier fitted on the real digits, and a distance.

    :param images: uint8 [N, 8 k, 8 k, C] samples, averaged down to 8x8.
    :param labels: [N] digits asked for.
    :return: "recognised" and "real" (on a held-out fifth of the real digits), shares in 0 ... 1;
        "by_class", digit -> share; "frechet", see :func:`frechet`, in levels of 0 ... 16 squared.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("scikit-learn is missing: pip install 'improved-diffusion[demo]'") from None

    height, width = images.shape[1:3]
    if height != width or height % 8:
        raise UserError(f"the samples are {height}x{width}, but digits are a multiple of 8x8")
    factor = height // 8
    grey = images.mean(axis=-1).reshape(-1, 8, factor, 8, factor).mean(axis=(2, 4))
    samples = grey.reshape(-1, 64) * 16 / 255  # the levels of the data set, 0 ... 16
    digits = load_digits()
    x_fit, x_test, y_fit, y_test = train_test_split(
        digits.data, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target
    )
    held_out = SVC(gamma="scale").fit(x_fit, y_fit).score(x_test, y_test)
    correct = SVC(gamma="scale").fit(digits.data, digits.target).predict(samples) == labels
    return {
        "recognised": float(correct.mean()),
        "real": float(held_out),
        "frechet": frechet(samples, digits.data),
        "by_class": {str(c): float(correct[labels == c].mean()) for c in np.unique(labels)},
    }


def frechet(samples: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance of two Gaussians with the moments of the points [N, d] given: the formula
    of FID (arXiv 1706.08500, eq. 6). It falls with the number of samples too."""
    mean, covariance = samples.mean(axis=0), np.cov(samples.T)
    mean_real, covariance_real = real.mean(axis=0), np.cov(real.T)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_real @ root).clip(0)).sum()
    traces = np.trace(covariance) + np.trace(covariance_real)
    return float(((mean - mean_real) ** 2).sum() + traces - 2 * cross)


if __name__ == "__main__":
    run_main(main)
