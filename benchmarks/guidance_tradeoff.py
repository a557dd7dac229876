"""What guidance trades: samples that are more surely of their class, and less varied.

On checkpoints of the digits, over the scale of guidance: the share of samples recognised as the
digit asked for; precision and recall (arXiv 1904.06991) within each class, on pixels; and the
Frechet distance. Classifier-free guidance takes a model trained with --class_dropout; guidance by
a classifier an unconditional one and a classifier of noised digits. docs/guidance.md has the
commands that train them.

    python benchmarks/guidance_tradeoff.py --model_path runs/cfg/ema_0.99_001500.pt \
        --unconditional runs/uncond/ema_0.99_001500.pt \
        --classifier_path runs/digit_classifier/ema_0.99_001500.pt

writes benchmarks/results/guidance_tradeoff.json and docs/guidance_tradeoff.png.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from demo_quality import measure
from records import output_file, pyplot, write_result

from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import numbers, pick
from improved_diffusion.guidance import (
    ClassifierGuidance,
    GuidanceOptions,
    Unlabelled,
    classifier_gradient,
    guided_model,
)
from improved_diffusion.sample_util import to_uint8
from improved_diffusion.sampling import SampleOptions, draw_samples
from improved_diffusion.script_util import (
    ClassifierOptions,
    ModelAndDiffusionOptions,
    classifier_and_diffusion_defaults,
    model_and_diffusion_defaults,
)
from improved_diffusion.state_dicts import load_model
from improved_diffusion.stored_flags import load_config

ROOT = Path(__file__).parent.parent
SCALES = {  # classifier-free: 0 is without the class, 1 without guidance; classifier: 0 is without
    "classifier-free": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "classifier": (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0),
}
SAMPLING = SampleOptions(sampler="dpmpp_2m", steps=15)
NEIGHBOURS = 3  # of the k-nearest-neighbour estimates of the manifolds
FEWEST = 10 * (NEIGHBOURS + 1)  # samples: some of each digit
SEED = 0


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.samples < FEWEST:
        raise UserError(f"--samples {args.samples}: must be at least {FEWEST}")
    torch.set_num_threads(1)
    asked = numbers("scales", args.scales, float)
    scales = dict.fromkeys(SCALES, asked) if asked else SCALES
    result: dict = {"real": on_real_digits()}
    result["classifier-free"] = classifier_free(
        args.model_path, scales["classifier-free"], args.samples
    )
    if args.unconditional:
        result["classifier"] = by_classifier(
            args.unconditional, args.classifier_path, scales["classifier"], args.samples
        )
    result["samples"] = args.samples
    write_result(args.out, result)
    if args.picture:
        plot(result, args.picture)
        print(f"wrote {args.picture}")


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", required=True, help="trained with --class_dropout")
    parser.add_argument(
        "--unconditional", default="", help="trained without classes; '': leave out"
    )
    parser.add_argument("--classifier_path", default="", help="of classifier_train.py")
    parser.add_argument("--samples", type=int, default=1000, help="for each scale")
    parser.add_argument("--scales", default="", help="such as 1,3,8; '': a range for each kind")
    parser.add_argument(
        "--out", type=output_file, default=str(ROOT / "benchmarks/results/guidance_tradeoff.json")
    )
    parser.add_argument(
        "--picture", default=str(ROOT / "docs/guidance_tradeoff.png"), help="'' for none"
    )
    return parser


# -- samples ------------------------------------------------------------------------------------


def classifier_free(path: str, scales: list[float], count: int) -> list[dict]:
    """Qualities of the samples of a model that guides itself, at each scale."""
    defaults = model_and_diffusion_defaults()
    model, diffusion = load("model_path", path, ModelAndDiffusionOptions, defaults)
    if model.null_class is None:
        raise UserError(f"--model_path {path}: train it with --class_dropout")
    points = []
    for scale in scales:
        guided = guided_model(model, diffusion, GuidanceOptions(guidance_scale=scale))
        points.append(point("classifier-free", scale, guided, diffusion, count))
    return points


def by_classifier(path: str, classifier_path: str, scales: list[float], count: int) -> list[dict]:
    """Qualities of the samples of an unconditional model led by a classifier, at each scale."""
    if not classifier_path:
        raise UserError("--unconditional needs --classifier_path: a run of classifier_train.py")
    defaults = model_and_diffusion_defaults()
    model, diffusion = load("unconditional", path, ModelAndDiffusionOptions, defaults)
    if model.num_classes is not None:
        raise UserError(f"--unconditional {path}: this model has classes")
    defaults = classifier_and_diffusion_defaults()
    classifier, _ = load("classifier_path", classifier_path, ClassifierOptions, defaults)
    points = []
    for scale in scales:
        cond_fn = classifier_gradient(classifier, scale)
        guided = ClassifierGuidance(Unlabelled(model), diffusion, cond_fn)
        points.append(point("classifier", scale, guided, diffusion, count))
    return points


def load(flag: str, path: str, options: type, defaults: dict) -> tuple:
    """A network with the weights of a checkpoint of 8x8 digits, and its process."""
    stored = load_config(os.path.dirname(path))
    if stored.get("image_size") != 8 or stored.get("channels") != 1:
        raise UserError(f"--{flag} {path}: no checkpoint of 8x8 digits, with its flags")
    chosen = pick(options, {**defaults, **{k: v for k, v in stored.items() if k in defaults}})
    model = chosen.model()
    load_model(model, path)
    return model.eval(), chosen.diffusion()


def point(kind: str, scale: float, model, diffusion, count: int) -> dict:
    """What the samples of a guided model are like."""
    labels = torch.arange(count) % 10
    made = []
    for start in range(0, count, 250):
        indices = list(range(start, min(start + 250, count)))
        kwargs = {"y": labels[indices]}
        made.append(draw_samples(model, diffusion, indices, (1, 8, 8), SAMPLING, SEED, kwargs))
    images = to_uint8(torch.cat(made)).numpy()
    found = {"scale": scale, **qualities(images, labels.numpy())}
    print(json.dumps({"kind": kind, **found}), flush=True)
    return found


# -- how good they are --------------------------------------------------------------------------


def qualities(images: np.ndarray, labels: np.ndarray) -> dict:
    """Fidelity and diversity of digits.

    :param images: uint8 [N, 8, 8, 1].
    :param labels: [N] digits asked for.
    :return: "recognised", "frechet" (see :func:`demo_quality.measure`), and the means over the
        classes of "precision" and "recall".
    """
    quality = measure(images, labels)
    data, target = real_digits()
    samples = images.reshape(len(images), -1).astype(np.float64) * 16 / 255
    pairs = [
        precision_recall(samples[labels == digit], data[target == digit]) for digit in range(10)
    ]
    precision, recall = np.mean(pairs, axis=0)
    return {
        "recognised": quality["recognised"],
        "frechet": quality["frechet"],
        "precision": float(precision),
        "recall": float(recall),
    }


def on_real_digits() -> dict:
    """Precision and recall of one half of the real digits by the other: the most to hope for."""
    data, target = real_digits()
    pairs = []
    for digit in range(10):
        points = data[target == digit]
        pairs.append(precision_recall(points[::2], points[1::2]))
    precision, recall = np.mean(pairs, axis=0)
    return {"precision": float(precision), "recall": float(recall)}


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits [N, 64], levels 0 ... 16, and what they are [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data, digits.target


def precision_recall(samples: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """The share of samples within the real points' manifold, and of real points within the
    samples': arXiv 1904.06991 eqs. 1 and 2, with balls out to the third neighbour.

    :param samples: [N, d].
    :param real: [M, d].
    """
    return inside(samples, real), inside(real, samples)


def inside(points: np.ndarray, of: np.ndarray) -> float:
    """The share of points that lie in a ball round some point of the other set."""
    radii = np.sort(distances(of, of), axis=1)[:, NEIGHBOURS]  # the nearest is the point itself
    return float((distances(points, of) <= radii).any(axis=1).mean())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] of points [N, d] and [M, d]."""
    return np.linalg.norm(a[:, None] - b[None], axis=2)


