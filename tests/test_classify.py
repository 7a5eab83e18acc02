"""The command that classifies images."""

import csv
from functools import partial

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from examples_in_process import EXAMPLES, save_checkpoint
from image_folders import image_bytes, write_files
from python_process import run_python

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


@pytest.fixture
def small_config(small_config):
    small_config.id2label = dict(enumerate(["ant", "bee", "cow, cattle", "dog", "elk", "fox"]))
    return small_config


@pytest.fixture
def photos(tmp_path):
    """Five images, one of which cannot be read, in a folder with subfolders."""
    names = ("a.png", "b/c.png", "b/d/e.png", "f.png")
    images = {name: image_bytes((60 * index, 200, 40), (30 + index, 50)) for index, name in enumerate(names)}
    return write_files(tmp_path / "photos", {**images, "b/cut.png": images["a.png"][:40]})


@pytest.fixture
def classify(example, checkpoint):
    return lambda *arguments: example("classify", "--model", checkpoint, *arguments)


def test_labels_are_those_of_the_model(classify, checkpoint, photos, tmp_path):
    output, errors = classify(photos, "--batch_size", 3, "--output", tmp_path / "new" / "labels.csv")
    with open(tmp_path / "new" / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", *(f"{name}_{place}" for place in range(1, 6) for name in ("label", "score"))]
    assert [row["file"] for row in rows] == [str(photos / name) for name in ("a.png", "b/c.png", "b/d/e.png", "f.png")]
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    for row in rows:
        with torch.no_grad():
            logits = model(**processor(PIL.Image.open(row["file"]), return_tensors="pt")).logits[0]
        for place, index in enumerate(logits.argsort(descending=True)[:5].tolist(), start=1):
            assert row[f"label_{place}"] == model.config.id2label[index]
            # Six digits are written
            assert float(row[f"score_{place}"]) == pytest.approx(logits.softmax(0)[index].item(), abs=1e-5)
    assert output == "" and "Classified 4 of 5 images" in errors
    assert errors.count("left out") == 1 and f"left out {photos / 'b' / 'cut.png'}: " in errors
    assert "5/5" in errors  # a progress bar


def read_table(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: float(text) if "score" in name else text for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def approximately(row):
    # Six digits are written to CSV files
    return {name: pytest.approx(value, abs=1e-5) if "score" in name else value for name, value in row.items()}


@pytest.fixture
def table(classify, photos, tmp_path):
    """The rows that the command writes with some options, and its stderr."""

    def run(*options, suffix=".csv"):
        path = tmp_path / f"labels{suffix}"
        _, errors = classify(photos, *options, "--output", path)
        return read_table(path), errors

    return run


def test_workers_parquet_and_dtype(table, monkeypatch):
    expected, _ = table()
    rows, errors = table("--num_workers", 2, "--batch_size", 2, suffix=".parquet")
    assert rows == [approximately(row) for row in expected]
    assert errors.count("left out") == 1
    dtypes = []
    forward = CrossViTForImageClassification.forward

    def spy(self, pixel_values):
        dtypes.append((self.dtype, pixel_values.dtype))
        return forward(self, pixel_values)

    monkeypatch.setattr(CrossViTForImageClassification, "forward", spy)
    table("--dtype", "bfloat16")
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_ctrl_c_keeps_what_is_written(run_example, checkpoint, photos, tmp_path, monkeypatch, suffix):
    forward, calls = CrossViTForImageClassification.forward, []

    def interrupted(self, pixel_values):
        calls.append(pixel_values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, pixel_values)

    monkeypatch.setattr(CrossViTForImageClassification, "forward", interrupted)
    output = tmp_path / f"labels{suffix}"
    status, _, errors = run_example("classify", "--model", checkpoint, photos, "--batch_size", 1, "--output", output)
    assert status == 130 and errors.endswith("Interrupted.\n")
    assert [row["file"] for row in read_table(output)] == [str(photos / "a.png"), str(photos / "b/c.png")]


def test_compiled_model_is_compiled_once(table, monkeypatch):
    expected, _ = table()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # without the minute for C++
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, _ = table("--compile", "--batch_size", 3)  # the second batch has two images
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert rows == [approximately(row) for row in expected]


def test_only_what_is_needed_is_imported(checkpoint, photos, tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(EXAMPLES)!r})
        sys.argv = ["classify.py", {str(photos / "a.png")!r}, "--model", {str(checkpoint)!r}]
        import crossvit
        before = set(sys.modules)  # transformers 5.10 imports scikit-learn
        import classify
        classify.main()
        optional = {{"datasets", "evaluate", "matplotlib", "pyarrow", "sklearn", "timm"}}
        print(*sorted(optional & (sys.modules.keys() - before)))
    """
    labels, imported = run_python(code, tmp_path).splitlines()
    assert labels.startswith(str(photos / "a.png")) and imported == ""


def test_lines_without_a_table(classify, photos):
    # "b/c.png" is named twice and classified once
    output, _ = classify(photos / "f.png", photos / "b", photos / "b" / "c.png", photos / "typo.png")
    lines = [line.split("  ") for line in output.splitlines()]
    assert [line[0] for line in lines] == [str(photos / name) for name in ("f.png", "b/c.png", "b/d/e.png")]
    assert all(len(line) == 6 and line[1].endswith("%") for line in lines)


def test_gray_model_and_sixteen_bits(example, small_config, photos, tmp_path):
    small_config.num_channels = 1
    options = {"image_mean": [0.5], "image_std": [0.2], "do_convert_rgb": False}
    gray = save_checkpoint(small_config, tmp_path / "gray", **options)
    PIL.Image.fromarray(np.full((40, 44), 40_000, np.uint16)).save(photos / "sixteen.png")
    output, errors = example("classify", photos, "--model", gray)
    assert len(output.splitlines()) == 4 and "sixteen.png: cannot be read as an image (An image has mode I" in errors


def test_fewer_labels_than_five(classify, checkpoint, photos, small_config, tmp_path):
    small_config.num_labels = 2
    CrossViTForImageClassification(small_config).save_pretrained(checkpoint)
    classify(photos / "a.png", "--output", tmp_path / "labels.csv")
    header, row = (tmp_path / "labels.csv").read_text().splitlines()
    assert header == "file,label_1,score_1,label_2,score_2" and len(row.split(",")) == 5


def test_what_is_wrong_is_named(failure, checkpoint, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((photos / "b" / "cut.png",), "no image that can be read in "),
        ((tmp_path / "empty",), "no image that can be read in "),
        ((photos, "--model", tmp_path / "typo"), "typo: not a CrossViT checkpoint"),
        ((photos, "--output", tmp_path / "labels.txt"), "labels.txt: must end in .csv or .parquet"),
        ((photos, "--batch_size", 0), "--batch_size: must be at least 1, got 0"),
    ):
        assert message in failure("classify", "--model", checkpoint, *arguments)
