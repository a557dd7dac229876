"""Memory, traffic and time per step of training by DDP, FSDP and hybrid sharding, calculated.

DDP: arXiv 2006.15704. ZeRO, whose stage 3 is FSDP: arXiv 1910.02054. FSDP: arXiv 2304.11277.
What is assumed and what was measured is in docs/scaling.md, which has these tables.

    python benchmarks/scaling_model.py                   the tables, for GPUs
    python benchmarks/scaling_model.py --measure True    compare with 1, 2 and 4 processes here
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import (
    ArgumentParser,
    make_parser,
    option,
    pick,
    require,
    require_at_least,
)
from improved_diffusion.optimization import PRECISIONS
from improved_diffusion.parallel import BUCKET_MB
from improved_diffusion.parallel import gathered_blocks as blocks_of  # what FSDP gathers at a time
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

FLOAT = 4  # bytes of a float32
GIB = 2**30

Shape = tuple[int, ...]

# name -> (images per GPU and step, flags of image_train.py)
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "CIFAR-10, 128 ch": (64, {"image_size": 32, "num_channels": 128}),
    "ImageNet-64, 192 ch": (32, {"image_size": 64, "num_channels": 192, "class_cond": True}),
    "ImageNet-64, 256 ch": (16, {"image_size": 64, "num_channels": 256, "class_cond": True}),
    "ImageNet-64, 512 ch": (8, {"image_size": 64, "num_channels": 512, "class_cond": True}),
}
NODES = (1, 2, 8, 64)
KINDS = ("ddp", "fsdp", "hybrid")


# -- what is trained, how, and on what --------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What the calculation needs to know of a network."""

    name: str
    blocks: tuple[tuple[Shape, ...], ...]  # the shapes of what is gathered together, in order
    flops: float  # of a forward pass of one image; a multiplication and an addition are two
    activations: int  # bytes that the backward pass of one image needs, in float32

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for block in self.blocks for shape in block)


@dataclass(frozen=True)
class Layout:
    """How the processes, one per GPU, hold the model."""

    kind: str  # "ddp", "fsdp" or "hybrid"
    processes: int
    per_node: int
    shard_processes: int = 0  # of "hybrid"

    @property
    def shares(self) -> int:
        """Into how many shares a copy of the model is cut."""
        return {"ddp": 1, "fsdp": self.processes, "hybrid": self.shard_processes}[self.kind]

    @property
    def copies(self) -> int:
        """How many copies of the model there are."""
        return self.processes // self.shares


@dataclass(frozen=True)
class Training:
    """What a process does in a step."""

    images: int = 1
    microbatches: int = 1
    averages: int = 1  # the --ema_rate and --posthoc_ema that are kept
    precision: str = "fp32"

    @property
    def element(self) -> int:
        """Bytes of a weight when it is gathered, and of its gradient until it is summed."""
        return FLOAT if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Machines:
    """Speeds; what is reached in training, not what the data sheet says."""

    tflops: float = option(200.0, "TFLOP/s that a GPU reaches in training")
    within_gbytes: float = option(300.0, "GB/s that a GPU sends to another of its node")
    fast_gbits: float = option(3200.0, "Gbit/s that leave a node; the tables' fast network")
    slow_gbits: float = option(100.0, "Gbit/s that leave a node; the tables' slow network")
    within_us: float = option(2.0, "microseconds until a message reaches another GPU of its node")
    between_us: float = option(10.0, "microseconds until a message reaches another node")
    per_node: int = option(8, "GPUs per node")

    def __post_init__(self) -> None:
        require_at_least(1, self, ["per_node"])
        require_at_least(0, self, ["within_us", "between_us"])
        for name in ("tflops", "within_gbytes", "fast_gbits", "slow_gbits"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "above 0")


