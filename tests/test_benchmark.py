"""The benchmark runs, its report is made of its JSON alone, and it counts operations as done by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.contenders import Cell
from benchmarks.measuring import DisagreementError, count_flops, largest_difference
from benchmarks.report import make_report, ratio
from reference import VARIANTS
from timm_reference import timm_variant


SCRIPT = Path(__file__).parent / "benchmarks" / "benchmark.py"


def run_benchmark(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_benchmark_measures_and_reports(tmp_path):
    # Inference and training of one image, loading, preprocessing
    options = ("--variants", "crossvit_tiny", "--batch_sizes", 1, "--dtypes", "float32", "--modes", "eager")
    finished = run_benchmark(*options, "--rounds", 2, "--threads", 1, "--device", "cpu", "--output", tmp_path)
    assert finished.returncode == 0, finished.stderr
    report = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert finished.stdout.strip() == report.strip()
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000

    results = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert [record["task"] for record in results["cells"]] == ["preprocessing", "loading", "inference", "training"]
    for record in results["cells"]:
        assert {len(times) for times in record["rounds"].values()} == {2}
        assert record["difference"] <= (1e-5 if record["task"] != "preprocessing" else 2e-2)
    inference, training = results["cells"][2:]
    assert inference["rounds"].keys() == {"crossvit", "timm", "wrapper"}
    if sys.platform == "linux":
        # The gradients and the two moments of AdamW, of 7 million parameters of 4 bytes
        assert 3 * 4 * 7e6 < training["memory"]["crossvit"] < 2e9
    assert make_report(results) == report


def test_options_that_do_not_fit_are_refused_in_one_line(tmp_path):
    finished = run_benchmark("--dtypes", "float8", "--output", tmp_path)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr and "invalid choice: 'float8'" in finished.stderr.splitlines()[-1]


def test_ratios_are_those_of_the_same_round():
    # The second round was disturbed, for both
    record = {"rounds": {"crossvit": [1.0, 30.0, 1.0], "timm": [2.0, 20.0, 2.0]}}
    assert ratio(record, "timm") == (0.5, 0.5, 1.0)


def test_contenders_that_differ_are_refused():
    cell = Cell("crossvit_tiny", "inference", 1)
    logits = torch.tensor([1.0, -2.0])
    assert largest_difference({"timm": logits, "crossvit": logits + 1e-5}, cell) < 1e-4
    with pytest.raises(DisagreementError, match="crossvit does not compute what timm does"):
        largest_difference({"timm": logits, "crossvit": logits + 0.1}, cell)


def test_flops_are_those_counted_by_hand():
    variant = VARIANTS["crossvit_tiny"]
    config = variant["config"]
    stages = len(config["depth"])
    # Products of two numbers in a forward pass, without fusions and those of the fusions
    products, fusions = 0, {"crossvit": 0, "timm": 0}
    for branch in (0, 1):
        width, patches = (
            config["embed_dim"][branch],
            (config["image_size"][branch] // config["patch_size"][branch]) ** 2,
        )
        tokens, other = patches + 1, config["embed_dim"][1 - branch]
        products += patches * 3 * config["patch_size"][branch] ** 2 * width  # the patch embeddings
        layer = tokens * width**2 * (4 + 2 * config["mlp_ratio"][branch])  # its linear layers
        layer += 2 * tokens**2 * width  # and its attention
        to_there_and_back = 2 * width * other
        # Keys and values, the query and the output, and the attention of one query
        fusions["timm"] += stages * (to_there_and_back + 2 * tokens * width**2 + 2 * width**2 + 2 * tokens * width)
        # The query and the output, each before and after absorbing; the attention of each head; the bias of the keys
        heads = config["num_heads"][branch]
        fusions["crossvit"] += stages * (to_there_and_back + 4 * width**2 + 2 * heads * tokens * width + width)
        products += sum(depth[branch] for depth in config["depth"]) * layer + 1000 * width
    reference = timm_variant(variant)
    for name, of_fusions in fusions.items():
        flops = count_flops(name, Cell("crossvit_tiny", "inference", 1), reference)
        assert flops == 2 * (products + of_fusions), name
