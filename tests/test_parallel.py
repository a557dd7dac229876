"""One process, copies of the model and shares of it train alike."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from launchers import start

from improved_diffusion.errors import UserError
from improved_diffusion.parallel import ParallelOptions, is_sharded, like, local, whole

WORKER = Path(__file__).parent / "workers" / "parallel_worker.py"
KEYS = ("model", "ema", "moments")
FSDP = {"parallel": "fsdp"}
# Adam turns rounding noise into steps where the true gradient is zero, unless its epsilon is larger
CALM = 1e-2


def train(folder, name, processes, launcher="torchrun", **given):
    """What the first process ends with after 20 steps of 8 images each."""
    given = {"name": name, "log_dir": str(folder / name), "eps": CALM, **given}
    launcher = launcher if processes > 1 else "single"
    done = start(launcher, WORKER, folder, json.dumps(given), processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return torch.load(folder / f"{name}_rank0.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's result under some arguments; each is made once."""
    made = {}

    def result(**given):
        key = tuple(sorted(given.items()))
        if key not in made:
            made[key] = train(tmp_path_factory.mktemp("alone"), "one", 1, **given)
        return made[key]

    return result


def difference(result, other):
    pairs = itertools.chain(*(zip(result[key], other[key], strict=True) for key in KEYS))
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("processes", "given"),
    [
        (2, FSDP),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"microbatch": 2}, marks=pytest.mark.slow),
        pytest.param(2, {**FSDP, "microbatch": 3, "grad_clip": 0.5}, marks=pytest.mark.slow),
        pytest.param(2, {**FSDP, "use_checkpoint": True}, marks=pytest.mark.slow),
        pytest.param(4, {"microbatch": 1}, marks=pytest.mark.slow),
        pytest.param(4, FSDP, marks=pytest.mark.slow),
        pytest.param(4, {**FSDP, "shard_processes": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_weights_are_those_of_one_process(tmp_path, alone, processes, given):
    result = train(tmp_path, "several", processes, **given)
    reference = alone(**{k: v for k, v in given.items() if k == "grad_clip"})
    assert difference(result, reference) < 1e-5
    initial = train(tmp_path, "start", 1, steps=1)
    assert difference(reference, initial) > 1e-3  # it did train


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("given", [{}, FSDP], ids=str)
def test_half_precision_agrees_as_far_as_it_rounds(tmp_path, alone, precision, given):
    result = train(tmp_path, "several", 2, precision=precision, **given)
    reference = alone(precision=precision)
    assert difference(result, reference) < 2e-3  # of moments about 0.1
    assert result["scale"] == reference["scale"]


@pytest.mark.slow
def test_mpiexec_shares_the_model_as_well(tmp_path, alone):
    assert difference(train(tmp_path, "mpi", 2, "mpiexec", **FSDP), alone()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "share"), [(FSDP, 1 / 4), ({**FSDP, "shard_processes": 2}, 1 / 2), ({}, 1)], ids=str
)
def test_each_process_holds_its_share(tmp_path, given, share):
    train(tmp_path, "several", 4, **given, steps=1)
    total = sum(p.numel() for p in train(tmp_path, "one", 1, steps=1)["model"])
    held = [torch.load(tmp_path / f"several_rank{rank}.pt")["elements"] for rank in range(4)]
    for name in ("model", "ema"):
        each = [elements[name] for elements in held]
        assert sum(each) == pytest.approx(4 * share * total)  # no number is missing or twice
        assert max(each) < 1.01 * share * total  # small tensors cannot be cut evenly


# -- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": "zero"}, "--parallel zero: must be ddp or fsdp"),
        ({"shard_processes": 2}, "--shard_processes 2 needs --parallel fsdp"),
        ({**FSDP, "shard_processes": -1}, "--shard_processes -1"),
        ({"global_batch": -4}, "--global_batch -4"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        ParallelOptions(**options)


@pytest.mark.parametrize(
    ("options", "world_size", "use_fp16", "words"),
    [
        (FSDP, 1, False, "--parallel fsdp .* this is the only one: start with torchrun"),
        (FSDP, 2, True, "--use_fp16 True .* use --precision fp16 or bf16"),
        ({**FSDP, "shard_processes": 3}, 8, False, "--shard_processes 3: .* above 1: 2, 4, 8"),
        ({**FSDP, "shard_processes": 1}, 4, False, "--shard_processes 1: .*: 2, 4"),
        ({**FSDP, "shard_processes": 16}, 8, False, "--shard_processes 16: "),
    ],
)
def test_processes_that_cannot_share_a_model(options, world_size, use_fp16, words):
    with pytest.raises(UserError, match=words) as error:
        ParallelOptions(**options).check(world_size, use_fp16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [FSDP, {**FSDP, "shard_processes": 4}, {}])
def test_processes_that_can(options):
    ParallelOptions(**options).check(8)
    ParallelOptions().check(1, use_fp16=True)


def test_a_global_batch_is_shared_equally():
    assert ParallelOptions(global_batch=96).batch_size(1, 8) == 12
    assert ParallelOptions(global_batch=96).batch_size(5, 1) == 96
    assert ParallelOptions().batch_size(5, 3) == 5
    with pytest.raises(UserError, match=r"--global_batch 100: 8 processes .* 96 and 104"):
        ParallelOptions(global_batch=100).batch_size(1, 8)
    with pytest.raises(UserError, match=r"the nearest are 8$"):
        ParallelOptions(global_batch=3).batch_size(1, 8)


def test_whole_tensors_pass_through():
    tensor = torch.nn.Parameter(torch.randn(3))
    (held,) = local([tensor])
    held.add_(1)
    assert (held == tensor).all()
    assert not held.requires_grad
    assert whole(tensor) is tensor
    assert like(tensor, held) is held
    assert not is_sharded(tensor)
