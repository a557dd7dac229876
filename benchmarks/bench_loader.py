"""How fast images come: from a folder of JPEGs by one worker and by two, and from a packed set.

Makes its own pictures of 500x375 pixels, packs them, and takes turns: each round measures every
way once, so that whatever else the machine does falls on all of them. What counts is the median
of the rounds' ratios, on a machine that does nothing else; on a busy one look at the CPU time per
image, which says what a quiet one could do.

    python benchmarks/bench_loader.py

prints tables and writes benchmarks/results/loader.json. The targets are 20 times the images/s of
the folder for the packed set, both with one worker, and 1.7 times for the folder with two workers,
on two cores.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time

import numpy as np
import torch
from measuring import paired
from PIL import Image, ImageFilter
from records import above_zero, at_least, output_file, result_path, table, write_result

from improved_diffusion.dist_util import run_main
from improved_diffusion.image_datasets import list_images, load_data, load_pixels, open_dataset
from improved_diffusion.packed import write_packed

HEIGHT, WIDTH, QUALITY = 375, 500, 90
SECONDS = 4.0  # of one measurement
WARM_UP = 4  # batches before it: workers start, and fill what they read ahead

# name -> packed set or folder, workers
WAYS = {
    "folder, 1 worker": ("folder", 1),
    "packed, 1 worker": ("packed", 1),
    "folder, 2 workers": ("folder", 2),
    "folder, no worker": ("folder", 0),
    "packed, no worker": ("packed", 0),
}
RATIOS = {
    "packed to folder, 1 worker": ("packed, 1 worker", "folder, 1 worker", 20.0),
    "folder, 2 workers to 1": ("folder, 2 workers", "folder, 1 worker", 1.7),
    "packed to folder, no worker": ("packed, no worker", "folder, no worker", None),
}


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    torch.set_num_threads(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as scratch:
        places = {"folder": f"{scratch}/folder", "packed": f"{scratch}/packed"}
        size = make_pictures(places["folder"], args.images)
        pack(places["folder"], places["packed"], args.image_size)
        rounds, costs = measure(places, args)
    result = {
        "what": "images/s that load_data delivers: uint8 from the workers, normalised to float32",
        "pictures": f"{args.images} JPEGs of {WIDTH}x{HEIGHT}, {size / 1024:.0f} KiB on average",
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "rounds": rounds,
        "images_per_s": {way: statistics.median(r[way] for r in rounds) for way in WAYS},
        "cpu_ms_per_image": cpu_times(costs),
        "ratios": {name: ratio(rounds, *ways) for name, ways in RATIOS.items()},
        "pillow": Image.__version__,
        "load_before": load,
    }
    print(report(result))
    write_result(args.out, result)


def make_pictures(folder: str, count: int) -> float:
    """Write pictures that cost a decoder what photographs do; their mean size in bytes."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for i in range(count):
        picture(rng).save(f"{folder}/{i % 10}_{i:05d}.jpg", quality=QUALITY)
    return statistics.mean(entry.stat().st_size for entry in os.scandir(folder))


