"""Memory and traffic of training on many GPUs: the calculation against real processes."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from script_runner import ROOT, load_module

from improved_diffusion.errors import UserError
from improved_diffusion.parallel import gathered_blocks as blocks_of

model = load_module("benchmarks", "scaling_model")
measuring = load_module("benchmarks", "scaling_measure")
hosts = load_module("benchmarks", "pretend_hosts")

P = 64 * 16 + 64 + 128 * 64  # of the network below; 64 divides the first side of each parameter
EVEN = model.Network("even", (((64, 16), (64,)), ((128, 64),)), flops=1e9, activations=1000)

FLAGS = measuring.CASES[0].flags

# how far measured may be from calculated; from step to step a process holds exactly so much
TOLERANCE = {
    "sent_within_hosts": 0.01,
    "sent_between_hosts": 0.01,
    "peak_in_step": 0.2,
    "seconds_per_step": 0.1,
}


def sent(layout, network=EVEN, **training):
    rings = model.communication(network, layout, model.Training(**training))
    leaving = sum(ring.leaving(layout.per_node) for ring in rings)
    return sum(ring.sent for ring in rings), leaving


# -- closed forms -----------------------------------------------------------------------------


def test_ddp_holds_all_and_fsdp_a_share():
    training = model.Training(averages=3)
    whole = model.memory(EVEN, model.Layout("ddp", 16, 8), training)
    assert (whole.weights, whole.gradients) == (4 * P, 4 * P)
    assert (whole.moments, whole.averages) == (8 * P, 12 * P)
    shared = model.memory(EVEN, model.Layout("fsdp", 16, 8), training)
    assert shared.state == whole.state / 16
    hybrid = model.memory(EVEN, model.Layout("hybrid", 16, 8, shard_processes=8), training)
    assert hybrid.state == whole.state / 8


def test_ddp_sends_every_gradient_twice_but_for_its_own_part():
    assert sent(model.Layout("ddp", 16, 8)) == (2 * 15 / 16 * 4 * P,) * 2  # one ring
    assert sent(model.Layout("ddp", 8, 8)) == (2 * 7 / 8 * 4 * P, 0)
    assert sent(model.Layout("ddp", 1, 8)) == (0, 0)


@pytest.mark.parametrize(("precision", "gathered"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_fsdp_gathers_twice_and_scatters_once_per_microbatch(precision, gathered, microbatches):
    expected = microbatches * 15 / 16 * (2 * gathered + 4) * P
    layout = model.Layout("fsdp", 16, 8)
    found = sent(layout, precision=precision, microbatches=microbatches)
    assert found == pytest.approx((expected, expected))


def test_hybrid_sends_between_nodes_the_shares_of_the_gradients_alone():
    layout = model.Layout("hybrid", 32, 8, shard_processes=8)  # 4 nodes
    inside, shares = 7 / 8 * 3 * 4 * P, 2 * 3 / 4 * 4 * P / 8
    assert sent(layout) == pytest.approx((inside + shares, 8 * shares))


def test_a_copy_on_two_nodes_sends_its_gathers_between_them():
    layout = model.Layout("hybrid", 32, 8, shard_processes=16)
    ring, shares = 15 / 16 * 3 * 4 * P, 2 * 1 / 2 * 4 * P / 16
    assert sent(layout) == pytest.approx((ring + shares, ring + 8 * shares))


def test_shares_of_small_parameters_are_filled_up_to_equal_size():
    odd = replace(EVEN, blocks=(((3, 5), (7,)),))
    assert model.padded(odd, 2) == [4 * 5 + 8]
    assert model.padded(odd, 64) == [64 * 5 + 64]  # more processes than rows
    held = model.memory(odd, model.Layout("fsdp", 2, 8), model.Training())
    assert held.weights == 4 * (2 * 5 + 4)  # the first process has the larger share


def test_activations_are_those_of_a_microbatch():
    training = model.Training(images=7, microbatches=2, precision="bf16")
    assert model.memory(EVEN, model.Layout("ddp", 1, 1), training).activations == 4 * 1000 / 2


def test_a_slow_network_and_more_nodes_cost_time():
    machines = model.Machines()
    for kind in model.KINDS:

        def efficiency(nodes, gbits, kind=kind):
            (layout,) = [x for x in model.layouts(nodes, 8) if x.kind == kind]
            time = model.step_time(EVEN, layout, model.Training(), machines, gbits)
            assert 0 < time.worst <= time.best <= 1
            return time.worst

        assert efficiency(8, 100) < efficiency(8, 3200) < efficiency(1, 3200)
        assert efficiency(1, 100) == efficiency(1, 3200)  # nothing leaves the node


# -- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("class_cond", [False, True])
def test_the_description_has_every_parameter_once(class_cond):
    flags = {**FLAGS, "class_cond": class_cond, "num_classes": 10}
    with torch.device("meta"):
        network = model.make_network(flags)
    described = model.describe("small", flags)
    assert described.parameters == sum(p.numel() for p in network.parameters())
    assert len(described.blocks) == len(blocks_of(network)) + class_cond  # the classes' embedding


def test_work_grows_with_the_area_of_the_image():
    small = model.describe("small", FLAGS)
    flags = {**FLAGS, "image_size": 16, "attention_resolutions": "8"}
    large = model.describe("large", flags)
    assert large.parameters == small.parameters
    assert large.flops / small.flops == pytest.approx(4, rel=0.1)
    assert large.activations / small.activations == pytest.approx(4, rel=0.1)
    # a convolution takes two operations per weight and pixel; most weights see few pixels
    assert 2 * small.parameters < small.flops < 2 * small.parameters * 64


# -- the document and the numbers in it -------------------------------------------------------


def test_the_tables_of_the_document_are_those_of_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling_model.py"])
    model.main()
    document = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    printed = [line for line in capsys.readouterr().out.splitlines() if line[:1] in ("|", "-")]
    assert len(printed) > 40
    assert [line for line in printed if line not in document] == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [("precision", "fp8"), ("microbatches", "0"), ("per_node", "0"), ("slow_gbits", "0")],
)
def test_a_wrong_flag_is_named(monkeypatch, flag, value):
    monkeypatch.setattr(sys, "argv", ["scaling_model.py", f"--{flag}", value])
    with pytest.raises(UserError, match=f"^--{flag} {value}.*: must be "):
        model.main()


def test_the_recorded_numbers_are_near_what_is_calculated_now():
    record = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    network = model.describe("small", record["network"])
    assert record["parameters"] == network.parameters
    kinds = set()
    for row in record["rows"]:
        case = measuring.Case(**{name: row[name] for name in measuring.Case.__dataclass_fields__})
        kinds.add((case.kind, case.processes, case.hosts))
        assert abs(row["difference"]) <= TOLERANCE.get(row["what"], 0), row
        if row["what"] not in ("peak_in_step", "seconds_per_step"):  # from another measurement
            now = measuring.calculate(case, network)[row["what"]]
            assert row["calculated"] == pytest.approx(now), row
    assert {("fsdp", 2, 1), ("ddp", 4, 1), ("hybrid", 4, 1), ("hybrid", 4, 2)} <= kinds


# -- real processes ---------------------------------------------------------------------------


def check(case):
    """Memory exactly, traffic and the peak nearly, as TOLERANCE says."""
    network = model.describe("small", case.flags)
    measured = measuring.run_case(case)
    calculated = measuring.calculate(case, network)
    assert {"weights", "gradients", "moments", "averages"} <= set(calculated)
    for name, value in calculated.items():
        if name in measured:  # traffic is not, where nobody may make a network of their own
            assert measured[name] == pytest.approx(value, rel=TOLERANCE.get(name, 0), abs=0), name
    assert math.isfinite(measured["seconds"])
    return measured


@pytest.mark.slow
def test_two_processes_hold_and_send_what_is_calculated():
    case = measuring.Case("fsdp", 2, microbatches=2, averages=2, channels=32, steps=1)
    measured = check(case)
    if hosts.can_isolate():
        assert measured["sent_within_hosts"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        measuring.Case("ddp", 2, microbatches=2),
        measuring.Case("fsdp", 2, precision="bf16"),
        measuring.Case("ddp", 4, hosts=2),
        measuring.Case("hybrid", 4, hosts=2, shard_processes=2),
    ],
    ids=lambda case: case.title,
)
def test_more_of_them_do_too(case):
    if case.hosts > 1 and not hosts.can_isolate():
        pytest.skip("needs the right to make network namespaces (unshare)")
    measured = check(case)
    assert (case.hosts > 1) == bool(measured.get("sent_between_hosts"))
