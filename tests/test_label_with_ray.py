"""Labels by Ray Data: those of `classify.py`, each image once, whatever happens on the way."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import psutil
import pyarrow.parquet
import pytest
import torch
from examples_in_process import EXAMPLES
from image_folders import image_bytes, write_files

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor


SCRIPT = EXAMPLES / "label_with_ray.py"


@pytest.fixture
def photos(tmp_path):
    """80 images, and one that cannot be read."""
    generator = np.random.default_rng(0)
    colors = generator.integers(256, size=(80, 3)).tolist()
    files = {f"{index % 3}/{index:02}.png": image_bytes(tuple(color), (40, 44)) for index, color in enumerate(colors)}
    return write_files(tmp_path / "photos", {**files, "1/cut.png": files["0/00.png"][:40]})


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], stderr=subprocess.DEVNULL)


def read(folder: Path) -> dict[str, dict]:
    rows = pyarrow.parquet.read_table(folder).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows)
    return {row.pop("path"): row for row in rows}


def kill_actor(process: subprocess.Popen) -> None:
    """Kills the process with the model while it computes the labels of a batch."""
    while True:
        assert process.poll() is None, "the command ended before its actor was found"
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                title = "".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            if "Labeller" in title and title.endswith(".submit"):
                return os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.005)


@pytest.mark.slow
def test_folder(example, checkpoint, photos, tmp_path):
    output = tmp_path / "labels"
    arguments = (photos, "--model", checkpoint, "--output", output, "--embeddings", "--batch_size", 2)
    process = start(*arguments)
    kill_actor(process)
    assert process.wait() == 0
    rows = read(output)
    assert len(rows) == 81
    failed = rows.pop(str(photos / "1/cut.png"))
    assert "cut.png: not an image of the formats" in failed.pop("error") and set(failed.values()) == {None}

    example("classify", photos, "--model", checkpoint, "--output", tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8") as file:
        expected = {row["file"]: row for row in csv.DictReader(file)}
    assert rows.keys() == expected.keys()
    for path, row in rows.items():
        assert row["error"] is None
        assert row["labels"] == [expected[path][f"label_{place}"] for place in range(1, 6)]
        # Six digits are written to CSV files
        assert row["scores"] == pytest.approx(
            [float(expected[path][f"score_{place}"]) for place in range(1, 6)], abs=1e-5
        )
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    images = [PIL.Image.open(path) for path in rows]
    with torch.no_grad():
        pooled = model.crossvit(**processor(images, return_tensors="pt")).pooler_output
    # float16 has 11 bits
    np.testing.assert_allclose([row["embedding"] for row in rows.values()], pooled, rtol=2**-11, atol=1e-4)

    # A second run: with a new image, and a file that a killed run would have left
    (part,) = output.glob("*.parquet")
    (output / "half.parquet").write_bytes(part.read_bytes()[:1000])
    shutil.copy(photos / "0/00.png", photos / "new.png")
    assert start(*arguments).wait() == 0
    assert read(output).keys() == {*rows, str(photos / "1/cut.png"), str(photos / "new.png")}
    (new_part,) = set(output.glob("*.parquet")) - {part}
    assert pyarrow.parquet.read_metadata(new_part).num_rows == 1


@pytest.mark.slow
def test_parquet_files(checkpoint, photos, tmp_path):
    files = sorted(photos.rglob("*.png"))[:12]
    tables = tmp_path / "tables"
    for part in range(2):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files[6 * part : 6 * part + 6]]
        rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
        rows.to_parquet(tables / f"{part}.parquet")
    table = pyarrow.table({"image": [file.read_bytes() for file in files]})  # bytes as they are
    pyarrow.parquet.write_table(table, tables / "bytes.parquet")
    output = tmp_path / "labels"
    for source in (tables / "1.parquet", f"file://{tables}/*.parquet"):
        assert start(source, "--model", checkpoint, "--output", output).wait() == 0
    rows = read(output)
    two_files = [rows.pop(f"{tables}/{part}.parquet#{row}") for part in range(2) for row in range(6)]
    one_file = [rows.pop(f"{tables}/bytes.parquet#{row}") for row in range(12)]
    assert two_files == one_file and not rows


def test_what_is_wrong_is_named(failure, checkpoint, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    options = ("--output", tmp_path / "labels", "--model")
    for arguments, message in (
        ((tmp_path / "empty", *options, checkpoint), "must have images or Parquet files, got neither"),
        ((tmp_path / "typo", *options, checkpoint), "must have images or Parquet files, got neither"),
        ((photos, *options, tmp_path / "typo"), "typo: not a CrossViT checkpoint"),
        ((photos, *options, checkpoint, "--num_actors", 0), "--num_actors: must be at least 1, got 0"),
    ):
        assert message in failure("label_with_ray", *arguments)


@pytest.mark.slow
def test_actors_leave_a_cpu_for_reading(checkpoint, photos, tmp_path):
    command = (photos, "--model", checkpoint, "--output", tmp_path / "labels", "--num_actors", 1000)
    process = subprocess.run([sys.executable, str(SCRIPT), *map(str, command)], capture_output=True, text=True)
    assert process.returncode == 1 and "must leave one CPU for reading" in process.stderr.splitlines()[-1]
