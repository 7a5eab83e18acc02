"""The command that finds similar images."""

import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from examples_in_process import EXAMPLES, write_zoo

from crossvit import CrossViTForImageClassification, CrossViTImageProcessor, CrossViTModel


@pytest.fixture
def checkpoint(small_config, tmp_path):
    model = CrossViTForImageClassification(small_config)
    with torch.no_grad():  # Random weights tell colors apart once the patches have a say in the class tokens
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(tmp_path / "checkpoint")
    size = {"height": 36, "width": 36}
    CrossViTImageProcessor(size={"shortest_edge": 36}, crop_size=size).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def photos(tmp_path):
    """Twelve images of one color each with noise, in two folders."""
    generator = np.random.default_rng(0)
    for name, color in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(np.array(color) + generator.normal(0, 10, (40, 44, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def retrieve(example, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments, status=0):
        options = ("--model", checkpoint, "--output", tmp_path / "found.png", *arguments)
        found, output, errors = example("retrieve", *options)
        assert found == status, errors
        return output if status == 0 else errors

    return run


def test_images_of_one_kind_come_back_together(retrieve, photos, tmp_path):
    output = retrieve("--data", photos)
    assert "100.0% of the 5 nearest images of 12 images are of the same class" in output
    with PIL.Image.open(tmp_path / "found.png") as picture:
        assert min(picture.size) > 500


def test_nearest_images_are_those_of_the_cosine(retrieve, photos, checkpoint, tmp_path):
    query = photos / "red" / "3.png"
    output = retrieve("--data", photos, "--query", query, "--nearest", 12)
    line = next(line for line in output.splitlines() if line.startswith(str(query)))
    found = line.split("  ")[1:]
    model = CrossViTForImageClassification.from_pretrained(checkpoint).eval()
    processor = CrossViTImageProcessor.from_pretrained(checkpoint)
    files = sorted(photos.rglob("*.png"))
    images = [PIL.Image.open(file) for file in (query, *files)]
    with torch.no_grad():
        pooled = model.crossvit(**processor(images, return_tensors="pt")).pooler_output
    order = torch.cosine_similarity(pooled[:1], pooled[1:]).argsort(descending=True).tolist()
    assert found == [str(files[number]) for number in order][:11]
    assert found[0] == str(query)  # A query is looked for in the folder like any other image


def test_what_cannot_be_read_is_named_and_left_out(retrieve, photos, tmp_path):
    (photos / "red" / "cut.png").write_bytes((photos / "red" / "0.png").read_bytes()[:300])
    (photos / "red" / ".hidden.png").write_text("no image")
    output = retrieve("--data", photos)
    assert output.count("left out: ") == 1 and "cut.png" in output and "12 images" in output


def test_changed_images_and_weights_alone_are_embedded_again(retrieve, photos, checkpoint, monkeypatch):
    query = photos / "red" / "3.png"
    options = ("--data", photos, "--query", query, "--nearest", 3)
    first = retrieve(*options)
    calls = []
    forward = CrossViTModel.forward
    monkeypatch.setattr(CrossViTModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    assert retrieve(*options) == first
    assert len(calls) == 1  # for the query
    shutil.copy(photos / "blue" / "0.png", photos / "red" / "3.png")
    changed = retrieve(*options)
    assert "blue" in changed.splitlines()[0].split("  ")[1]
    model = CrossViTForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(checkpoint)
    assert retrieve("--data", photos, "--query", query, "--nearest", 11) != changed


def test_what_is_wrong_is_named(retrieve, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--data", tmp_path / "typo"), "typo: no such folder"),
        (("--data", tmp_path / "empty"), "empty: no images in it"),
        (("--data", photos, "--query", tmp_path / "typo.png"), "typo.png: No such file"),
        (("--data", photos, "--nearest", 0), "--nearest 0"),
        (("--data", photos, "--model", tmp_path / "typo"), "typo: no CrossViT"),
    ):
        errors = retrieve(*arguments, status=1)
        assert message in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.slow
def test_digits_of_one_class_come_back_together(tmp_path):
    command = [sys.executable, str(EXAMPLES / "retrieve.py")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    # 97.6 % were measured
    assert float(re.search(r"([\d.]+)% of the 5 nearest images of 360", process.stdout)[1]) > 90
    assert (tmp_path / "outputs" / "retrieve.png").is_file()


def test_folder_without_classes(retrieve, tmp_path):
    write_zoo(tmp_path / "zoo", images=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((tmp_path / "zoo").rglob("*.png"))):
        shutil.copy(file, flat / f"{number}.png")
    output = retrieve("--data", flat)
    assert "same class" not in output and "Drew 3 images" in output
