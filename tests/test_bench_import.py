"""The benchmark of imports has a number for each module."""

import json

import pytest
from script_runner import load_module


@pytest.fixture
def bench():
    return load_module("benchmarks", "bench_import")


def test_every_module_is_imported_after_torch(bench, monkeypatch, tmp_path, capsys):
    asked = []
    seconds = {"torch": 2.0, bench.PACKAGE: 0.125, bench.MODULES[1]: 0.25}

    def pretend(first, module):
        asked.append((first, module))
        return seconds.get(module, 0.5)

    monkeypatch.setattr(bench, "import_seconds", pretend)
    out = tmp_path / "import.json"
    bench.main(["--rounds", "3", "--out", str(out)])
    assert asked == [("sys", "torch"), *(("torch", name) for name in bench.MODULES)] * 4
    result = json.loads(out.read_text())
    assert result["torch_seconds"] == 2
    expected = {name: seconds.get(name, 0.5) for name in bench.MODULES}
    assert result["above_torch_seconds"] == expected
    assert "| improved_diffusion, above torch " in capsys.readouterr().out


def test_a_process_tells_its_time(bench):
    assert 0 < bench.import_seconds("sys", "json") < 60