def describe(name: str, flags: dict[str, Any]) -> Network:
    """A network's shapes, work and activations, without computing or holding anything.

    :param flags: of image_train.py; three residual blocks and a learned variance unless they say
        otherwise.
    """
    with torch.device("meta"):
        model = make_network(flags)
    blocks = [tuple(tuple(p.shape) for p in block.parameters()) for block in blocks_of(model)]
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
    rest = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    if rest:  # such as the embedding of the classes
        blocks.append(rest)
    flops, activations = _work(model, flags)
    return Network(name, tuple(blocks), flops, activations)


def make_network(flags: dict[str, Any]) -> nn.Module:
    """The network of :func:`describe`, on the current device."""
    defaults = {**model_and_diffusion_defaults(), "num_res_blocks": 3, "learn_sigma": True}
    return create_model_and_diffusion(**{**defaults, **flags})[0]


def _work(model: nn.Module, flags: dict[str, Any]) -> tuple[float, int]:
    """FLOPs of a forward pass of one image, and bytes kept for its backward pass."""
    weights = {param.untyped_storage()._cdata for param in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: views of a tensor count once

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept[key] = tensor
        return tensor

    size = flags["image_size"]
    x = torch.zeros(1, 3, size, size, device="meta")
    t = torch.zeros(1, dtype=torch.long, device="meta")
    label = {"y": t} if flags.get("class_cond") else {}
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(x, t, **label)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return counter.get_total_flops(), bytes_kept


# -- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    gradients: int
    moments: int
    averages: int
    in_flight: int  # for a moment: what is gathered, sent, or cast
    activations: int

    @property
    def state(self) -> int:
        """What is held from step to step."""
        return self.weights + self.gradients + self.moments + self.averages

    @property
    def total(self) -> int:
        """The most that is held within a step."""
        return self.state + self.in_flight + self.activations


def share(shape: Shape, shares: int) -> int:
    """Elements of the first, largest, of the shares of a parameter, cut along its first side."""
    return -(-shape[0] // shares) * math.prod(shape[1:])


def memory(network: Network, layout: Layout, training: Training) -> Memory:
    """What the first process holds.

    Weights, gradients, averages and Adam's two moments are float32 whatever the precision (ZeRO,
    section 3.1, has 16-bit copies besides); DDP's buckets are the gradients themselves.
    """
    held = sum(share(shape, layout.shares) for block in network.blocks for shape in block)
    images = -(-training.images // training.microbatches)
    return Memory(
        weights=FLOAT * held,
        gradients=FLOAT * held,
        moments=2 * FLOAT * held,
        averages=training.averages * FLOAT * held,
        in_flight=_in_flight(network, layout, training),
        activations=network.activations * images * training.element // FLOAT,
    )


def _in_flight(network: Network, layout: Layout, training: Training) -> int:
    """The most that is whole at a time.

    DDP: under autocast the 16-bit copies of all weights. FSDP: in the backward pass a block's
    weights and gradients, the weights of the next, and float32 gradients on their way, its own
    and those of the block before. Hybrid: also the shares of all gradients so far, which are kept
    until they have been to the other copies.
    """
    if layout.kind == "ddp":
        return 0 if training.element == FLOAT else training.element * network.parameters
    sizes = [0, *padded(network, layout.shares), 0]
    most = 0
    for i in range(1, len(sizes) - 1):
        gathered = 2 * sizes[i] + sizes[i - 1]
        sent = sizes[i] + sizes[i + 1]
        if layout.copies > 1:
            sent += sum(sizes[i:]) // layout.shares
        most = max(most, training.element * gathered + FLOAT * sent)
    return most


def padded(network: Network, shares: int) -> list[int]:
    """Elements of each block as it is sent: shares of a parameter are of equal size."""
    return [sum(shares * share(shape, shares) for shape in block) for block in network.blocks]


# -- communication ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rings:
    """Calls of one kind in a step, by rings of processes that pass data on to the next.

    :param payload: bytes of all calls together: the whole tensors.
    :param rounds: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce, which is both.
    :param members: processes of a ring.
    :param stride: from a process to the next of its ring; so many rings lie beside each other.
    """

    payload: float
    rounds: int
    members: int
    stride: int
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends, and receives."""
        return self.rounds * (self.members - 1) / self.members * self.payload

    def leaving(self, per_node: int) -> float:
        """Bytes that all processes of a node send to other nodes."""
        return self.sent * self._cables(per_node)

    def _cables(self, per_node: int) -> int:
        """How many rings go from a node to the next."""
        return min(self.stride, per_node) if self.members * self.stride > per_node else 0

    def seconds(self, machines: Machines, gbits: float) -> float:
        """Time of the calls, one after the other.

        :param gbits: Gbit/s that leave a node.
        """
        per_node = machines.per_node
        within = self.sent / (machines.within_gbytes * 1e9)
        between = self.leaving(per_node) / (gbits * 1e9 / 8)
        return max(within, between) + self.calls * self._delay(machines)

    def _delay(self, machines: Machines) -> float:
        """Seconds until the first byte of a call has come to the last process."""
        crosses = self._cables(machines.per_node) > 0
        far = min(1.0, self.stride / machines.per_node) if crosses else 0.0
        hop = (far * machines.between_us + (1 - far) * machines.within_us) * 1e-6
        if self.rounds == 1:
            return (self.members - 1) * hop
        # short all-reduces go by trees (NCCL since 2.4): up and down again
        slowest = (machines.between_us if crosses else machines.within_us) * 1e-6
        return 2 * math.ceil(math.log2(self.members)) * slowest


def communication(
    network: Network, layout: Layout, training: Training, scatter_rounds: int = 1
) -> list[Rings]:
    """What the processes send to each other in a step; a few numbers, such as the norm, left out.

    :param scatter_rounds: 2 for gloo, whose reduce-scatter is an all-reduce.
    """
    if layout.kind == "ddp":
        gradients, n = FLOAT * network.parameters, layout.processes
        buckets = math.ceil(gradients / (BUCKET_MB * 2**20))
        return [Rings(gradients, 2, n, stride=1, calls=buckets)]
    elements = sum(padded(network, layout.shares))
    times = training.microbatches
    calls = times * len(network.blocks)
    shares = layout.shares
    rings = [
        # in the forward pass, and again in the backward pass (FSDP, section 3.2)
        Rings(2 * times * training.element * elements, 1, shares, stride=1, calls=2 * calls),
        Rings(times * FLOAT * elements, scatter_rounds, shares, stride=1, calls=calls),
    ]
    if layout.copies > 1:  # hybrid: shares of the gradient go to the other copies
        payload = times * FLOAT * elements / shares
        rings.append(Rings(payload, 2, layout.copies, stride=shares, calls=calls))
    return rings


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    communicate: float
    at_once: float  # how much of the computation can go on meanwhile, at best

    @property
    def worst(self) -> float:
        """Efficiency if nothing is done meanwhile: of one GPU's speed, in 0 ... 1."""
        return self.compute / (self.compute + self.communicate)

    @property
    def best(self) -> float:
        """Efficiency if as much as possible is done meanwhile."""
        waiting = max(0.0, self.communicate - self.at_once)
        return self.compute / (self.compute + waiting)


def step_time(
    network: Network, layout: Layout, training: Training, machines: Machines, gbits: float
) -> StepTime:
    """The time of a step; the optimiser's, which is short, left out."""
    forward = network.flops * training.images / (machines.tflops * 1e12)
    compute = 3 * forward  # the backward pass computes twice as much
    rings = communication(network, layout, training)
    # DDP sends during the last microbatch's backward pass, FSDP always
    at_once = 2 * forward / training.microbatches if layout.kind == "ddp" else compute
    return StepTime(compute, sum(ring.seconds(machines, gbits) for ring in rings), at_once)


# -- tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableOptions:
    """What the tables are of."""

    measure: bool = option(False, "compare the calculation with processes on this machine instead")
    out: str = option("benchmarks/results/scaling.json", "with --measure: file for the numbers")
    precision: str = option("bf16", "fp32, bf16 or fp16, as of image_train.py")
    microbatches: int = option(1, "forward passes per step")
    averages: int = option(1, "averages kept: rates of --ema_rate and widths of --posthoc_ema")

    def __post_init__(self) -> None:
        known = self.precision in PRECISIONS
        require(known, "precision", self.precision, " or ".join(PRECISIONS))
        require_at_least(1, self, ["microbatches"])
        require_at_least(0, self, ["averages"])

    def training(self, images: int) -> Training:
        """The training of these options, with so many images per GPU and step."""
        return Training(images, self.microbatches, self.averages, self.precision)


def layouts(nodes: int, per_node: int) -> list[Layout]:
    """The three kinds on so many nodes; hybrid has one copy per node."""
    return [Layout(kind, nodes * per_node, per_node, per_node) for kind in KINDS]


def table(
    networks: Sequence[Network],
    options: TableOptions,
    machines: Machines,
    cell: Callable[[Network, Layout, Training], str],
) -> str:
    """A table in Markdown, against the number of nodes.

    :param cell: writes the cell of a network that is spread and trained so.
    """
    header = ["network", "", *(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES)]
    rows = [header, ["---", "---", *["--:"] * len(NODES)]]
    for network in networks:
        images = NETWORKS[network.name][0]
        training = options.training(images)
        title = f"{network.name}: {network.parameters / 1e6:.0f} M, {images} images"
        for kind in range(len(KINDS)):
            spread = [layouts(nodes, machines.per_node)[kind] for nodes in NODES]
            cells = [cell(network, layout, training) for layout in spread]
            rows.append([title if kind == 0 else "", KINDS[kind], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def print_tables(options: TableOptions, machines: Machines) -> None:
    """Memory, traffic, and efficiency on a fast and a slow network."""
    networks = [describe(name, flags) for name, (_, flags) in NETWORKS.items()]

    def memory_cell(network: Network, layout: Layout, training: Training) -> str:
        found = memory(network, layout, training)
        return f"{found.state / GIB:.2f} + {found.in_flight / GIB:.2f}"

    def traffic_cell(network: Network, layout: Layout, training: Training) -> str:
        rings = communication(network, layout, training)
        sent = sum(ring.sent for ring in rings) / 1e9
        leaving = sum(ring.leaving(layout.per_node) for ring in rings) / 1e9
        return f"{sent:.2f} / {leaving:.2f}"

    print(f"GiB per GPU, {options.precision}: from step to step + for a moment\n")
    print(table(networks, options, machines, memory_cell))
    print("\nGiB of activations per image of a forward pass\n")
    for network in networks:
        training = options.training(1)
        found = memory(network, Layout("ddp", 1, 1), training)
        print(f"- {network.name}: {found.activations / GIB:.2f}")
    print("\nGB per step: sent by a GPU / leaving a node\n")
    print(table(networks, options, machines, traffic_cell))
    for gbits in (machines.fast_gbits, machines.slow_gbits):

        def efficiency_cell(
            network: Network, layout: Layout, training: Training, gbits: float = gbits
        ) -> str:
            time = step_time(network, layout, training, machines, gbits)
            return f"{100 * time.worst:.0f} to {100 * time.best:.0f}"

        print(f"\nefficiency in %, {gbits:g} Gbit/s leave a node\n")
        print(table(networks, options, machines, efficiency_cell))


def main() -> None:
    args = vars(make_options_parser().parse_args())
    options, machines = pick(TableOptions, args), pick(Machines, args)
    if options.measure:
        import scaling_measure  # starts processes, which the tables do not need

        scaling_measure.measure(options.out)
        return
    print_tables(options, machines)


def make_options_parser() -> ArgumentParser:
    return make_parser(
        "Memory, traffic and time per step of training on many GPUs.", TableOptions, Machines
    )


if __name__ == "__main__":
    run_main(main)
