"""What the benchmarks share: pairs, records, and the plain rendering that computes the same."""

import argparse
import json
import time

import pytest
import torch
from script_runner import load_module
from test_unet import inputs, small_unet

from improved_diffusion.script_util import ModelAndDiffusionOptions


@pytest.fixture(scope="module")
def measuring():
    return load_module("benchmarks", "measuring")


@pytest.fixture(scope="module")
def records():
    return load_module("benchmarks", "records")


@pytest.fixture(scope="module")
def plain():
    return load_module("benchmarks", "plain_unet").plain


def test_candidates_take_turns_and_the_first_round_does_not_count(measuring):
    order = []
    seconds = measuring.paired({n: lambda n=n: order.append(n) for n in "ab"}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_speedup_is_the_median_of_the_rounds_ratios(measuring):
    seconds = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 30.0, 1.5]}
    assert measuring.speedup(seconds, of="ours", against="theirs")["median"] == 2.0
    assert measuring.speedup({"a": [1.0], "b": [3.0]}, of="a", against="b")["low"] == 3.0


def test_time_is_that_of_the_call(measuring):
    (taken,) = measuring.paired({"a": lambda: time.sleep(0.05)}, rounds=1, warm_up=0)["a"]
    assert 0.05 <= taken < 5


def test_a_candidate_may_time_itself(measuring):
    assert measuring.paired({"a": lambda: 7.5}, rounds=2)["a"] == [7.5, 7.5]


def test_record_tells_the_circumstances(records, tmp_path):
    records.write_result(tmp_path / "x.json", {"numbers": [1, 2]})
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["numbers"] == [1, 2]
    about = stored["circumstances"]
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__
    assert about["device"]
    assert about["commit"]


def test_peak_is_in_seconds_of_an_operation(measuring):
    product = measuring.matmul(torch.float32, torch.device("cpu"))
    assert 1e8 < 1 / product() < 1e15


def test_memory_is_what_a_call_adds(measuring):
    added = measuring.added_memory(lambda: torch.ones(16 << 20))
    assert 48 << 20 < added < 128 << 20


def test_memory_is_counted_in_a_process_of_its_own(measuring, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nprint('words', 7, len(os.environ['MALLOC_TRIM_THRESHOLD_']))")
    assert measuring.in_a_fresh_process([str(script)]) == 5


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_numbers_that_are_too_small_are_refused(text, capsys):
    parser = load_module("benchmarks", "bench_import").create_argparser()
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--rounds", text])
    assert error.value.code == 2
    assert f"argument --rounds: '{text}' is no number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "inf", "x"])
def test_times_that_cannot_be_are_refused(records, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no number above 0"):
        records.above_zero(text)


def test_file_that_cannot_be_written_is_refused_before_it_is_measured(records, tmp_path, capsys):
    assert records.output_file(str(tmp_path / "new" / "x.json")) == str(tmp_path / "new" / "x.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(SystemExit) as error:
        load_module("benchmarks", "bench_import").main(["--out", str(tmp_path)])
    assert error.value.code == 2
    assert f"'{tmp_path}' is no file that can be written" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="cannot make the folder"):
        records.output_file(str(tmp_path / "file" / "x.json"))


def test_plain_rendering_of_another_attention_is_refused(plain):
    with pytest.raises(ValueError, match="published order"):
        plain(small_unet(use_new_attention_order=True))


def test_unknown_configuration_is_named():
    with pytest.raises(ValueError, match="--configs tiny: choose among small, cifar10"):
        load_module("benchmarks", "configurations").chosen("small,tiny")


def test_table_has_a_row_for_each(records):
    assert records.table(["a", "long"], [[1, 2]]) == "| a | long |\n|---|------|\n| 1 | 2    |"


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "use_scale_shift_norm": True}])
def test_plain_rendering_computes_the_same(plain, options):
    """Outputs and gradients, from the same weights under the same keys."""
    ours = small_unet(**options).train()
    theirs = plain(ours)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    kinds = {type(module).__name__ for module in theirs.modules()}
    assert {"PlainSiLU", "PlainGroupNorm", "PlainAttention"} <= kinds
    assert not {"SiLU", "GroupNorm32", "QKVAttention", "PointwiseConv1d"} & kinds
    x, t = inputs()
    y = {"y": torch.tensor([0, 2])} if "num_classes" in options else {}
    torch.testing.assert_close(theirs(x, t, **y), ours(x, t, **y), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


# -- the network


def test_network_is_measured_beside_the_plain_rendering(tmp_path, monkeypatch, capsys):
    bench = load_module("benchmarks", "bench_unet")
    configurations = load_module("benchmarks", "configurations")
    options = ModelAndDiffusionOptions(
        image_size=8, num_channels=32, num_res_blocks=1, attention_resolutions="4"
    )
    tiny = configurations.Configuration(options, batch=2, batch_on_gpu=2)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "small", tiny)
    monkeypatch.setattr(bench, "memory_in_a_process", lambda name, key: 7_000_000)
    variants = load_module("benchmarks", "variants")
    monkeypatch.setattr(variants, "matmul", lambda dtype, device: lambda: 1e-12)
    monkeypatch.setattr(load_module("benchmarks", "peers"), "PYTHON", tmp_path / "none")
    out, threads = tmp_path / "unet.json", str(torch.get_num_threads())
    words = ["--configs", "small", "--rounds", "1", "--threads", threads]
    bench.main([*words, "--out", str(out)])
    found = json.loads(out.read_text())
    assert "make peers" in found["left_out"]
    small = found["configs"]["small"]
    assert small["forward"].keys() == {"plain fp32", "ours fp32", "ours bf16"}
    assert small["training"].keys() == {*small["forward"], "ours fp32, checkpointing"}
    for kind in ("forward", "training"):
        for one in small[kind].values():
            share = one["operations"] / one["seconds"] / 1e12
            assert one["share_of_peak"] == pytest.approx(share)
    # a backward pass is two of forward, but for the first convolution's derivative by the image
    passes = [small[kind]["ours fp32"]["operations"] for kind in ("forward", "training")]
    assert 2.9 < passes[1] / passes[0] <= 3
    assert "| small  | training | ours fp32, checkpointing |" in capsys.readouterr().out
