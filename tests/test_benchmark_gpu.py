"""The benchmark of a GPU runs on a CPU with tiny sizes, and a part that fails leaves the others."""

import json
import sys
from pathlib import Path

import benchmark_gpu
import pytest
import torch
from benchmark_training import pack_noise


def test_a_step_is_timed_in_every_way(tmp_path: Path) -> None:
    machine = benchmark_gpu.Machine(device=torch.device("cpu"), tiny=True)
    packed = pack_noise(tmp_path / "packed", num_cases=2, size=32)
    row = benchmark_gpu.step_row(machine, machine.config(), packed)
    times = [row[f"{way}_{precision}_ms"] for way in ("eager", "graph") for precision in ("fp32", "bf16")]
    assert min(*times, row["training_ms"]) > 0
    assert row["of_graph"] == min(times[2:]) / row["training_ms"]
    assert row["busy_percent"] is None


def test_part_that_fails_is_a_row_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(benchmark_gpu, "memory_rows", fail)
    output = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--tiny", "--parts", "memory", "evaluation", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *arguments])
    benchmark_gpu.main()
    parts = json.loads(output.read_text())["parts"]
    assert parts["memory"]["rows"] == [{"row": "memory", "error": "RuntimeError: no memory"}]
    study, studies = parts["evaluation"]["rows"]
    assert study["ratio"] == pytest.approx(study["seconds"] / study["reading_resampling_network_s"])
    assert studies["two_cores_without_gpu_s"] > 0
    assert "| memory | error RuntimeError: no memory |" in capsys.readouterr().out
