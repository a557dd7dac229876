"""The benchmark of loading reads every image, and tells of each way what it costs."""

import json

from script_runner import load_module


def test_each_way_is_measured_once_in_a_round(monkeypatch, tmp_path, capsys):
    bench = load_module("benchmarks", "bench_loader")
    monkeypatch.setattr(bench, "WARM_UP", 1)
    read = []
    load_data = bench.load_data

    def watched(**options):
        read.append((options["data_dir"].rsplit("/", 1)[-1], options["num_workers"]))
        return load_data(**{**options, "num_workers": 0})  # starting some takes seconds

    monkeypatch.setattr(bench, "load_data", watched)
    out = tmp_path / "loader.json"
    sizes = ["--images", "6", "--batch_size", "4", "--image_size", "16"]
    bench.main([*sizes, "--rounds", "2", "--seconds", "0.02", "--out", str(out)])
    assert read == list(bench.WAYS.values()) * 2
    result = json.loads(out.read_text())
    ways = list(bench.WAYS)
    assert [list(speeds) for speeds in result["rounds"]] == [ways, ways]
    assert list(result["images_per_s"]) == list(result["cpu_ms_per_image"]) == ways
    for name, (way, other, target) in bench.RATIOS.items():
        ratios = [speeds[way] / speeds[other] for speeds in result["rounds"]]
        found = result["ratios"][name]
        assert found["target"] == target
        assert round(min(ratios), 2) == found["least"] <= found["median"] <= found["largest"]
    assert result["circumstances"]["threads"] == 1
    assert capsys.readouterr().out.count("packed to folder") == 2