def picture(rng: np.random.Generator) -> Image.Image:
    """Smooth colours with edges and some grain, as photographs have."""
    total = np.zeros((HEIGHT, WIDTH, 3))
    for scale, strength in ((4, 60), (16, 35), (60, 20)):  # coarse to fine
        coarse = rng.uniform(0, 255, (scale, scale * 4 // 3, 3)).astype(np.uint8)
        layer = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=float) * strength / 115
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(12):  # objects: ellipses of another brightness
        y, x, b, a = rng.uniform((0, 0, 10, 10), (HEIGHT, WIDTH, HEIGHT / 4, WIDTH / 4))
        inside = ((rows - y) / b) ** 2 + ((columns - x) / a) ** 2 < 1
        total[inside] += rng.uniform(-60, 60, 3)
    image = Image.fromarray(total.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SMOOTH)
    grain = rng.normal(0, 3, (HEIGHT, WIDTH, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def pack(folder: str, out: str, image_size: int) -> None:
    """What datasets/pack.py does."""
    images = list_images(folder)
    dataset = open_dataset(images, image_size)
    names = [os.path.relpath(path, folder) for path in images.paths]
    write_packed(out, load_pixels(dataset, 64, 2), names, root="folder")


Costs = dict[str, list[tuple[float, float]]]  # way -> (training process, workers) in each round


def measure(
    places: dict[str, str], args: argparse.Namespace
) -> tuple[list[dict[str, float]], Costs]:
    """Every way once in each round.

    :return: images/s; and the CPU time per image in ms.
    """
    costs: Costs = {way: [] for way in WAYS}

    def seconds_per_image(way: str) -> float:
        before = cpu_seconds()
        speed, count = images_per_second(places, way, args)
        own, workers = (after - b for after, b in zip(cpu_seconds(), before, strict=True))
        costs[way].append((1000 * own / count, 1000 * workers / count))
        return 1 / speed

    candidates = {way: lambda way=way: seconds_per_image(way) for way in WAYS}
    seconds = paired(candidates, args.rounds, warm_up=0)
    rounds = [{way: round(1 / seconds[way][i], 1) for way in WAYS} for i in range(args.rounds)]
    return rounds, costs


def cpu_seconds() -> tuple[float, float]:
    """What this process has used, and what its workers had that have ended."""
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, workers = (usage.ru_utime + usage.ru_stime for usage in used)
    return own, workers


def cpu_times(costs: Costs) -> dict[str, dict[str, float]]:
    """The medians over the rounds."""
    names = ("training process", "workers")
    return {
        way: {
            name: round(statistics.median(column), 4)
            for name, column in zip(names, zip(*pairs, strict=True), strict=True)
        }
        for way, pairs in costs.items()
    }


def images_per_second(
    places: dict[str, str], way: str, args: argparse.Namespace
) -> tuple[float, int]:
    """The speed, and how many images came in all, with those before the clock started."""
    place, num_workers = WAYS[way]
    data = load_data(
        data_dir=places[place],
        batch_size=args.batch_size,
        image_size=args.image_size,
        num_workers=num_workers,
        seed=0,
    )
    # by the end of these the loop waits for the workers, which have nothing read ahead any more
    warm_up = WARM_UP * max(1, num_workers)
    for _ in range(warm_up):
        next(data)
    started, batches = time.perf_counter(), 0
    while time.perf_counter() - started < args.seconds:
        next(data)
        batches += 1
    speed = batches * args.batch_size / (time.perf_counter() - started)
    data.seek(0)  # ends the workers
    return speed, (warm_up + batches) * args.batch_size


def ratio(
    rounds: list[dict[str, float]], way: str, other: str, target: float | None
) -> dict[str, float | None]:
    """The median of the rounds' ratios, the least and the largest, and what it should be."""
    ratios = sorted(r[way] / r[other] for r in rounds)
    return {
        "median": round(statistics.median(ratios), 2),
        "least": round(ratios[0], 2),
        "largest": round(ratios[-1], 2),
        "target": target,
    }


def report(result: dict) -> str:
    """The tables that are printed."""
    header = ["way", "images/s", "CPU ms per image", "of the workers"]
    rows = []
    for way, speed in result["images_per_s"].items():
        own, workers = result["cpu_ms_per_image"][way].values()
        rows.append([way, f"{speed:,.0f}", f"{own:.3f}", f"{workers:.3f}"])
    ratios = [
        [name, *("" if value is None else value for value in found.values())]
        for name, found in result["ratios"].items()
    ]
    header_of_ratios = ["ratio of images/s", "median", "least", "largest", "target"]
    return f"{table(header, rows)}\n\n{table(header_of_ratios, ratios)}"


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=at_least(1), default=512, help="pictures to make")
    parser.add_argument("--image_size", type=at_least(1), default=64, help="that they are read at")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images per batch")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="of all ways")
    parser.add_argument("--seconds", type=above_zero, default=SECONDS, help="of one measurement")
    parser.add_argument(
        "--out", type=output_file, default=result_path("loader"), help="result file"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