# -- the picture --------------------------------------------------------------------------------


def plot(result: dict, path: str) -> None:
    """Fidelity and diversity over the scale, and one against the other."""
    kinds = [kind for kind in SCALES if kind in result]
    figure, axes = pyplot().subplots(1, len(kinds) + 1, figsize=(4.8 * (len(kinds) + 1), 4.2))
    lines = {"recognised": "C0o-", "precision": "C2s-", "recall": "C3^-"}
    for axis, kind in zip(axes, kinds, strict=False):
        scales = [p["scale"] for p in result[kind]]
        for key, style in lines.items():
            axis.plot(scales, [p[key] for p in result[kind]], style, markersize=4, label=key)
        off = 1 if kind == "classifier-free" else 0
        axis.axvline(off, color="grey", linestyle=":", label="no guidance")
        axis.set(title=f"{kind} guidance", xlabel="scale", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", frameon=False, fontsize=8)
    for kind, style in zip(kinds, ("C0o-", "C1s-"), strict=False):
        points = result[kind]
        axes[-1].plot(
            [p["recall"] for p in points],
            [p["precision"] for p in points],
            style,
            markersize=4,
            label=kind,
        )
        for p in points:
            axes[-1].annotate(
                f"{p['scale']:g}",
                (p["recall"], p["precision"]),
                (3, -9),
                fontsize=7,
                textcoords="offset points",
            )
    axes[-1].set(
        title="the trade, by scale",
        xlabel="diversity: recall within the class",
        ylabel="fidelity: precision within the class",
    )
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_main(main)
