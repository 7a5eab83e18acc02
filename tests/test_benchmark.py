"""The benchmark measures every task, refuses to time wrong logits, and keeps what it measured before Ctrl-C."""

import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from benchmarks import benchmark, measuring

from crossvit import CrossViTImageProcessor


@pytest.mark.slow
def test_benchmark_measures_every_task(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(measuring, "READ_IMAGES", 32)
    monkeypatch.setattr(measuring, "CLASSIFIED_IMAGES", 32)
    monkeypatch.setitem(sys.modules, "measuring", measuring)
    options = "--variants crossvit_tiny --batch_sizes 1 --dtypes float32 --modes eager --seconds 0 --output"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options.split(), str(tmp_path)])
    assert benchmark.main() == 0
    assert capfd.readouterr().out == (tmp_path / "benchmark.md").read_text(encoding="utf-8")

    values = {}
    for record in json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["cells"]:
        values[record["task"]] = record["values"]
        assert {len(rounds) for rounds in record["values"].values()} == {1 if record["task"] == "memory" else 3}
    assert values.keys() == set(benchmark.TASKS)
    assert all(values[task].keys() == {"ours", "timm", "wrapper"} for task in ("inference", "training", "loading"))
    assert values["streaming"].keys() == {"ours", "stream"} and values["startup"].keys() == {"ours", "wrapper"}
    # Weights, gradients and the two moments of AdamW: 4 bytes each for 7,014,800 parameters
    assert min(values["memory"].values())[0] > 4 * 4 * 7_014_800


def plan(*options: str) -> Iterator[measuring.Cell]:
    for cell in benchmark.plan(benchmark.parse_arguments(["--variants", "crossvit_tiny", *options])):
        yield measuring.Cell(**{**cell, "variant": benchmark.VARIANTS[cell["variant"]], "device": "cpu"})


def test_wrong_logits_are_not_timed(monkeypatch):
    cell = next(plan("--batch_sizes", "1"))
    build_model = measuring.build_model

    def build_wrong_model(name, cell):
        model = build_model(name, cell)
        if name == "ours":
            torch.nn.init.zeros_(model.classifier.heads[0].bias)
        return model

    monkeypatch.setattr(measuring, "build_model", build_wrong_model)
    monkeypatch.setattr(measuring, "time_in_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="ours differs from timm"):
        measuring.measure(cell, seconds=0)


def test_wrong_pixels_are_not_timed(monkeypatch):
    monkeypatch.setattr(measuring, "READ_IMAGES", 16)
    monkeypatch.setattr(measuring, "CrossViTImageProcessor", partial(CrossViTImageProcessor, image_std=[0.1] * 3))
    monkeypatch.setattr(measuring, "time_in_turns", lambda *_, **__: pytest.fail("timed"))
    for cell in itertools.islice(plan("--tasks", "reading"), 3):  # The others differ in the process that reads
        with pytest.raises(RuntimeError, match="ours differs from timm"):
            measuring.measure(cell, seconds=0)


def test_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    # The second round was disturbed: the ratio compares the contenders within each round
    values = {"ours": [1.0, 30.0, 1.0], "timm": [2.0, 20.0, 2.0]}
    measured = {"values": values, "difference": 0.0, "first_calls": {"ours": 3.0, "timm": 4.0}}
    outcomes = iter([measured, RuntimeError("out of memory"), KeyboardInterrupt()])

    def measure(cell, seconds):
        if isinstance(outcome := next(outcomes), BaseException):
            raise outcome
        return outcome

    monkeypatch.setitem(sys.modules, "measuring", measuring)
    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--output", str(tmp_path)])
    assert benchmark.main() == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert len(json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["cells"]) == 2
    *_, first, second = (tmp_path / "benchmark.md").read_text(encoding="utf-8").splitlines()
    assert first.endswith("| 1,000.0 ms | 2,000.0 ms |  |  | 0.50 (0.50-1.00) |  |  | 3.0 s, 4.0 s |")
    assert "failed: RuntimeError: out of memory" in second
